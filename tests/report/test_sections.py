"""What the sections work out from the records, and that every column is explained."""

from __future__ import annotations

import dataclasses
import html
import re

import pytest

from densebench.records import Record
from densebench.report.blocks import Prose, Sheet
from densebench.report.comparison_tables import main_table, prediction_error
from densebench.report.context_sections import kernels_section
from densebench.report.deepest import deepest_blocks
from densebench.report.figure_prediction import LEAST_REACH, both, error_table, extent, prediction_picture, reach
from densebench.report.glossary import explain
from densebench.report.kernel_tables import operator_table, overview_table
from densebench.report.kernels import failures, machines, operators
from densebench.report.published import PUBLISHED, ours, published_table
from densebench.report.sections import naive_section, prediction_section
from densebench.report.selection import comparisons, naive_is_better
from densebench.report.style import Roster
from densebench.report.tables import Link, Table
from tests.report.conftest import Made
from tests.report.records import (
    CODE,
    GIB,
    MIB,
    gpu_run,
    kernel_records,
    make_case,
    make_record,
    timed,
)


def _cells(table: Table, row: str) -> dict[str, str]:
    line = next(line for line in table.rows if line[0] == row)
    return {name: str(cell) for name, cell in zip(table.columns, line, strict=True)}


def test_every_column_is_explained(gpu: Made) -> None:
    tables, glossary = (part.split('id="environment"')[0] for part in gpu.page.split('<section id="glossary"'))
    columns = {html.unescape(name) for name in re.findall(r'<th scope="col"[^>]*>([^<]+)</th>', tables)}
    assert len(columns) > 40
    own = {name.replace("_", " ") for name in CODE[0]}
    assert own <= columns
    explained = {html.unescape(name) for name in re.findall(r'<th scope="row">([^<]+)</th>', glossary)}
    assert {explain(column, column in own)[0] for column in columns} == explained


def test_a_column_without_an_entry_is_refused_but_in_the_table_of_a_file() -> None:
    """What a compiler's file holds is shown as it is; a column of ours without a meaning is a mistake."""
    for column in ("wgmma", "activation memory, MB", ""):
        with pytest.raises(KeyError, match=re.escape(repr(column))):
            explain(column)
    assert explain("wgmma", of_code=True) == ("wgmma", "Of the compiled kernel, as the compiler's output has it.")
    assert explain("loads", of_code=True)[1] == "Load instructions from global memory."


def _against_naive(share: float, slowdown: float) -> list[Record]:
    naive = timed(make_case(), GIB, [0.1] * 20)
    return [naive, timed(make_case("fused"), int(share * GIB), [slowdown * 0.1] * 20)]


@pytest.mark.parametrize(
    ("share", "slowdown", "better"),
    [(0.5, 1.2, True), (1.1, 1.0, True), (0.5, 1.0, False), (0.5, 0.9, False), (1.1, 0.9, False)],
)
def test_naive_is_better_where_no_strategy_gains(share: float, slowdown: float, better: bool) -> None:
    records = _against_naive(share, slowdown)
    found = comparisons(records, Roster.of(records))
    assert naive_is_better(found[0]) is better
    assert len(naive_section(found).tables()) == better


def test_every_error_of_the_prediction_is_there() -> None:
    records = [record for record in gpu_run() if record.case.kind == "step"]
    rows = both(comparisons(records, Roster.of(records)))
    known = [r for r in records if r.case.source == "measured" and prediction_error(r) is not None]
    assert len(error_table(rows).rows) == len(known) > 50
    record = known[0]
    measured = (record.peak_allocated_bytes or 0) - (record.workspace_bytes or 0)
    assert prediction_error(record) == pytest.approx((record.predicted_peak_bytes or 0) / measured - 1)


def _predicted(errors: dict[str, float], device: str = "cpu", mib: int = 100) -> list[Record]:
    """Steps measured on a device, with predictions that are off by so much."""
    records = [timed(make_case(name, device=device, autocast=None), mib * MIB, [0.1] * 5) for name in errors]
    return [
        dataclasses.replace(record, predicted_peak_bytes=round((record.peak_allocated_bytes or 0) * (1 + error)))
        for record, error in zip(records, errors.values(), strict=True)
    ]


def test_what_was_predicted_is_said_before_how_well() -> None:
    """How many cases, on what, up to which peak; and no error is minus zero."""
    own = _predicted({"naive": -0.00001, "fused": 0.002})
    section = prediction_section(comparisons(own, Roster.of(own)))
    assert isinstance(section.blocks[0], Prose)
    assert section.blocks[0].text == (
        "Both predicted and measured: 2 cases on 1 CPU, with peaks of up to 0.160 GiB; none on a GPU. "
        "The prediction is off by 0.00 % to +0.20 %."
    )
    (table,) = section.tables()
    assert [row[-1] for row in table.rows] == ["0.00 %", "+0.20 %"]
    both_kinds = [*own, *_predicted({"naive": 0.1}, "cuda", 4032)]
    rows = both(comparisons(both_kinds, Roster.of(both_kinds)))
    assert extent(rows) == (
        "2 cases on 1 CPU, with peaks of up to 0.160 GiB; 1 case on 1 GPU, with peaks of up to 4.00 GiB"
    )


def test_the_axis_of_errors_is_as_wide_as_they_are() -> None:
    for error, end, words in ((0.0001, LEAST_REACH, "whole axis"), (-0.2, 0.23, "shaded band")):
        records = _predicted({"naive": error, "fused": 0.0})
        rows = both(comparisons(records, Roster.of(records)))
        assert reach(rows) == pytest.approx(end)
        assert words in prediction_picture(rows).caption


