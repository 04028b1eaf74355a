"""What is compared with what: rows of one setting, timed in the same turns, and nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from densebench import contenders
from densebench.models import build_model
from densebench.records import Record
from densebench.report.console import summary_table
from densebench.report.selection import Comparison, comparisons, ladders
from densebench.report.style import Roster
from tests.report.records import MIB, make_case, make_record, timed


def found(records: list[Record]) -> list[Comparison]:
    return comparisons(records, Roster.of(records))


def ratios(comparison: Comparison) -> dict[str, float | None]:
    return {row.name: round(row.time_ratio.median, 3) if row.time_ratio else None for row in comparison.rows}


def plain_and_graphed() -> list[Record]:
    """Graphed, naive is the fastest of all."""
    records = []
    for graph, group, times in ((False, "plain", (0.2, 0.1)), (True, "graphed", (0.05, 0.04))):
        for name, seconds in zip(("naive", "fused"), times, strict=True):
            records.append(timed(make_case(name, cuda_graph=graph), MIB, [seconds] * 9, group))
    return records


def test_graphs_are_compared_with_graphs() -> None:
    plain, graphed = found(plain_and_graphed())
    assert ratios(plain) == {"naive": 1.0, "fused": 0.5}
    assert ratios(graphed) == {"naive (CUDA graph)": 1.0, "fused (CUDA graph)": 0.8}
    assert plain.title + ", as a CUDA graph" == graphed.title
    assert ladders([plain, graphed]) == []


def test_a_row_is_held_against_naive_of_its_own_group() -> None:
    """A group that was resumed has a naive of its own, or none: the faster one of elsewhere is no baseline."""
    records = [
        timed(make_case("naive"), MIB, [0.2] * 9, "one"),
        timed(make_case("fused"), MIB, [0.1] * 9, "one"),
        timed(make_case("naive", memory_format="contiguous"), MIB, [0.1] * 9, "two"),
        timed(make_case("shared_buffer"), MIB, [0.3] * 9, "two"),
        timed(make_case("checkpointed"), MIB, [0.3] * 9, "three"),
    ]
    (comparison,) = found(records)
    assert ratios(comparison) == {
        "naive": 1.0,
        "naive (contiguous)": 1.0,
        "fused": 0.5,
        "shared_buffer": 3.0,
        "checkpointed": None,
    }


def test_the_baseline_is_of_the_group_with_the_most_rows() -> None:
    records = [
        timed(make_case("naive"), MIB, [0.2] * 9, "one"),
        timed(make_case("fused"), MIB, [0.1] * 9, "one"),
        timed(make_case("naive", memory_format="contiguous"), MIB, [0.1] * 9, "two"),
    ]
    for order in (records, records[::-1]):
        baseline = found(order)[0].naive
        assert baseline is not None
        assert baseline.name == "naive"


def test_turns_of_different_runs_do_not_pair() -> None:
    naive = timed(make_case("naive"), MIB, [0.2] * 9)
    fused = timed(make_case("fused"), MIB, [0.1] * 9, turns="later")
    (comparison,) = found([naive, fused])
    assert ratios(comparison)["fused"] is None
    older = [dataclasses.replace(record, turns=None) for record in (naive, fused)]
    assert ratios(found(older)[0])["fused"] == 0.5


def tables(records: list[Record]) -> dict[str, list[str]]:
    """The console's tables: rows by title."""
    parts: dict[str, list[str]] = {}
    title = ""
    lines = iter(summary_table(records))
    for line in lines:
        if line:
            parts[title].append(line)
        else:
            title = next(lines)
            parts[title] = []
            next(lines)  # the columns
    return parts


def test_the_console_has_a_table_for_every_network() -> None:
    records = []
    for number, model in enumerate(("densenet121", "densenet201")):
        for name, seconds in (("naive", 0.2 - 0.1 * number), ("fused", 0.1)):
            records.append(timed(make_case(name, model=model), MIB, [seconds] * 9, model))
    records.append(timed(make_case("eager"), MIB, [0.05] * 9, "densenet121"))
    shown = tables(records)
    small, large = (f"train 64x224x224 bfloat16 cuda {model}" for model in ("densenet121", "densenet201"))
    assert list(shown) == [small, large]
    assert [line.split()[0] for line in shown[small]] == ["naive", "fused", "resnet50"]
    assert [line.split()[-2:] for line in shown[small][1:]] == [["0.50", "FAST"], ["0.25", "FAST"]]
    assert shown[large][1].split()[-2:] == ["1.00", "SAME"]


