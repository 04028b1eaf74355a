"""Runs that say nearly the same are one figure and a sentence; runs that do not have each their own."""

from __future__ import annotations

import dataclasses

import pytest

from densebench.records import Record
from densebench.report.agreement import gathered, once, same_words, within
from densebench.report.blocks import Plot, Prose, Section, Sheet
from densebench.report.depths import depth_groups
from densebench.report.figure_depth import fitted
from densebench.report.sections import depth_section, predicted_section, timeline_section
from densebench.report.style import Roster
from tests.report.records import MIB, full_size, make_case, make_record, power_law, timed, timelines


def of_run(records: list[Record], run: str, device: str, factor: float = 1.0) -> list[Record]:
    """The same records of another run, on another machine, with other activations."""
    found = []
    for record in records:
        delta = round(factor * (record.peak_delta_bytes or 0))
        found.append(dataclasses.replace(record, run=run, peak_delta_bytes=delta, environment={"device": device}))
    return found


def depths(names: tuple[str, ...] = ("naive", "fused"), at: tuple[int, ...] = (48, 96, 192)) -> list[Record]:
    return [power_law(name, depth, "predicted", device="cpu") for name in names for depth in at]


def shown(section: Section) -> tuple[int, list[str]]:
    """How many pictures and tables there are, and the sentences that tell of other runs."""
    said = [block.text for block in section.blocks if isinstance(block, Prose) and "other run" in block.text]
    return len([block for block in section.blocks if isinstance(block, Plot | Sheet)]), said


def test_runs_within_two_percent_are_one_figure() -> None:
    first, near = of_run(depths(), "one", "machine A"), of_run(depths(), "two", "machine B", 1.006)
    far = of_run(depths(), "three", "machine C", 1.05)
    records = [*first, *near, *far]
    plots, said = shown(depth_section(records, Roster.of(records)))
    assert plots == 2
    (sentence,) = said
    assert sentence.startswith("Shown is run one, machine A; the figures of 1 other run are the same within 0.6")
    assert sentence.endswith("run two, machine B.")
    titles = [group.setting.rpartition(", ")[2] for group in depth_groups(records, Roster.of(records))]
    assert titles == ["run one", "run three"]


def test_what_is_the_same_to_the_byte_says_the_same_as_what() -> None:
    records = [*of_run(depths(), "one", "machine A"), *of_run(depths(), "two", "machine B")]
    _, said = shown(depth_section(records, Roster.of(records)))
    assert said == [
        "Shown is run one, machine A; the figures of 1 other run are exactly the same: run two, machine B."
    ]


def test_the_first_run_that_has_a_network_whole_is_shown() -> None:
    """A quick run before it, of fewer depths, is not: no exponent is fitted to what it has."""
    quick, whole = of_run(depths(at=(48, 96)), "quick", "machine A"), of_run(depths(), "whole", "machine B")
    records = [*quick, *whole, *of_run(depths(), "later", "machine C")]
    (group,) = depth_groups(records, Roster.of(records))
    assert all(len(curve.points) == 3 for curve in group.curves)
    assert group.same is not None
    assert group.same.startswith("Shown is run whole, machine B; the figures of 2 other runs")


def test_a_few_bytes_in_one_curve_leave_no_figure_of_that_curve() -> None:
    """As between processors: one contender's scratch differs, and at some depths alone."""
    first = of_run(depths(), "one", "machine A")
    second = of_run(depths(("naive",)), "two", "machine B") + of_run(depths(("fused",)), "two", "machine B", 1.001)
    records = [*first, *second]
    (group,) = depth_groups(records, Roster.of(records))
    assert list(fitted(group.curves)) == ["naive", "fused"]


def test_contenders_are_in_the_order_of_the_roster() -> None:
    """Also where only some of them were measured, and in whichever order they come."""
    measured = [power_law("fused", depth, device="cpu") for depth in (48, 96, 192)]
    records = [*measured, *depths(("fused", "checkpointed", "naive"))]
    (group,) = depth_groups(records, Roster.of(records))
    assert list(fitted(group.curves)) == ["naive", "checkpointed", "fused"]
    assert [curve.name for curve in group.curves] == ["naive", "checkpointed", "fused", "fused"]


def test_other_settings_and_devices_are_other_figures() -> None:
    first, second = of_run(depths(), "one", "machine A"), of_run(depths(), "two", "machine B")
    larger = [dataclasses.replace(r, case=dataclasses.replace(r.case, batch=65)) for r in second]
    records = [*first, *larger]
    assert shown(depth_section(records, Roster.of(records))) == (2, [])


def test_timelines_and_predictions_of_several_runs_are_shown_once() -> None:
    lines = [*of_run(timelines(), "one", "machine A"), *of_run(timelines()[::-1], "two", "machine B")]
    plots, said = shown(timeline_section(lines, Roster.of(lines)))
    assert (plots, len(said)) == (1, 1)
    assert "the peaks of 1 other run" in said[0]
    steps = [*of_run(full_size(), "one", "machine A"), *of_run(full_size(), "two", "machine B", 1.001)]
    tables, said = shown(predicted_section(steps, Roster.of(steps)))
    assert (tables, len(said)) == (1, 1)
    assert "within 0.1" in said[0]


def test_what_two_runs_predict_alike_is_kept_once() -> None:
    one = make_record(make_case(source="predicted"), peak_delta_bytes=1000)
    near = dataclasses.replace(one, run="later", created="2001", peak_delta_bytes=1001)
    far = dataclasses.replace(one, run="last", peak_delta_bytes=1100)
    measured = timed(make_case(), MIB, [0.1] * 9)
    twice = dataclasses.replace(measured, run="later")
    assert once([one, measured, near, far, twice]) == [one, measured, far, twice]


def test_runs_that_have_each_something_of_their_own_are_both_shown() -> None:
    records = [*of_run(depths(("naive",)), "one", "A"), *of_run(depths(("fused",)), "two", "B")]
    groups = gathered(records, lambda record: record.case.model, lambda record: record.peak_delta_bytes or 0)
    assert [group.members[0].run for group in groups] == ["one", "two"]
    assert [same_words(group, "the figures") for group in groups] == [None, None]


@pytest.mark.parametrize(("share", "words"), [(0.00604, "0.61 %"), (0.0061, "0.61 %"), (1e-9, "0.01 %")])
def test_a_bound_is_rounded_up(share: float, words: str) -> None:
    assert within(share) == words
