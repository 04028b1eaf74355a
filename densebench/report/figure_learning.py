"""Learning curves of a training run: the loss of its steps, and what of the test images is recognized."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from densebench.report.drawing import WIDE, Canvas, Picture, canvas, draw, name_axes
from densebench.report.files import write_whole
from densebench.report.style import Look, Roster
from densebench.report.tables import Column, Table, build
from densebench.report.units import memory, number
from densebench.training.records import FILE, EpochRecord, by_strategy, read_epochs
from densebench.training.summary import conditions

TITLE = "Learning curves"
_POINTS = 40  # that a curve of losses is smoothed to tell apart
_THINNEST, _WIDER = 1.5, 1.6  # points
Run = Sequence[EpochRecord]


def write_curves(folder: Path) -> Path | None:
    """Draw `curves.svg` from a run's `training.jsonl` beside it; None if no epoch was finished."""
    records = read_epochs(folder) if (folder / FILE).is_file() else []
    if not records:
        return None
    path = folder / "curves.svg"
    write_whole(path, learning_picture(records, "curves").svg.encode())
    return path


def learning_picture(records: Sequence[EpochRecord], name: str) -> Picture:
    """The picture of one run; at least one record."""
    runs = by_strategy(records)
    ends = "; ".join(f"{run[0].strategy} {_end(run[-1])}" for run in runs.values())
    alt = f"{TITLE}. {_setting(records[0])}. {ends}."
    caption = "Curves that lie on one another are drawn one inside the other."
    return draw(name, alt, caption, learning_table(records), lambda width: paint_learning(runs, width))


def paint_learning(runs: Mapping[str, Run], width: float = WIDE) -> Canvas:
    """Draw losses above accuracies, over one axis of epochs; the key beside them, or beneath where narrow."""
    looks = {entry.name: entry.look for entry in Roster(runs)}
    handles = [
        Line2D([], [], color=looks[name].color, linewidth=line, label=f"{name}\n{_memory(run)}")
        for (name, run), line in zip(runs.items(), _widths(len(runs)), strict=True)
    ]
    first = next(iter(runs.values()))[0]
    page = canvas(TITLE, _setting(first), 4.6 if width == WIDE else 4.8 + _beneath(handles), width)
    right = 0.2 if page.narrow else 0.65 + max(page.text_width(str(handle.get_label()), 8.5) for handle in handles)
    beneath = _beneath(handles) if page.narrow else 0.0
    upper = page.place(0.55, 2.5 + beneath, right)
    lower = page.place(0.55, 0.5 + beneath, right, top=2.45)
    window = max(1, sum(len(record.step_losses) for record in next(iter(runs.values()))) // _POINTS)
    for (name, run), line in zip(runs.items(), _widths(len(runs)), strict=True):
        _plot_losses(upper, run, window, looks[name].color, line)
        _plot_accuracy(lower, run, looks[name], line)
    _scale(upper, lower, max(run[-1].epoch for run in runs.values()))
    smooth = "a step" if window == 1 else f"mean of {window} steps"
    name_axes(upper, y=f"training loss, {smooth}  (↓ better)")
    name_axes(lower, "epoch", "test images recognized  (↑ better)")
    _draw_key(page, upper, handles)
    return page


def learning_table(records: Sequence[EpochRecord]) -> Table:
    """Losses, accuracies and memory by strategy and epoch."""
    columns = [
        Column[EpochRecord]("strategy", lambda r: r.strategy, numeric=False),
        Column[EpochRecord]("epoch", lambda r: str(r.epoch)),
        Column[EpochRecord]("training loss", lambda r: number(r.train_loss)),
        Column[EpochRecord]("test loss", lambda r: None if r.test_loss is None else number(r.test_loss)),
        Column[EpochRecord]("test accuracy", lambda r: _share(r.test_accuracy)),
        Column[EpochRecord]("activation memory", lambda r: memory(r.peak_delta_bytes)),
    ]
    return build(f"{TITLE}. {_setting(records[0])}", columns, records)


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """The mean of each loss and of those before it, of so many in all."""
    spans = (losses[max(0, at - window + 1) : at + 1] for at in range(len(losses)))
    return [sum(span) / len(span) for span in spans]


def _plot_losses(axes: Axes, run: Run, window: int, color: str, width: float) -> None:
    steps = len(run[0].step_losses)
    start = run[0].epoch - 1
    losses = smoothed([loss for record in run for loss in record.step_losses], window)
    at = [start + (1 + step) / steps for step in range(len(losses))]
    axes.plot(at, losses, color=color, linewidth=width, solid_joinstyle="round", zorder=2)


def _plot_accuracy(axes: Axes, run: Run, look: Look, width: float) -> None:
    style: dict[str, Any] = {**look.marker_style(4 + width), "markeredgewidth": 0, "linewidth": width, "zorder": 2}
    axes.plot([record.epoch for record in run], [record.test_accuracy for record in run], **style)


def _scale(upper: Axes, lower: Axes, epochs: int) -> None:
    upper.set_ylim(bottom=0)
    lower.set_ylim(0, 1.05)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _share(value, 0)))
    for axes in (upper, lower):
        axes.set_xlim(0, 1.02 * epochs)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    upper.set_xticklabels([])


def _widths(curves: int) -> list[float]:
    """Line widths of curves in the order they are drawn: each leaves an edge of the one beneath."""
    return [_THINNEST + _WIDER * (curves - 1 - at) for at in range(curves)]


def _draw_key(page: Canvas, axes: Axes, handles: list[Line2D]) -> None:
    shared: dict[str, Any] = {"handles": handles, "frameon": False, "borderpad": 0, "labelspacing": 0.7}
    if page.narrow:
        place: Any = {"loc": "lower left", "bbox_to_anchor": (0.06 / page.width, 0)}
        page.figure.legend(**shared, **place, ncols=2, fontsize=8, columnspacing=1)
    else:
        axes.legend(**shared, loc="upper left", bbox_to_anchor=(1.03, 1.02))


def _beneath(handles: Sequence[Line2D]) -> float:
    """Inches for the key beneath a narrow figure."""
    return 0.36 * -(-len(handles) // 2) + 0.1


def _setting(record: EpochRecord) -> str:
    return "; ".join(conditions(record))


def _memory(run: Run) -> str:
    return f"activations {memory(run[-1].peak_delta_bytes)}"


def _end(record: EpochRecord) -> str:
    accuracy = _share(record.test_accuracy)
    return (
        f"recognizes {accuracy} after epoch {record.epoch} with {memory(record.peak_delta_bytes)} of activations"
    )


def _share(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
