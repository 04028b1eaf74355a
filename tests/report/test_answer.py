"""The answer: it says what the records say, and no more."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import pytest

from densebench.records import Record
from densebench.report.answer import Answer, answer
from densebench.report.comparison_tables import elsewhere_table
from densebench.report.selection import comparisons
from densebench.report.style import Roster
from densebench.report.tables import Table
from densebench.statistics import time_ratio
from tests.report.conftest import Made
from tests.report.records import GIB, MIB, make_case, make_record, timed

CROSS = "\N{MULTIPLICATION SIGN}"


def _answer(records: Sequence[Record]) -> Answer:
    roster = Roster.of(records)
    return answer(comparisons(records, roster), comparisons(records, roster, "predicted"))


def _elsewhere(said: Answer) -> Table:
    assert said.comparison is not None
    return elsewhere_table(said.elsewhere, said.comparison.device)


def _pair(share: float, slowdown: float, **changes: object) -> list[Record]:
    samples = [0.1 + 0.001 * (i % 3) for i in range(20)]
    naive = timed(make_case("naive", **changes), GIB, samples)
    slower = [slowdown * sample for sample in samples]
    return [naive, timed(make_case("fused", **changes), int(share * GIB), slower)]


def test_numbers_are_the_ratios_of_the_records(gpu: Made) -> None:
    said = _answer([record for record in gpu.records if record.case.kind != "kernel"])
    assert said.winner is not None
    assert said.sentence in gpu.page
    own = [r for r in gpu.records if r.case == said.winner.record.case]
    naive = [r for r in gpu.records if r.case == dataclasses.replace(said.winner.record.case, strategy="naive")]
    (winner, base) = own[-1], naive[-1]
    assert winner.time_s is not None
    assert base.time_s is not None
    memory = (winner.peak_delta_bytes or 0) / (base.peak_delta_bytes or 1)
    time = time_ratio(winner.time_s.samples, base.time_s.samples).median
    assert re.findall(rf"([\d.]+){CROSS} the activation memory", said.sentence) == [f"{memory:.2f}"]
    assert re.findall(rf"in ([\d.]+){CROSS} its time", said.sentence) == [f"{time:.2f}"]
    for words in (winner.case.strategy, "batch 128", "bfloat16 autocast", "Synthetic GPU", "Training", "faster"):
        assert words in said.sentence


@pytest.mark.parametrize(
    ("share", "slowdown", "words"),
    [
        (0.4, 0.9, "(faster)"),
        (0.4, 1.0, "(the same within 3 %)"),
        (0.4, 1.2, "(slower)"),
        (0.4, 1.6, f"(slower); no strategy stays within 1.25{CROSS}"),
        (1.2, 0.9, "no strategy saves memory"),
    ],
)
def test_verdict_in_words(share: float, slowdown: float, words: str) -> None:
    said = _answer(_pair(share, slowdown)).sentence
    assert words in said
    assert f"{share:.2f}{CROSS} the activation memory" in said
    assert f"{slowdown:.2f}{CROSS} its time" in said


def test_undecided_is_said() -> None:
    naive, fused = _pair(0.5, 1.0)
    wild = timed(fused.case, GIB // 2, [0.08, 0.13] * 10)
    assert "undecided" in _answer([naive, wild]).sentence


def test_the_smallest_quick_strategy_wins_over_a_smaller_slow_one() -> None:
    naive, fused = _pair(0.4, 1.1)
    slow = timed(make_case("shared_buffer"), GIB // 5, [0.2] * 20)
    assert "fused needs 0.40" in _answer([naive, fused, slow]).sentence


@pytest.mark.parametrize(("slowdown", "winner"), [(0.9, "fused"), (1.0, "fused"), (1.1, "shared_buffer")])
def test_what_gives_up_nothing_wins_over_what_is_smaller_and_slower(slowdown: float, winner: str) -> None:
    naive, fused = _pair(0.4, slowdown)
    smaller = timed(make_case("shared_buffer"), GIB // 5, [0.115] * 20)
    assert f"{winner} needs" in _answer([naive, fused, smaller]).sentence


def test_what_saves_no_memory_is_not_the_answer_for_its_speed() -> None:
    naive, fused = _pair(1.2, 0.8)
    smaller = timed(make_case("shared_buffer"), GIB // 5, [0.115] * 20)
    assert "shared_buffer needs" in _answer([naive, fused, smaller]).sentence


def test_a_wrong_strategy_is_never_the_answer() -> None:
    naive, fused = _pair(0.4, 1.1)
    wrong = dataclasses.replace(fused, case=make_case("shared_buffer"), status="incorrect", peak_delta_bytes=MIB)
    said = _answer([naive, fused, wrong]).sentence
    assert "shared_buffer" not in said
    assert "fused needs" in said


def test_where_naive_does_not_fit_no_ratio_is_claimed() -> None:
    fused = _pair(0.4, 1.1)[1]
    said = _answer([make_record(make_case("naive"), "oom"), fused]).sentence
    assert "naive does not fit" in said
    assert CROSS not in said.replace(f"224{CROSS}224", "")


def test_doubts_are_said() -> None:
    naive, fused = _pair(0.4, 1.1)
    doubtful = dataclasses.replace(fused, status="noisy", throttled=True, shared_gpu=True)
    said = _answer([naive, doubtful]).sentence
    assert "take with care: fused is noisy, fused was throttled, the GPU was shared" in said


def test_not_timed_in_turns_is_no_ratio_of_times() -> None:
    naive, fused = _pair(0.4, 1.1)
    said = _answer([naive, dataclasses.replace(fused, group="another")]).sentence
    assert "not timed in turns" in said
    assert "its time" not in said


def test_predictions_are_called_so_and_count_only_where_nothing_ran() -> None:
    predicted = [dataclasses.replace(r, time_s=None) for r in _pair(0.4, 1.0, source="predicted", batch=512)]
    assert _answer(predicted).sentence.startswith("Predicted, not run: training DenseNet-121, batch 512")
    assert "batch 64" in _answer([*predicted, *_pair(0.5, 1.0)]).sentence


def test_each_device_has_its_line() -> None:
    both = [*_pair(0.4, 0.9), *_pair(0.6, 1.1, device="cpu", autocast=None)]
    said = _answer(both)
    assert "on Synthetic GPU" in said.sentence
    ((setting, strategy, bytes, share, time, verdict, device),) = _elsewhere(said).rows
    assert setting == f"Training step: DenseNet-121, batch 64 at 224{CROSS}224, float32"
    assert (strategy, share, verdict) == ("fused", f"0.60{CROSS}", "↓ slower")
    assert device == "Synthetic CPU (2 threads)"
    assert bytes == "614"  # MiB, of 1,024
    assert str(time).startswith(f"1.10{CROSS} (")


def test_every_setting_has_one_line_on_the_first_device() -> None:
    """Another machine has a line for what comes first there, and for what only it has measured."""
    other = {"device": "cpu"}
    said = _answer(
        [
            *_pair(0.80, 0.9, mode="infer", autocast=None, **other),
            *_pair(0.70, 0.9, autocast=None, **other),
            *_pair(0.60, 0.9, autocast="float16", **other),
            *_pair(0.50, 0.9, autocast=None),
            *_pair(0.40, 0.9, mode="infer", autocast=None),
            *_pair(0.30, 0.9),
        ]
    )
    assert f"0.30{CROSS} the activation memory" in said.sentence
    shares = [row[3] for row in _elsewhere(said).rows]
    assert shares == [f"{share}{CROSS}" for share in ("0.50", "0.40", "0.70", "0.60")]
    assert [row[-1] for row in _elsewhere(said).rows] == ["the same"] * 2 + ["Synthetic CPU (2 threads)"] * 2


def test_a_noisy_naive_is_told_elsewhere_too() -> None:
    naive, fused = _pair(0.6, 0.8, device="cpu", autocast=None)
    noisy = dataclasses.replace(naive, status="noisy")
    (line,) = _elsewhere(_answer([*_pair(0.4, 0.9), noisy, fused])).rows
    assert line[-2] == "↑ faster; naive noisy"


def test_of_several_runs_the_first_is_the_answer() -> None:
    """As the caller names them, whatever they are called."""
    runs = [_pair(share, 0.9, device="cpu", autocast=None) for share in (0.3, 0.4)]
    for (name, share), run in zip((("b", "0.30"), ("a", "0.40")), runs, strict=True):
        run[:] = [
            dataclasses.replace(r, run=name, environment=r.environment | {"device": f"Device {name}"}) for r in run
        ]
        assert f"{share}{CROSS} the activation memory" in _answer(run).sentence
    said = _answer([record for run in runs for record in run])
    assert f"0.30{CROSS} the activation memory" in said.sentence
    assert "Device b" in said.sentence


@pytest.mark.parametrize(("where", "share"), [("cpu", "0.30"), ("cuda", "0.20")])
def test_the_precision_that_is_usual_on_a_device_is_the_answer(where: str, share: str) -> None:
    wide, narrow = (_pair(s, 0.9, device=where, autocast=a) for s, a in ((0.3, None), (0.2, "bfloat16")))
    for records in ([*wide, *narrow], [*narrow, *wide]):
        assert f"{share}{CROSS} the activation memory" in _answer(records).sentence


def test_volumes_have_their_line_after_images() -> None:
    volumes = {"input_shape": (1, 512, 512, 512), "options": {"spatial_dims": 3, "in_channels": 1}}
    said = _answer([*_pair(0.3, 0.8, **volumes), *_pair(0.2, 0.9)])
    assert f"0.20{CROSS} the activation memory" in said.sentence
    (line,) = _elsewhere(said).rows
    assert f"0.30{CROSS}" in line
    assert "(3-D, 1 channel), batch" in str(line[0])
    assert CROSS.join(["512"] * 3) in str(line[0])


def test_without_records_nothing_is_claimed() -> None:
    assert "no comparison" in _answer([]).sentence
    lonely = timed(make_case("torchvision"), GIB, [0.1] * 5)
    assert "without a strategy" in _answer([lonely]).sentence
