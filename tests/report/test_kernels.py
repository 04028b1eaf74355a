"""The section on kernels: one machine in sight, the others folded; what is said, and what the figure shows."""

from __future__ import annotations

import dataclasses
import itertools
import re

import matplotlib
import numpy as np
import pytest

from densebench.records import Record
from densebench.report.blocks import Block, Folded, Items, Plot, Prose, Sheet
from densebench.report.context_sections import kernels_section, run_facts
from densebench.report.drawing import NARROW, WIDE, canvas
from densebench.report.figure_kernels import LEAST, MOST, kernels_picture, paint_kernels
from densebench.report.kernel_tables import operator_table
from densebench.report.kernel_words import beyond, clauses, code_words, finding
from densebench.report.kernels import Machine, machines
from densebench.report.style import PAPER, RC
from densebench.report.units import CROSS
from tests.report.records import CODE, kernel_records


def _on(device: str, matmul: float = 100.0) -> list[Record]:
    facts = {"device": device, "ceilings": {"copy_gb_s": 800.0, "matmul_tflops": matmul}}
    return [dataclasses.replace(record, environment=facts, run=device) for record in kernel_records()]


def _slowed(records: list[Record], contender: str, factor: float) -> list[Record]:
    """The same with a contender so many times as slow."""

    def slow(record: Record) -> Record:
        timing = record.time_s
        assert timing is not None
        times = {name: factor * getattr(timing, name) for name in ("median", "q1", "q3")}
        samples = tuple(factor * sample for sample in timing.samples)
        return dataclasses.replace(record, time_s=dataclasses.replace(timing, samples=samples, **times))

    return [slow(record) if record.case.strategy == contender else record for record in records]


def _one(records: list[Record]) -> Machine:
    (machine,) = machines(records)
    return machine


def _prose(blocks: tuple[Block, ...]) -> str:
    return " ".join(block.text for block in blocks if isinstance(block, Prose))


def test_the_first_machine_is_in_sight_and_the_others_are_folded() -> None:
    blocks = kernels_section([*_on("Machine B"), *_on("Machine A")], CODE).blocks
    plots = [block for block in blocks if isinstance(block, Plot)]
    assert len(plots) == 1
    assert "Machine B" in plots[0].picture.svg
    assert "Machine A" not in plots[0].picture.svg
    (other,) = [block for block in blocks if isinstance(block, Folded) and block.summary.startswith("Machine A")]
    assert [block.picture.name for block in other.blocks if isinstance(block, Plot)] == ["kernels-2"]
    assert not any(isinstance(block, Sheet) for block in blocks)


def test_the_machine_is_in_the_caption_and_not_in_each_row() -> None:
    blocks = kernels_section([*_on("Machine B"), *_on("Machine A")], []).blocks
    (plot,) = [block for block in blocks if isinstance(block, Plot)]
    assert not plot.open
    table = plot.picture.table
    assert "Machine B" in table.caption
    assert "Machine" not in str(table.rows)
    assert len(table.rows) == 2 * 4, "two operators, four contenders, one machine"


def test_what_lies_beyond_the_axis_is_at_its_edge_with_its_number() -> None:
    slow = _slowed(_on("Machine"), "compiled", 20.0)
    with matplotlib.rc_context(RC):
        for width in (WIDE, NARROW):
            figure = paint_kernels(_one(slow), width).figure
            ratio = figure.axes[1]
            assert ratio.get_xscale() == "log"
            low, high = ratio.get_xlim()
            assert LEAST / 1.1 < low < 1 < high < 1.1 * MOST
            assert max(np.max(line.get_xdata(), initial=0.0) for line in ratio.get_lines()) == MOST
            texts = [text.get_text() for text in ratio.texts]
            assert any(re.fullmatch(rf"→ 12\.\d\d{CROSS} to 12\.\d\d{CROSS}", text) for text in texts), texts


def test_the_axis_is_no_wider_than_the_data() -> None:
    with matplotlib.rc_context(RC):
        low, high = paint_kernels(_one(_on("Machine"))).figure.axes[1].get_xlim()
    assert 0.38 < low < 1.25 / 2.9
    assert 1.25 < high < 1.4


def test_axes_are_named_at_both_ends() -> None:
    with matplotlib.rc_context(RC):
        figure = paint_kernels(_one(_on("Machine"))).figure
        figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_xlabel() in [text.get_text() for text in axes.texts]
        ticks = axes.xaxis.get_major_ticks()
        assert ticks
        assert all(tick.label2.get_visible() and tick.label2.get_text() for tick in ticks)


@pytest.mark.parametrize("inches", [0.4, 1.0, 2.0, 4.0])
def test_labels_of_ticks_keep_apart(inches: float) -> None:
    choices = [[at * step for at in range(round(2 / step) + 1)] for step in (0.1, 0.25, 0.5, 1)] + [[1.0]]
    with matplotlib.rc_context(RC):
        page = canvas("title", "setting", 2.0, WIDE)
        axes = page.place(1, 0.5, WIDE - 1 - inches)
        axes.set_xlim(0, 2)
        page.label_ticks(axes, choices, lambda value: f"{100 * value:.0f} %")
        page.figure.canvas.draw()
        boxes = [tick.label1.get_window_extent() for tick in axes.xaxis.get_major_ticks()]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert inches < 4 or len(boxes) > 3, "a wide axis has more ticks"