def test_the_console_shows_every_yardstick_beside_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_peers", dict(contenders._peers))
    yardstick = contenders.contender(
        "scale", summary="for scale", family="yardstick", models="vgg", network="vgg16", reference=None
    )
    yardstick(build_model)
    records = [timed(make_case(name), MIB, [0.1] * 9) for name in ("naive", "fused")]
    records.insert(0, timed(make_case("scale", model="vgg16"), MIB, [0.05] * 9))
    (rows,) = tables(records).values()
    assert [row.split()[0] for row in rows] == ["vgg16", "naive", "fused"]


def test_the_console_keeps_graphs_apart() -> None:
    shown = tables(plain_and_graphed())
    assert [title.endswith("as a CUDA graph densenet121") for title in shown] == [False, True]
    assert [rows[1].split()[-2:] for rows in shown.values()] == [["0.50", "FAST"], ["0.80", "FAST"]]


def test_the_console_knows_no_ratio_across_groups() -> None:
    records = [timed(make_case(name), MIB, [0.1] * 9, name) for name in ("naive", "fused")]
    (rows,) = tables(records).values()
    assert rows[1].split()[-1] == "640.0"  # images a second; then nothing


def test_the_console_shows_what_there_is_of_a_record_without_memory() -> None:
    only_timed = dataclasses.replace(timed(make_case(), MIB, [0.1] * 9), peak_delta_bytes=None)
    failed = make_record(make_case("fused"), "error", reason="it broke")
    (rows,) = tables([only_timed, failed, make_record(make_case("checkpointed"))]).values()
    assert [row.split() for row in rows] == [
        ["naive", "100.0", "640.0", "1.00"],
        ["fused", "error:", "it", "broke"],
        ["checkpointed", "ok:", "no", "figures"],
    ]


def of_two_runs(second_device: str) -> list[Record]:
    """Naive and fused twice: at 0.5 times naive's time in one run, at 0.8 in the other."""
    records = []
    for run, device, seconds in (("one", "machine A", 0.1), ("two", second_device, 0.16)):
        for name, taken in (("naive", 0.2), ("fused", seconds)):
            record = timed(make_case(name), MIB, [taken] * 9, environment={"device": device})
            records.append(dataclasses.replace(record, run=run, turns=run))
    return records


def test_runs_are_named_where_their_machines_do_not_tell_them_apart() -> None:
    settings = [comparison.setting for comparison in found(of_two_runs("machine A"))]
    assert [setting.rpartition(", ")[2] for setting in settings] == ["run one", "run two"]
    settings = [comparison.setting for comparison in found(of_two_runs("machine B"))]
    assert [setting.rpartition(", ")[2] for setting in settings] == ["machine A", "machine B"]


def test_runs_of_other_settings_need_no_names() -> None:
    """One device, images in one run and volumes in another: their titles differ as it is."""
    one, two = of_two_runs("machine A")[:2], of_two_runs("machine A")[2:]
    volumes: dict[str, Any] = {"input_shape": (1, 64, 64, 64), "options": {"spatial_dims": 3, "in_channels": 1}}
    two = [dataclasses.replace(record, case=dataclasses.replace(record.case, **volumes)) for record in two]
    settings = [comparison.setting for comparison in found([*one, *two])]
    assert [setting.rpartition(", ")[2] for setting in settings] == ["machine A", "machine A"]


def test_runs_that_predict_otherwise_are_named() -> None:
    one = make_record(make_case(source="predicted"), peak_delta_bytes=7, environment={"device": "machine A"})
    two = dataclasses.replace(one, run="two", peak_delta_bytes=8, environment={"device": "machine B"})
    titles = [c.title for c in comparisons([one, two], Roster.of([one, two]), "predicted")]
    assert [title.rpartition(", ")[2] for title in titles] == ["run synthetic", "run two"]


def test_the_console_keeps_runs_apart() -> None:
    lines = summary_table(of_two_runs("machine B"))
    title = "train 64x224x224 bfloat16 cuda densenet121"
    assert [line for line in lines if line in (title, "run one", "run two")] == [
        "run one", title, "run two", title
    ]  # fmt: skip
    assert [line.split()[-2:] for line in lines if line.startswith("fused")] == [
        ["0.50", "FAST"],
        ["0.80", "FAST"],
    ]
