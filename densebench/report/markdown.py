"""The report as Markdown, for pull requests and mails: figures as files, tables folded beneath them."""

from __future__ import annotations

from collections.abc import Iterable

from densebench.report.blocks import Block, Folded, Items, Plot, Prose, Section, Sheet
from densebench.report.drawing import Picture
from densebench.report.report import Report
from densebench.report.tables import Cell, Link, Table


def render_markdown(report: Report) -> str:
    """The report in GitHub's Markdown; pictures are linked as `figures/<name>.svg`."""
    lines = ["# DenseBench report", ""]
    if report.notice:
        lines += [f"> {report.notice}", ""]
    lines += [f"**{_escape(report.answer.sentence)}**", ""]
    if report.answer.scope:
        lines += [report.answer.scope, ""]
    if report.picture is not None:
        lines += _picture(report.picture)
    lines += [f"* {_escape(f'{f.term}: {f.value}; {f.note}')}" for f in report.figures]
    if report.elsewhere is not None:
        lines += ["", *_fold(report.elsewhere.caption, [*_table(report.elsewhere), ""])]
    for section in report.sections:
        lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section) -> list[str]:
    lines = ["", f"## {section.title}", ""]
    if section.absent is not None:
        command = f" To fill this in: `{section.command}`" if section.command else ""
        return [*lines, f"Not run. {section.absent}{command}"]
    return [*lines, *_blocks(section.blocks)]


def _blocks(blocks: Iterable[Block]) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Prose):
            lines += [_escape(block.text), ""]
        elif isinstance(block, Items):
            lines += [*(f"* {_escape(item)}" for item in block.items), ""]
        elif isinstance(block, Sheet):
            lines += [f"*{_escape(block.table.caption)}*", "", *_table(block.table), ""]
        elif isinstance(block, Plot):
            lines += _picture(block.picture, block.open)
        elif isinstance(block, Folded):
            lines += _fold(block.summary, _blocks(block.blocks))
    return lines


def _picture(picture: Picture, open: bool = False) -> list[str]:
    alt = picture.alt.replace("[", "(").replace("]", ")")
    lines = [f"![{alt}](figures/{picture.name}.svg)", "", _escape(picture.caption), ""]
    table = [*_table(picture.table), ""]
    return lines + (table if open else _fold("Data of this figure", table))


def _fold(summary: str, lines: list[str]) -> list[str]:
    return [f"<details><summary>{_html(summary)}</summary>", "", *lines, "</details>", ""]


def _table(table: Table) -> list[str]:
    rule = ["--:" if at in table.numeric else "---" for at in range(len(table.columns))]
    rows = [[_cell(cell, at in table.strong) for cell in row] for at, row in enumerate(table.rows)]
    return ["| " + " | ".join(line) + " |" for line in ([_escape(c) for c in table.columns], rule, *rows)]


def _cell(cell: Cell, strong: bool) -> str:
    if isinstance(cell, Link):
        return f"[{_escape(cell.text)}]({cell.url})"
    text = _escape(cell)
    return f"**{text}**" if strong and text else text


def _escape(text: str) -> str:
    """A text in which nothing is mark-up: names with underscores, pipes of a table, angle brackets."""
    for sign in "\\`*_[]|~#":
        text = text.replace(sign, f"\\{sign}")
    return _html(text)


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