def test_shares_above_100_percent_are_owned_up_to() -> None:
    assert beyond(_one(_on("Machine"))) is None
    machine = _one(_on("Machine", matmul=20.0))
    shares = [run.matmul_share for run in machine.runs if run.matmul_share is not None]
    over = [value for value in shares if value > 1]
    assert 0 < len(over) < len(shares)
    said = beyond(machine) or ""
    assert f"{len(over)} of {len(shares)} records" in said
    assert f"up to {100 * max(over):.0f} %" in said
    assert "no bound of the machine" in said
    assert said in _prose(kernels_section(_on("Machine", matmul=20.0), []).blocks)


def test_nothing_measured_is_called_a_ceiling() -> None:
    section = kernels_section(_on("Machine"), CODE)
    picture = kernels_picture(_one(_on("Machine")))
    assert picture is not None
    words = (
        f"{_prose(section.blocks)} {picture.svg} {picture.caption} {section.tables()} {run_facts(_on('Machine'))}"
    )
    assert "ceiling" not in words
    assert "copy 800 GB/s and matmul 100 TFLOP/s" in picture.caption


def test_noisy_times_are_hollow_and_noted() -> None:
    quiet = _on("Machine")
    at = next(i for i, record in enumerate(quiet) if record.case.strategy == "ours")
    noisy = [*quiet]
    noisy[at] = dataclasses.replace(quiet[at], status="noisy")
    for records, count in ((quiet, 0), (noisy, 1)):
        machine = _one(records)
        picture = kernels_picture(machine)
        assert picture is not None
        assert picture.caption.endswith(" Hollow: noisy.") == bool(count)
        hollow = [
            len(line.get_xdata())
            for axes in paint_kernels(machine).figure.axes
            for line in axes.lines
            if line.get_markerfacecolor() == PAPER
        ]
        assert sum(hollow) == 2 * count  # in each panel
        cells = [cell for one in machine.operators for row in operator_table(one).rows for cell in row]
        assert cells.count("noisy") == count


def test_the_section_begins_with_what_was_found() -> None:
    lead = kernels_section(_on("Machine"), []).blocks[0]
    assert isinstance(lead, Prose)
    assert lead.text == finding(_one(_on("Machine")))
    assert lead.text.startswith(
        f"The fused bn_relu_conv1x1 (batch norm, ReLU and 1{CROSS}1 convolution) takes 0.43{CROSS} the time"
    )
    assert "on Machine" in lead.text
    assert f"median of 4 shapes, 0.43{CROSS} to 0.43{CROSS}" in lead.text
    assert "less time than eager on 8 of 8 shapes." in lead.text
    worse = finding(_one(_slowed(_on("Machine"), "ours", 4.0))) or ""
    assert "on 0 of 8 shapes, and on the others up to 1.7" in worse


def test_a_backward_and_given_statistics_are_told_of() -> None:
    backward = [
        dataclasses.replace(r, case=dataclasses.replace(r.case, model=f"{r.case.model}_backward", mode="train"))
        for r in _on("Machine")
    ]
    given = [
        dataclasses.replace(r, case=dataclasses.replace(r.case, strategy="given_statistics"))
        for r in _on("Machine")
        if r.case.strategy == "cudnn"
    ]
    said = finding(_one([*_on("Machine"), *given, *backward])) or ""
    assert f"; its backward 0.43{CROSS} (median of 4 shapes" in said
    assert f"against given_statistics, which is given them too, bn_relu_conv1x1 takes 0.78{CROSS} the time" in said


def test_every_contender_that_occurs_has_a_clause_and_no_other() -> None:
    found = machines(_on("Machine"))
    assert [line.split(":")[0] for line in clauses(found)] == ["ours", "eager", "compiled", "cudnn"]
    items = [block for block in kernels_section(_on("Machine"), []).blocks if isinstance(block, Items)]
    assert items[0].items == clauses(found)


def test_rates_have_three_digits_and_a_unit() -> None:
    facts = {"ceilings": {"copy_gb_s": 27.336699659645262, "matmul_tflops": 0.42330112500048384}, "load": 0.123456}
    found = run_facts([dataclasses.replace(kernel_records()[0], environment=facts)])
    assert found["copy by PyTorch"] == "27.3 GB/s"
    assert found["matmul by PyTorch"] == "0.423 TFLOP/s"
    assert found["load"] == "0.123"


def test_the_compiled_code_is_folded_beneath_a_sentence() -> None:
    blocks = kernels_section(_on("Machine"), CODE).blocks
    (code,) = [block for block in blocks if isinstance(block, Folded) and "Machine code" in block.summary]
    assert _prose(code.blocks) == code_words(CODE, timed=True)
    assert "1 GPU kernel in 1 configuration for sm_90" in code_words(CODE, timed=True)
    assert "none of 1 spills registers" in code_words(CODE, timed=True)
    spilling = [*CODE, CODE[0] | {"spill_bytes": 8}, CODE[0] | {"spill_bytes": 80}]
    assert "2 of 3 spill registers" in code_words(spilling, timed=False)
    assert "None of them was timed" in code_words(spilling, timed=False)


def test_one_name_in_two_modes_is_two_operators() -> None:
    again = [dataclasses.replace(r, case=dataclasses.replace(r.case, mode="infer")) for r in _on("Machine")]
    machine = _one([*_on("Machine"), *again])
    titles = [machine.title(operator) for operator in machine.operators]
    assert titles[0] == "bn_relu_conv1x1 (forward)"
    assert len(set(titles)) == len(titles) == 4