def test_kernels_are_held_against_the_ceilings() -> None:
    records = kernel_records()
    operator = operators(records)[0]
    run = operator.by("ours")[0]
    assert run.gb_s == pytest.approx(800 / 1.25, rel=0.02)
    assert run.copy_share == pytest.approx(1 / 1.25, rel=0.02)
    assert run.ratio == pytest.approx(1.25 / 2.9, rel=0.02)
    assert run.rate_share == max(run.copy_share or 0, run.matmul_share or 0)
    assert len(operator_table(operator).rows) == 16
    assert _cells(overview_table(machines(records)[0]), "bn_relu_conv1x1")["contender"] == "ours"


def test_kernels_without_ceilings_have_no_shares() -> None:
    bare = [dataclasses.replace(r, environment={"device": "Synthetic GPU"}) for r in kernel_records()]
    table = operator_table(operators(bare)[0])
    assert "of copy rate" not in table.columns
    assert "GB/s" in table.columns


def test_kernels_that_failed_are_named() -> None:
    wrong = [
        dataclasses.replace(r, status="incorrect", reason="off by 0.1", time_s=None)
        for r in kernel_records()
        if r.case.strategy == "cudnn" and r.case.model == "bn_relu_pool"
    ]
    assert failures(wrong) == ("bn_relu_pool, cudnn: incorrect (off by 0.1), on 4 shapes",)
    assert failures(kernel_records()) == ()
    assert [type(block).__name__ for block in kernels_section(wrong, []).blocks] == ["Items"]


def test_published_figures_have_sources() -> None:
    table = published_table([])
    sources = [row[table.columns.index("source")] for row in table.rows]
    assert all(isinstance(cell, Link) and cell.url.startswith("https://") for cell in sources)
    assert {row[table.columns.index("ours")] for row in table.rows} == {"not run", "not comparable"}
    assert "our memory ratio" not in table.columns


def test_ours_beside_published_only_where_conditions_agree() -> None:
    titan = next(row.conditions for row in PUBLISHED if row.method == "DTR")
    same = _against_naive(0.5, 1.2)
    same = [dataclasses.replace(r, case=dataclasses.replace(r.case, batch=84, autocast=None)) for r in same]
    found = ours(titan, comparisons(same, Roster.of(same)))
    assert "1,024 → 512 MiB" in found.text
    peaks = [record.peak_allocated_bytes or 0 for record in reversed(same)]
    assert found.memory == pytest.approx(peaks[0] / peaks[1]) != pytest.approx(0.5)
    other = ours(titan, comparisons(_against_naive(0.5, 1.2), Roster.of(same)))
    assert "but batch 64 in bfloat16 autocast" in other.text
    assert "→" not in other.text
    inference = [dataclasses.replace(r, case=dataclasses.replace(r.case, mode="infer")) for r in same]
    assert ours(titan, comparisons(inference, Roster.of(same))).text == "not run"


def test_an_unknown_strategy_has_a_place_in_the_table() -> None:
    records = [*_against_naive(0.5, 1.2), timed(make_case("brand_new"), GIB // 4, [0.09] * 20)]
    table = main_table(comparisons(records, Roster.of(records))[0])
    assert _cells(table, "brand_new")["memory against naive"].startswith("0.25")
    assert _cells(table, "brand_new")["verdict"] == "↑ faster"


def test_deepest_networks() -> None:
    """By capacity; where the search ended before the memory did, the table says so."""

    def found(name: str, gib: int, depth: int, reason: str | None = None) -> Record:
        options = {"capacity_gib": gib, "depth": depth, "growth_rate": 40}
        case = make_case(name, kind="deepest", model="densenet_bc", batch=64, options=options)
        return dataclasses.replace(make_record(case), reason=reason)

    ended = found("fused", 80, 1000, "1000 layers fit; no deeper network was traced")
    records = [found("fused", 12, 742), found("naive", 80, 388), found("naive", 12, 130), ended]
    (sheet,) = deepest_blocks(records, Roster.of(records))
    assert isinstance(sheet, Sheet)
    table = sheet.table
    assert [row[0] for row in table.rows] == ["naive", "fused"]
    assert _cells(table, "naive") == {"contender": "naive", "12 GiB": "130", "80 GiB": "388"}
    assert _cells(table, "fused") == {"contender": "fused", "12 GiB": "742", "80 GiB": "1,000 or more"}
    assert "growth_rate=40" in table.caption
    assert "depth" not in table.caption


def test_a_search_that_other_runs_agree_with_is_one_table() -> None:
    """Answers stand in the case's options, where other runs have others: 742 layers here, 748 there, and 900."""

    def found(run: str, depth: int) -> Record:
        options = {"capacity_gib": 12, "depth": depth, "growth_rate": 40}
        case = make_case(kind="deepest", model="densenet_bc", batch=64, options=options)
        return dataclasses.replace(make_record(case), run=run)

    records = [found("one", 742), found("two", 748), found("three", 900)]
    blocks = deepest_blocks(records, Roster.of(records))
    assert [type(block) for block in blocks] == [Sheet, Prose, Sheet]
    assert "run one" in blocks[1].text  # type: ignore[union-attr]
    assert "same within 0.81 %: run two" in blocks[1].text  # type: ignore[union-attr]
