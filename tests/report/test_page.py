"""The page: one file, readable by machines and people, with everything in it that the records hold."""

from __future__ import annotations

import csv
import itertools
import re
from html.parser import HTMLParser

from densebench.report.style import CSS_VARIABLES
from tests.report.conftest import Made
from tests.report.records import STRATEGIES

_VOID = {"meta", "link", "br", "img", "input", "hr", "use", "path"}


class Outline(HTMLParser):
    """What the tests ask of a page: its tags in order with attributes, and the text within each."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []  # of the tag with the same index, and of what is in it
        self._open: list[int] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")
        if tag not in _VOID:
            self._open.append(len(self.tags) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self.tags[self._open.pop()][0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.texts[index] += data

    def all(self, *names: str) -> list[tuple[dict[str, str], str]]:
        return [(a, text) for (name, a), text in zip(self.tags, self.texts, strict=True) if name in names]


def test_nothing_is_loaded_from_elsewhere(made: Made) -> None:
    outline = Outline(made.page)
    assert not [tag for tag, attributes in outline.tags if "src" in attributes or "srcset" in attributes]
    assert all(attributes["href"].startswith("data:") for attributes, _ in outline.all("link"))
    assert all(attributes["href"].startswith("#") for attributes, _ in outline.all("use"))
    assert not outline.all("script", "iframe", "object", "embed")
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", made.page)


def test_links_lead_somewhere(made: Made) -> None:
    outline = Outline(made.page)
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id occurs twice"
    targets = [a["href"] for a, _ in outline.all("a", "use")] + re.findall(r"url\((#[^)]+)\)", made.page)
    local = [target[1:] for target in targets if target.startswith("#")]
    assert len(local) > 12
    assert set(local) <= set(ids)
    assert all(target.startswith(("#", "https://")) for target in targets)


def test_headings_are_in_order(made: Made) -> None:
    levels = [int(tag[1]) for tag, _ in Outline(made.page).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_figures_have_words_and_data(made: Made) -> None:
    outline = Outline(made.page)
    plots = [attributes for attributes, _ in outline.all("svg")]
    assert all(plot["role"] == "img" and len(plot["aria-label"]) > 40 for plot in plots)
    figures = re.findall(r"<figure.*?</figure>", made.page, flags=re.DOTALL)
    assert len(figures) * 2 == len(plots), "each figure has a wide and a narrow layout"
    for figure in figures:
        assert "<figcaption>" in figure
        assert re.search(r"<details.*<table", figure, flags=re.DOTALL)
        assert len(re.findall(r'class="plot (wide|narrow)"', figure)) == 2


def test_tables_have_header_cells(made: Made) -> None:
    tables = re.findall(r"<table>.*?</table>", made.page, flags=re.DOTALL)
    assert len(tables) > 8
    for table in tables:
        heads = table.count('scope="col"')
        rows = re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
        assert heads >= 2
        assert "<caption>" in table
        for row in rows[1:]:
            assert row.count('scope="row"') == 1
            assert row.count("<th") + row.count("<td") == heads


def test_colors_have_a_second_value_for_dark_screens(made: Made) -> None:
    style = Outline(made.page).all("style")[0][1]
    light, dark = (set(re.findall(r"(--[a-z]+):", part)) for part in style.split("prefers-color-scheme: dark")[:2])
    used = set(re.findall(r"var\((--[a-z]+)\)", made.page))
    assert used <= light
    assert used <= dark
    figures = "".join(re.findall(r"<svg.*?</svg>", made.page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", figures), "a color that a dark screen cannot change"
    assert set(CSS_VARIABLES.values()) <= dark


def test_every_contender_is_shown(gpu: Made) -> None:
    markdown = (gpu.folder / "summary.md").read_text(encoding="utf-8").replace("\\", "")
    for name in (*STRATEGIES, "brand_new", "torchvision", "ResNet-50"):
        assert f'<th scope="row">{name}</th>' in gpu.page
        assert re.search(rf"<text[^>]*>{name}</text>", gpu.page), f"{name} is in no figure"
        assert re.search(rf"^\| \*{{0,2}}{name}\*{{0,2}} \|", markdown, flags=re.MULTILINE)


def test_texts_of_figures_are_not_rounded(gpu: Made) -> None:
    """Coordinates are cut to tenths of a point; numbers that are read are not."""
    naive, fused = (
        next(
            r
            for r in gpu.records
            if r.case.kind == "step" and r.case.batch == 128 and r.case.strategy == name and r.case.mode == "train"
        )
        for name in ("naive", "fused")
    )
    ratio = (fused.peak_delta_bytes or 0) / (naive.peak_delta_bytes or 1)
    svg = (gpu.folder / "figures" / "strategies-1.svg").read_text(encoding="utf-8")
    text = f"{ratio:.2f}\N{MULTIPLICATION SIGN}"
    assert re.search(rf"<text[^>]*>3.90 GiB\s+{text}</text>", svg)


def test_sections_without_records_say_so_and_what_fills_them(cpu: Made) -> None:
    absent = [text for attributes, text in Outline(cpu.page).all("p") if attributes.get("class") == "absent"]
    assert len(absent) == 2, "batches and kernels; every other section has records"
    for text in absent:
        assert text.startswith("Not run. ")
        assert "pytest benchmarks/ --benchmark-only" in text
        assert "\n" not in text.strip()


def test_a_full_run_fills_every_section(gpu: Made) -> None:
    assert "Not run." not in gpu.page


def test_csv_has_a_row_for_every_record(made: Made) -> None:
    with (made.folder / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made.records)
    found = {(row["case.strategy"], row["case.batch"], row["peak_delta_bytes"]) for row in rows}
    for record in made.records:
        bytes = "" if record.peak_delta_bytes is None else str(record.peak_delta_bytes)
        assert (record.case.strategy, str(record.case.batch), bytes) in found


def test_figures_are_files_too(made: Made) -> None:
    names = re.findall(r'<figure id="figure-([^"]+)"', made.page)
    assert "answer" in names
    markdown = (made.folder / "summary.md").read_text(encoding="utf-8")
    for name in names:
        assert (made.folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert 'role="img"' in (made.folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        assert f"(figures/{name}.svg)" in markdown
    assert not list(made.folder.rglob(".*")), "a temporary file was left behind"
