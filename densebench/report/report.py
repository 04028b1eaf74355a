"""The whole report as data: the answer, its picture and all sections, ready for page and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from densebench.counting import counted
from densebench.records import Record
from densebench.report.agreement import once
from densebench.report.answer import Answer, answer
from densebench.report.blocks import Section
from densebench.report.capacity import capacity_section, fits_of
from densebench.report.comparison_tables import elsewhere_table
from densebench.report.context_sections import environment_section, glossary_section, kernels_section
from densebench.report.drawing import Picture
from densebench.report.figure_answer import answer_picture
from densebench.report.figure_strategies import strategies_picture
from densebench.report.key_figures import KeyFigure, key_figures
from densebench.report.published import published_section
from densebench.report.sections import (
    batch_section,
    depth_section,
    naive_section,
    predicted_section,
    prediction_section,
    strategies_section,
    timeline_section,
)
from densebench.report.selection import comparisons
from densebench.report.sources import MAKE_SOME, Loaded
from densebench.report.style import Roster
from densebench.report.tables import Table
from densebench.report.units import device_words


@dataclass(frozen=True)
class Report:
    """What page, Markdown and files are made from.

    Attributes:
        notice: what the reader must know before anything else (that these are samples, or not all), or None.
        picture: beside the answer; None where fewer than two contenders have results.
        figures: the numbers beneath the answer.
        elsewhere: the answer in other settings and on other devices; None where there are none.
    """

    notice: str | None
    answer: Answer
    picture: Picture | None
    figures: tuple[KeyFigure, ...]
    elsewhere: Table | None
    sections: tuple[Section, ...]
    records: tuple[Record, ...]

    def pictures(self) -> list[Picture]:
        own = [] if self.picture is None else [self.picture]
        return [*own, *(picture for section in self.sections for picture in section.pictures())]


def make_report(loaded: Loaded) -> Report:
    """Everything the report says about some records; takes a few seconds."""
    records = loaded.records
    roster = Roster.of(record for record in records if record.case.kind != "kernel")
    steps = [record for record in records if record.case.kind != "kernel"]
    measured, predicted = comparisons(steps, roster), comparisons(once(steps), roster, "predicted")
    said = answer(measured, predicted)
    sections = [
        strategies_section(measured),
        depth_section(steps, roster),
        timeline_section(steps, roster),
        predicted_section(steps, roster),
        capacity_section(steps, roster),
        batch_section(measured),
        kernels_section(records, loaded.code),
        prediction_section(measured),
        published_section(measured),
        naive_section(measured),
        environment_section(records),
    ]
    elsewhere = None
    if said.comparison is not None and said.elsewhere:
        elsewhere = elsewhere_table(said.elsewhere, said.comparison.device)
    sections.append(glossary_section(sections, elsewhere))
    figures: tuple[KeyFigure, ...] = ()
    if said.comparison is not None and said.winner is not None:
        figures = key_figures(said.comparison, said.winner, fits_of(said.comparison.case, steps, roster))
    return Report(notice(loaded), said, _picture(said), figures, elsewhere, tuple(sections), tuple(records))


def notice(loaded: Loaded) -> str | None:
    """That there are more records, and that these are sample or published ones: machine, date and commit."""
    sentences = [_left_out(loaded.left_out), _not_own(loaded)]
    return ". ".join(sentence for sentence in sentences if sentence) or None


def _left_out(records: Sequence[Record]) -> str | None:
    """What is not shown since later records of the same cases took its place, and how to see it."""
    if not records:
        return None
    cases = counted(len({(record.run, record.case.key()) for record in records}), "case")
    origins = "; ".join(dict.fromkeys(_measured(record) for record in records))
    return (
        f"Left out: older records of {cases} ({origins}), in whose place later ones from another machine or other "
        "code are shown; to see them, copy their lines to a file of their own and give that file to "
        "python -m densebench.report"
    )


def _not_own(loaded: Loaded) -> str | None:
    """That these are sample or published records and not the reader's own."""
    own = [record for record in loaded.records if record.run not in loaded.published]
    if loaded.samples and own:
        return f"These are sample records, not yours: {_origin(own)}. To measure on your machine: {MAKE_SOME}"
    if loaded.published and not own:
        return f"These are published records, not yours: {_origin(loaded.records)}. To measure: {MAKE_SOME}"
    return None


def _origin(records: Sequence[Record]) -> str:
    """Machine, date and commit of a run; of several how many there are, and where they are told apart."""
    firsts = {record.run: record for record in reversed(records)}
    if len(firsts) == 1:
        return _measured(*firsts.values())
    devices = len({record.environment.get("device") for record in firsts.values()})
    dates = sorted(record.created[:10] for record in firsts.values())
    span = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    return f"{counted(len(firsts), 'run')} on {counted(devices, 'machine')}, {span}, each told under Environment"


def _measured(record: Record) -> str:
    device = device_words(str(record.environment.get("device") or "an unknown machine"))
    commit = str(record.environment.get("commit") or "unknown")[:10]
    date = record.created[:10] or "an unknown date"
    return f"measured on {device} on {date} at commit {commit}"


def _picture(said: Answer) -> Picture | None:
    """Memory against throughput; bars of memory alone where nothing was timed."""
    if said.comparison is None:
        return None
    return answer_picture(said.comparison) or strategies_picture(said.comparison, "answer")
