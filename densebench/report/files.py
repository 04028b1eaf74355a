"""Writing the report: every file appears whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from densebench.records import Record, Timing
from densebench.report.markdown import render_markdown
from densebench.report.page import render_page
from densebench.report.report import Report

_LEFT_OUT = ("case", "time_s", "timeline", "environment", "unavailable")


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write page, Markdown, table and figures into a folder; returns the files, the page first."""
    texts = {
        "index.html": render_page(report),
        "summary.md": render_markdown(report),
        "summary.csv": records_csv(report.records),
    }
    contents = {name: text.encode("utf-8") for name, text in texts.items()}
    for picture in report.pictures():
        contents[f"figures/{picture.name}.svg"] = picture.svg.encode("utf-8")
        contents[f"figures/{picture.name}.png"] = picture.png
    for name, content in contents.items():
        write_whole(folder / name, content)
    return [folder / name for name in texts]


def records_csv(records: Sequence[Record]) -> str:
    """One row a record, one column a field; without samples and timelines. Unknown is empty."""
    rows = [_flat(record) for record in records]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that nobody ever reads half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)  # mkstemp gives the owner alone access
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _flat(record: Record) -> dict[str, Any]:
    case = {f.name: getattr(record.case, f.name) for f in dataclasses.fields(record.case)}
    row: dict[str, Any] = {f"case.{name}": _csv_value(value) for name, value in case.items()}
    row |= {
        f.name: _csv_value(getattr(record, f.name)) for f in dataclasses.fields(record) if f.name not in _LEFT_OUT
    }
    times = (f.name for f in dataclasses.fields(Timing) if f.name != "samples")
    row |= {f"time_s.{name}": _csv_value(getattr(record.time_s, name, None)) for name in times}
    facts = record.environment
    return row | {f"environment.{name}": _csv_value(facts.get(name)) for name in ("device", "commit", "dirty")}


def _csv_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _joined(f"{key}={_csv_value(item)}" for key, item in sorted(value.items()))
    return _joined(map(str, value)) if isinstance(value, list | tuple) else value


def _joined(parts: Iterable[str]) -> str:
    return " ".join(parts)
