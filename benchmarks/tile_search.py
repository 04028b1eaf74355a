"""`python -m benchmarks.tile_search OUT`: what kernels take on this GPU with other tiles than their files choose.

Every tile that compiles without a spill and fits is checked against float64 and timed on the shapes of the kernel
benchmark, a few times each and in turns; the best of a shape then again beside the chosen one, for longer.
OUT/cases.jsonl has records of those, and of tiles that were wrong, after every shape; OUT/tiles.jsonl what became
of each tile at the compiler; OUT/rounds.jsonl the first times. A shape that is there already is passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import kernel_cache, tile_candidates
from benchmarks.kernel_cache import Rotation, cold_clock, copies, other_operand
from benchmarks.kernel_calls import ours
from benchmarks.kernel_cases import kernel_effort, kernel_groups
from benchmarks.kernel_runs import Subject
from benchmarks.tile_candidates import SPACES, Candidate, Fit, candidates, compile_all, to_time
from benchmarks.tile_trial import Trial
from densebench.kernels.launch import device_of
from densebench.kernels.offline import TARGETS
from densebench.kernels.tiling import changing
from densebench.measure.device import DeviceLostError, release_memory, tune
from densebench.measure.environment import environment
from densebench.measure.outcome import Outcome
from densebench.measure.resume import finished
from densebench.measure.timing import Effort, Turns, time_in_turns
from densebench.records import Case, Record
from densebench.statistics import ratio_of, summarize, unsteady
from densebench.store import RunStore, StoreError, append_durably, make_appendable

CHOSEN = "chosen"
FIRST = Effort(rounds=5, seconds=0.5, least=5)
FINALISTS = 6
HANGS_AFTER = 60.0  # seconds; a kernel that hangs cannot be interrupted
DEAD = "nothing more can run on it in this process"
# A record tells the source of densebench apart; this, how its candidates were searched.
SEARCH = hashlib.sha256(
    b"".join(Path(file or "").read_bytes() for file in (__file__, tile_candidates.__file__, kernel_cache.__file__))
).hexdigest()[:8]


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
    if options.show and not options.out.is_dir():
        parser.error(f"there is no folder {options.out}")
    try:
        if target is not None and not options.show:
            tune("cuda")
            search = Search(options.out, kernel_effort("default", "cuda"))
            search.run(kernels, target)
            search.store.release()
    except DeviceLostError as error:
        print(f"{parser.prog}: {error}; {DEAD}", file=sys.stderr)
        return 1
    except StoreError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    finally:  # also of what an interrupt has left
        if options.out.is_dir():
            print(table(RunStore(options.out).read()), flush=True)
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
    """The calls of another rotation with another tile; whoever is next takes the operands used longest ago."""

    def __init__(self, kernel: str, candidate: Candidate, rotation: Rotation) -> None:
        super().__init__(rotation.calls, rotation.other)
        self.kernel, self.candidate = kernel, candidate
        self._next = rotation._next

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
        ended = [record.case.options for record in self._done.values() if record.status in ("crash", "timeout")]
        self._deadly = {(options["kernel"], options["tile"]) for options in ended}

    def run(self, kernels: Iterable[str], target: str) -> None:
        """Search for all of some kernels, but for the shapes that are done.

        Raises:
            DeviceLostError: if a tile leaves the device unusable; the next search of this folder passes it over.
        """
        wanted = {kernel: [case for case in shapes(kernel) if not self.has(kernel, case)] for kernel in kernels}
        found = self.compiled([kernel for kernel, cases in wanted.items() if cases], target)
        for kernel, cases in wanted.items():
            for case in cases:
                try:
                    self.measure(kernel, case, to_time(kernel, found[kernel]))
                except (DeviceLostError, StoreError):
                    raise
                except Exception as error:  # the other shapes have their turn
                    outcome = Outcome(_tried(case, kernel, CHOSEN))
                    outcome.fail(error)
                    self._give_up(outcome)

    def has(self, kernel: str, case: Case) -> bool:
        """Whether this source was searched on this machine already."""
        return _tried(case, kernel, CHOSEN).key() in self._done

    def compiled(self, kernels: Sequence[str], target: str) -> Mapping[str, list[Fit]]:
        """Every candidate of some kernels; what is timed later is in Triton's cache then."""
        found: dict[str, list[Fit]] = {kernel: [] for kernel in kernels}
        tasks = [(kernel, candidate) for kernel in kernels for candidate in candidates(kernel)]
        print(f"compile {len(tasks)} tiles of {', '.join(kernels)}", flush=True)
        for kernel, one in compile_all(tasks, target, device_of(torch.empty(0, device="cuda"))) if tasks else ():
            _append(self.tiles, {"kernel": kernel, "target": target, "search": SEARCH, **asdict(one)})
            found[kernel].append(one)
        for kernel, fits in found.items():
            print(f"  {kernel}: {len(to_time(kernel, fits))} to time, of {len(fits)}", flush=True)
        return found

    def measure(self, kernel: str, case: Case, tiles: Sequence[Candidate]) -> None:
        """Time tiles on one shape.

        Raises:
            DeviceLostError: if one of them leaves the device unusable.
        """
        print(f"{case.model} {_where(case)}", flush=True)
        environment(case.device)  # known from now on: a device that is lost would not tell
        subject = Subject(case)
        trial = Trial(kernel, subject)
        chosen = Outcome(_tried(case, kernel, CHOSEN))
        if not self._passes(chosen, trial, None):
            return
        calls = ours(case.model, subject.fresh(copies(case, subject.floor_bytes)))
        steps = {CHOSEN: Rotation(calls, other_operand(case, subject.floor_bytes))}
        by_name = {tile.name: tile for tile in tiles if not self._is_known(kernel, case, tile)}
        for name, tile in by_name.items():
            if self._passes(Outcome(_tried(case, kernel, name)), trial, tile):
                steps[name] = WithTile(kernel, tile, steps[CHOSEN])
        first = self._time(kernel, case, steps, FIRST).samples
        medians = {name: summarize(samples).median for name, samples in first.items()}
        line = {"kernel": kernel, "operator": case.model, "search": SEARCH, **case.options, "seconds": medians}
        _append(self.rounds, line)
        best = [name for name in sorted(medians, key=medians.__getitem__) if name != CHOSEN][:FINALISTS]
        turns = self._time(kernel, case, {name: steps[name] for name in (CHOSEN, *best)}, self.effort)
        for name in [*best, CHOSEN]:  # the chosen one last: with it the shape is done
            outcome = Outcome(_tried(case, kernel, name))
            if name in turns.samples and self._passes(outcome, trial, by_name.get(name)):
                self.store.append(_timed(outcome, turns, name, subject.floor_bytes))

    def _is_known(self, kernel: str, case: Case, tile: Candidate) -> bool:
        """Whether a tile has been wrong here, or has ended a process anywhere."""
        record = self._done.get(_tried(case, kernel, tile.name).key())
        return (kernel, tile.name) in self._deadly or (record is not None and record.time_s is None)

    def _passes(self, outcome: Outcome, trial: Trial, tile: Candidate | None) -> bool:
        """Whether a tile computes what it should, once, on fresh operands; if not, that is kept."""
        with self._ending_what_hangs(outcome):
            try:
                wrong = trial.fault(tile)
                if wrong is not None:
                    outcome.end("incorrect", wrong)
            except Exception as error:  # what does not start is a result, too
                outcome.fail(error)
        if outcome.status == "ok":
            return True
        self._give_up(outcome)
        return False

    @contextmanager
    def _ending_what_hangs(self, outcome: Outcome) -> Iterator[None]:
        """End the process, with a record, if this is not over in time."""

        def end() -> None:
            outcome.end("timeout", f"not finished after {HANGS_AFTER:g} s")
            self.store.append(outcome.record())
            print(f"{outcome.case.options['tile']} hangs; {DEAD}", file=sys.stderr, flush=True)
            os._exit(1)

        timer = threading.Timer(HANGS_AFTER, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _time(self, kernel: str, case: Case, steps: Mapping[str, Rotation], effort: Effort) -> Turns:
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


def _timed(outcome: Outcome, turns: Turns, name: str, floor_bytes: int) -> Record:
    timing = summarize(turns.samples[name])
    noise = unsteady(timing)
    if noise is not None:
        outcome.doubt("noisy", noise)
    outcome.fields |= {"time_s": timing, "turns": turns.token, "bytes_moved": floor_bytes}
    outcome.fields["group"] = f"{outcome.case.model} {_where(outcome.case)}"
    return outcome.record()


def _tried(case: Case, kernel: str, name: str) -> Case:
    return replace(case, options={**case.options, "kernel": kernel, "tile": name, "search": SEARCH})


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
    for one in records:
        if one.time_s is None:
            where = f"{one.case.model} {_where(one.case)}, {one.case.options.get('tile')}"
            lines.append(f"{where}: {one.status}: {one.reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
