"""How far predicted peaks lie from measured ones."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator

from densebench.report.comparison_tables import prediction_error, prediction_table
from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw
from densebench.report.selection import Comparison, Row
from densebench.report.style import GRID, INK, MUTED
from densebench.report.units import percent

TITLE = "Error of the predicted peak"
SUBTITLE = "Predicted peak over measured peak, less one; library workspaces apart"
BAND = 0.1  # what PyTorch's own tests of its memory tracker allow (test_mem_tracker.py)


def both(comparisons: Sequence[Comparison]) -> list[tuple[str, Row]]:
    """Rows with a predicted and a measured peak, each with the title of its comparison; no row twice."""
    found: dict[int, tuple[str, Row]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            if prediction_error(row.record) is not None:
                found.setdefault(id(row.record), (comparison.title, row))
    return list(found.values())


def prediction_picture(rows: Sequence[tuple[str, Row]]) -> Picture:
    """The picture of some rows as `both` gives them."""
    errors = [(row.name, prediction_error(row.record) or 0.0) for _, row in rows]
    worst = max(errors, key=lambda pair: abs(pair[1]))
    alt = f"{TITLE}: one point a case. The largest error is {percent(worst[1])}, of {worst[0]}."
    caption = (
        "One point a case: how far the predicted peak lies from the measured one. The shaded band is 10 %, "
        "what PyTorch's tests of its own tracker allow."
    )
    return draw("prediction", alt, caption, prediction_table(rows), lambda width: paint_prediction(rows, width))


def paint_prediction(rows: Sequence[tuple[str, Row]], width: float = WIDE) -> Canvas:
    """Draw a line of points for each contender."""
    names: dict[str, list[Row]] = {}
    for _, row in rows:
        names.setdefault(row.name, []).append(row)
    page = canvas(TITLE, SUBTITLE, 0.75 + 0.24 * len(names), width)
    left = 0.25 + max(page.text_width(name, 8.5, "bold") for name in names)
    axes = page.place(left, 0.5, 0.3, top=0.15)
    reach = max(0.12, *(1.15 * abs(prediction_error(row.record) or 0.0) for _, row in rows))
    axes.set_xlim(-reach, reach)
    axes.axvspan(-BAND, BAND, color=GRID, alpha=0.5, linewidth=0, zorder=0)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for at, (name, members) in enumerate(names.items()):
        errors = [prediction_error(row.record) or 0.0 for row in members]
        axes.plot(errors, [at] * len(errors), linestyle="", **members[0].look.marker_style(7))
        weight = "bold" if members[0].look.strong else "normal"
        axes.annotate(
            name,
            (0, at),
            (-6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            color=INK,
            weight=weight,
        )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5 if page.narrow else 7, symmetric=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: "0" if abs(value) < 1e-9 else f"{100 * value:+.0f} %")
    )
    axes.set_xlabel("error  (← too low, too high →)")
    return page
