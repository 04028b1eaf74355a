"""`python -m benchmarks.tile_search OUT`: what kernels take on this GPU with other tiles than their files choose.

Every tile that compiles without a spill and fits is checked against float64 and timed on the shapes of the kernel
benchmark, a few times each and in turns; the best of a shape then again beside the chosen one, for longer.
OUT/cases.jsonl has records of those, and of tiles that were wrong, after every shape; OUT/tiles.jsonl what became
of each tile at the compiler; OUT/rounds.jsonl the first times. A shape that is there already is passed over.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.kernel_cache import Rotation, cold_clock, copies, other_operand
from benchmarks.kernel_calls import Call, ours
from benchmarks.kernel_cases import kernel_effort, kernel_groups
from benchmarks.kernel_runs import Subject
from benchmarks.tile_candidates import SPACES, Candidate, fitting, to_time
from densebench.kernels.launch import device_of
from densebench.kernels.offline import TARGETS
from densebench.kernels.tiling import changing
from densebench.measure.device import DeviceLostError, release_memory, tune
from densebench.measure.environment import environment
from densebench.measure.outcome import Outcome
from densebench.measure.resume import finished
from densebench.measure.timing import Effort, Turns, time_in_turns
from densebench.results import Case, Record, RunStore, StoreError, append_durably, make_appendable
from densebench.statistics import ratio_of, summarize, unsteady

CHOSEN = "chosen"
FIRST = Effort(rounds=5, seconds=0.5, least=5)
FINALISTS = 6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_search", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for the records")
    parser.add_argument("--kernels", default=",".join(SPACES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print what is there; needs no GPU")
    options = parser.parse_args(arguments)
    kernels = options.kernels.split(",")
    unknown = [kernel for kernel in kernels if kernel not in SPACES]
    if unknown:
        parser.error(f"unknown kernel {unknown[0]!r}; known: {', '.join(SPACES)}")
    target = _target()
    if target is None and not options.show:
        parser.error(f"tiles are searched for on an NVIDIA GPU that the kernels are compiled for: {_known()}")
    try:
        if target is not None and not options.show:
            tune("cuda")
            Search(options.out, kernel_effort("default", "cuda")).run(kernels, target)
        print(table(RunStore(options.out).read()))
    except DeviceLostError as error:
        print(f"{parser.prog}: {error}; nothing more can run on it in this process", file=sys.stderr)
        return 1
    except StoreError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


def _target() -> str | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    return name if name in TARGETS else None


def _known() -> str:
    return ", ".join(name for name in TARGETS if name.startswith("sm"))


def shapes(kernel: str) -> list[Case]:
    """The cases of the kernel benchmark in which it is timed."""
    groups = kernel_groups("default", "cuda")
    return [group.cases[0] for group in groups if group.cases[0].model in SPACES[kernel].operators]


class WithTile(Rotation):
    """A rotation of calls that launch a kernel with another tile."""

    def __init__(
        self, kernel: str, candidate: Candidate, calls: Sequence[Call], other: torch.Tensor | None
    ) -> None:
        super().__init__(calls, other)
        self.kernel, self.candidate = kernel, candidate

    def __call__(self) -> object:
        with changing(self.kernel, self.candidate):
            return super().__call__()


class Search:
    """Times candidates and keeps what it finds in a folder.

    Args:
        effort: how long to time the best of a shape.

    Raises:
        StoreError: if the folder cannot be written.
    """

    def __init__(self, folder: Path, effort: Effort) -> None:
        self.store, self.effort = RunStore(folder), effort
        self.store.claim()
        self.rounds, self.tiles = folder / "rounds.jsonl", folder / "tiles.jsonl"
        for path in (self.rounds, self.tiles):
            make_appendable(path)
        self._done = finished(self.store.read())

    def run(self, kernels: Iterable[str], target: str) -> None:
        """Search for all of some kernels, but for the shapes that are done.

        Raises:
            DeviceLostError: if a tile leaves the device unusable; the next search of this folder passes it over.
        """
        for kernel in kernels:
            cases = [case for case in shapes(kernel) if not self.has(kernel, case)]
            tiles = self.fitting(kernel, target) if cases else []
            for case in cases:
                self.measure(kernel, case, tiles)

    def has(self, kernel: str, case: Case) -> bool:
        """Whether this source was searched on this machine already."""
        return _tried(case, kernel, CHOSEN).key() in self._done

    def fitting(self, kernel: str, target: str) -> list[Candidate]:
        """What is worth timing, by the compiler."""
        print(f"compile {kernel}", flush=True)
        fits = []
        for one in fitting(kernel, target, device_of(torch.empty(0, device="cuda"))):
            _append(self.tiles, {"kernel": kernel, "target": target, **asdict(one)})
            fits.append(one)
        found = to_time(kernel, fits)
        print(f"  {len(found)} to time, of {len(fits)} compiled", flush=True)
        return found

    def measure(self, kernel: str, case: Case, tiles: Sequence[Candidate]) -> None:
        """Time tiles on one shape.

        Raises:
            DeviceLostError: if one of them leaves the device unusable.
        """
        print(f"{case.model} {_where(case)}", flush=True)
        environment(case.device)  # known from now on: a device that is lost would not tell
        subject = Subject(case)
        steps = self._steps(kernel, case, subject, tiles)
        first = self._time(kernel, case, steps, FIRST).samples
        medians = {name: summarize(samples).median for name, samples in first.items()}
        _append(self.rounds, {"kernel": kernel, "operator": case.model, **case.options, "seconds": medians})
        best = sorted(medians, key=medians.__getitem__)[:FINALISTS]
        turns = self._time(
            kernel, case, {name: steps[name] for name in dict.fromkeys([CHOSEN, *best])}, self.effort
        )
        for name, samples in turns.samples.items():
            self.store.append(_timed(_tried(case, kernel, name), samples, turns, subject.floor_bytes))

    def _steps(self, kernel: str, case: Case, subject: Subject, tiles: Sequence[Candidate]) -> dict[str, Rotation]:
        """The chosen tile's step, and those of the tiles that compute the same; all on the same operands."""
        calls = ours(case.model, subject.fresh(copies(case, subject.floor_bytes)))
        other = other_operand(case, subject.floor_bytes)
        steps = {CHOSEN: Rotation(calls, other)}
        for tile in tiles:
            outcome = Outcome(_tried(case, kernel, tile.name))
            if outcome.key in self._done:  # wrong, or worse, before
                continue
            _check(outcome, kernel, tile, subject)
            if outcome.status == "ok":
                steps[tile.name] = WithTile(kernel, tile, calls, other)
            else:
                self._give_up(outcome)
        return steps

    def _time(self, kernel: str, case: Case, steps: dict[str, Rotation], effort: Effort) -> Turns:
        device = torch.device(case.device)
        turns = time_in_turns(steps, device, effort, cold_clock(device))
        for name, error in turns.failures.items():  # in their order: if the device is lost, the first lost it
            outcome = Outcome(_tried(case, kernel, name))
            outcome.fail(error)
            self._give_up(outcome)
        return turns

    def _give_up(self, outcome: Outcome) -> None:
        """Keep what became of a tile that has no time; where it took the device with it, end."""
        said = release_memory(outcome.case.device)
        if said is None:
            self.store.append(outcome.record())
            return
        error = DeviceLostError(outcome.case, said)
        outcome.end("crash", str(error))
        self.store.append(outcome.record())
        raise error


