"""The gate: it fails for what got worse beyond tolerance, slack and noise, and for nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from densebench.records import Record
from densebench.report.__main__ import main
from densebench.report.gate import Tolerance, ToleranceError, compare, interval, parse_tolerance
from tests.report.records import GIB, MIB, make_case, make_record, timed, timing_of, write

TOLERANCE = Tolerance(0.02, 0.10)
STEADY = [0.1 + 0.0002 * (i % 5) for i in range(20)]


def _record(bytes: int = GIB, slowdown: float = 1.0, strategy: str = "fused") -> Record:
    return timed(make_case(strategy), bytes, [slowdown * sample for sample in STEADY])


def _found(old: Record, new: Record, tolerance: Tolerance = TOLERANCE) -> list[str]:
    return [regression.what for regression in compare([old], [new], tolerance).regressions]


@pytest.mark.parametrize(
    ("bytes", "slowdown", "found"),
    [
        (GIB, 1.0, []),
        (int(1.019 * GIB), 1.09, []),
        (int(1.03 * GIB), 1.0, ["memory"]),
        (GIB, 1.12, ["time"]),
        (int(1.5 * GIB), 2.0, ["memory", "time"]),
        (GIB // 2, 0.5, []),
    ],
)
def test_worse_than_tolerated(bytes: int, slowdown: float, found: list[str]) -> None:
    assert _found(_record(), _record(bytes, slowdown)) == found


def test_only_what_was_asked_for_is_compared() -> None:
    worse = _record(2 * GIB, 2.0)
    assert _found(_record(), worse, Tolerance(0.02, None)) == ["memory"]
    assert _found(_record(), worse, Tolerance(None, 0.1)) == ["time"]


def test_slack_forgives_what_is_nothing_in_absolute_terms() -> None:
    assert _found(_record(MIB), _record(2 * MIB - 1)) == []
    assert _found(_record(MIB), _record(3 * MIB)) == ["memory"]


def test_noise_is_no_regression() -> None:
    wild = timed(make_case("fused"), GIB, [0.09, 0.15] * 10)
    assert wild.time_s is not None
    assert wild.time_s.median > 1.1 * _record().time_s.median  # type: ignore[union-attr]
    assert _found(_record(), wild) == []


def test_intervals_of_few_and_of_no_samples() -> None:
    few = timing_of([0.1, 0.3, 0.2])
    assert interval(few) == (0.1, 0.3)
    assert interval(dataclasses.replace(few, samples=())) == (few.q1, few.q3)
    low, high = interval(timing_of(STEADY))
    assert 0.1 <= low <= high <= 0.1008


def test_what_no_longer_ends_well() -> None:
    failed = make_record(make_case("fused"), "oom", reason="CUDA out of memory")
    assert _found(_record(), failed) == ["failed"]
    assert _found(failed, _record()) == []
    assert _found(failed, failed) == []


def test_what_disappeared() -> None:
    other = _record(strategy="naive")
    verdict = compare([_record(), other], [other], TOLERANCE)
    assert [r.what for r in verdict.regressions] == ["disappeared"]
    assert "fused" in verdict.regressions[0].label
    assert compare([other], [_record(), other], TOLERANCE).regressions == ()
    untimed = dataclasses.replace(_record(), time_s=None)
    assert _found(_record(), untimed) == ["disappeared"]


@pytest.mark.parametrize("text", ["", "mem", "mem:2", "mem:-2%", "mem:2%,mem:3%", "speed:2%", "mem:2%;time:1%"])
def test_what_is_no_tolerance(text: str) -> None:
    with pytest.raises(ToleranceError, match="mem:2%,time:10%"):
        parse_tolerance(text)


def test_tolerances() -> None:
    assert parse_tolerance("mem:2%,time:10%") == TOLERANCE
    assert parse_tolerance("time:12.5%") == Tolerance(None, 0.125)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write([_record(), _record(strategy="naive")], tmp_path / "old" / "cases.jsonl")
    worse = write([_record(2 * GIB)], tmp_path / "worse" / "cases.jsonl")
    empty = write([], tmp_path / "empty" / "cases.jsonl")
    assert main(["--compare", str(old.parent), str(old)]) == 0
    assert "2 cases compared: no regression" in capsys.readouterr().out
    assert main(["--compare", str(old), str(worse), "--fail-on", "mem:2%"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("memory") and "1,024.0 MiB -> 2,048.0 MiB (+100.0%)" in line for line in lines)
    assert any(line.startswith("disappeared") and "naive" in line for line in lines)
    assert lines[-1] == "1 case compared: 2 regressions (mem:2%)"
    assert main(["--compare", str(old), str(empty)]) == 3
    assert main(["--compare", str(empty), str(old)]) == 3
    assert main(["--compare", str(old), str(old), "--fail-on", "nonsense"]) == 2
    assert "cannot read 'nonsense'" in capsys.readouterr().err


def test_another_device_is_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = dataclasses.replace(_record(), environment={"device": "Another GPU"})
    old = write([_record()], tmp_path / "old.jsonl")
    new = write([moved], tmp_path / "new.jsonl")
    assert main(["--compare", str(old), str(new)]) == 0
    assert "old ran on Synthetic GPU, new on Another GPU" in capsys.readouterr().err
