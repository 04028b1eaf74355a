"""The report as one HTML file that needs nothing else: figures, styles and data are in it."""

from __future__ import annotations

from functools import cache
from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from densebench.counting import counted
from densebench.report.report import Report
from densebench.report.tables import Link

_TEMPLATES = resources.files("densebench.report") / "templates"


def render_page(report: Report) -> str:
    """The page; the same report gives the same text."""
    template = _environment().from_string(_read("page.html.jinja"))
    records = counted(len(report.records), "record")
    return template.render(report=report, records=records, css=Markup(_read("page.css")))


@cache
def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["link"] = lambda cell: isinstance(cell, Link)
    environment.filters["markup"] = Markup  # only for what drawing.py made
    return environment


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")