def _check(outcome: Outcome, kernel: str, tile: Candidate, subject: Subject) -> None:
    """Call it once, on fresh operands."""
    try:
        with changing(kernel, tile):
            verdict = subject.judge(subject.first_results("ours"))
    except Exception as error:  # what does not start is a result, too
        outcome.fail(error)
        return
    if verdict.wrong is not None:
        outcome.end("incorrect", verdict.wrong)


def _timed(case: Case, samples: Sequence[float], turns: Turns, floor_bytes: int) -> Record:
    outcome, timing = Outcome(case), summarize(samples)
    noise = unsteady(timing)
    if noise is not None:
        outcome.doubt("noisy", noise)
    outcome.fields |= {"time_s": timing, "turns": turns.token, "bytes_moved": floor_bytes}
    outcome.fields["group"] = f"{case.model} {_where(case)}"
    return outcome.record()


def _tried(case: Case, kernel: str, name: str) -> Case:
    return replace(case, options={**case.options, "kernel": kernel, "tile": name})


def _where(case: Case) -> str:
    return " ".join(f"{name} {case.options[name]}" for name in ("block", "layer") if name in case.options)


def _append(path: Path, line: dict[str, object]) -> None:
    append_durably(path, (json.dumps(line, sort_keys=True) + "\n").encode())


def table(records: Sequence[Record]) -> str:
    """The chosen tile's time on each shape, what the best others take of it, and what went wrong."""
    lines = []
    for chosen in records:
        if chosen.case.options.get("tile") != CHOSEN or chosen.time_s is None:
            continue
        rate = (chosen.bytes_moved or 0) / chosen.time_s.median / 1e9
        lines.append(f"{chosen.group}: {chosen.time_s.median * 1e6:.1f} us, {rate:,.0f} GB/s at least")
        others = []
        for one in records:
            ratio = None if one is chosen else ratio_of(one, chosen)
            if ratio is not None:
                others.append((ratio.median, f"({ratio.low:.2f} to {ratio.high:.2f}) {one.case.options['tile']}"))
        lines += [f"    {median:.2f} of the time {words}" for median, words in sorted(others)]
    wrong = [one for one in records if one.time_s is None]
    words = [f"{one.case.model} {_where(one.case)}, {one.case.options['tile']}: {one.status}" for one in wrong]
    return "\n".join([*lines, *(f"{what}: {one.reason}" for what, one in zip(words, wrong, strict=True))])


if __name__ == "__main__":
    sys.exit(main())
