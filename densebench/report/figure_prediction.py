"""How far predicted peaks lie from measured ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.ticker import FixedLocator, FuncFormatter

from densebench.capacities import GIB
from densebench.counting import counted
from densebench.report.comparison_tables import measured_peak, prediction_error
from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw, round_step
from densebench.report.selection import Comparison, Row, device_of
from densebench.report.style import GRID, INK, MUTED, Roster
from densebench.report.tables import Column, Table, build
from densebench.report.units import Unit, memory, memory_unit, percent

TITLE = "Error of the predicted peak"
SUBTITLE = "Predicted peak over measured peak, less one; library workspaces apart"
BAND = 0.1  # what PyTorch's own tests of its memory tracker allow (test_mem_tracker.py)
LEAST_REACH = 0.01  # of the axis; nearer, points would show differences that matter to nobody
DECIMALS = 2  # of an error in percent


def both(comparisons: Sequence[Comparison]) -> list[tuple[str, Row]]:
    """Rows with a predicted and a measured peak, each with the title of its comparison; no row twice."""
    found: dict[int, tuple[str, Row]] = {}
    for comparison in comparisons:
        for row in comparison.rows:
            if prediction_error(row.record) is not None:
                found.setdefault(id(row.record), (comparison.title, row))
    return list(found.values())


def extent(rows: Sequence[tuple[str, Row]]) -> str:
    """How many cases, on which kind of device, up to which peak: what the errors speak for."""
    parts, missing = [], []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        own = [row.record for _, row in rows if row.record.case.device == device]
        if not own:
            missing.append(f"none on a {name}")
            continue
        devices = counted(len({device_of(record) for record in own}), name)
        peak = memory(max(measured_peak(record) or 0 for record in own), Unit("GiB", GIB))
        parts.append(f"{counted(len(own), 'case')} on {devices}, with peaks of up to {peak}")
    return "; ".join([*parts, *missing])


def prediction_picture(rows: Sequence[tuple[str, Row]]) -> Picture:
    """The picture of some rows as `both` gives them."""
    errors = [(row.name, error_of(row)) for _, row in rows]
    worst = max(errors, key=lambda pair: abs(pair[1]))
    alt = f"{TITLE}: one point a case. The largest error is {percent(worst[1], DECIMALS)}, of {worst[0]}."
    caption = "One point a case: how far the predicted peak lies from the measured one. "
    allowed = f"{100 * BAND:.0f} %, what PyTorch's tests of its own tracker allow"
    if reach(rows) < BAND:
        caption += f"The whole axis lies within {allowed}."
    else:
        caption += f"The shaded band is {allowed}."
    return draw("prediction", alt, caption, error_table(rows), lambda width: paint_prediction(rows, width))


def error_table(rows: Sequence[tuple[str, Row]]) -> Table:
    """Predicted and measured peaks of the rows, each with its comparison's title."""
    unit = memory_unit(row.record.peak_allocated_bytes or 0 for _, row in rows)

    def peak(title: str, bytes_of: Callable[[Row], int | None]) -> Column[tuple[str, Row]]:
        return Column(f"{title}, {unit.name}", lambda pair: unit.of(bytes_of(pair[1]) or 0))

    columns = [
        Column[tuple[str, Row]]("case", lambda pair: pair[0], numeric=False),
        Column[tuple[str, Row]]("contender", lambda pair: pair[1].name, numeric=False),
        peak("predicted peak", lambda row: row.record.predicted_peak_bytes),
        peak("measured peak", lambda row: measured_peak(row.record)),
        Column[tuple[str, Row]]("error", lambda pair: percent(error_of(pair[1]), DECIMALS)),
    ]
    return build("Predicted against measured peak", columns, rows)


def error_of(row: Row) -> float:
    return prediction_error(row.record) or 0.0


def reach(rows: Sequence[tuple[str, Row]]) -> float:
    """Where the axis ends on either side: a little beyond the largest error."""
    return max(LEAST_REACH, *(1.15 * abs(error_of(row)) for _, row in rows))


def paint_prediction(rows: Sequence[tuple[str, Row]], width: float = WIDE) -> Canvas:
    """Draw a line of points for each contender."""
    names: dict[str, list[Row]] = {}
    roster = Roster.of(row.record for _, row in rows)
    for _, row in sorted(rows, key=lambda pair: roster.rank(pair[1].record.case.strategy)):
        names.setdefault(row.name, []).append(row)
    page = canvas(TITLE, SUBTITLE, 0.75 + 0.24 * len(names), width)
    left = 0.25 + max(page.text_width(name, 8.5, "bold") for name in names)
    axes = page.place(left, 0.5, 0.3, top=0.15)
    end = reach(rows)
    axes.set_xlim(-end, end)
    if end >= BAND:
        axes.axvspan(-BAND, BAND, color=GRID, alpha=0.5, linewidth=0, zorder=0)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    for at, (name, members) in enumerate(names.items()):
        errors = [error_of(row) for row in members]
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
    step = round_step(end / (2 if page.narrow else 4))
    axes.xaxis.set_major_locator(FixedLocator([step * i for i in range(-4, 5) if step * abs(i) <= end]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.4g} %" if value else "0"))
    axes.set_xlabel("error  (← too low, too high →)")
    return page
