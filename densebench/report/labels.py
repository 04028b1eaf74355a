"""Labels beside the points of a figure, so placed that none covers another, a marker or a line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from densebench.report.style import INK, MUTED

DISTANCES = (9, 15, 23, 33, 45, 60, 80, 105, 135)  # points from the marker; near first
DIRECTIONS = (0, 180, 90, 270, 30, 150, 330, 210, 60, 120, 300, 240)  # degrees; right is read first
LEADER_FROM = 15  # points; nearer labels need no line to their marker
MARKER = 5.0  # half a marker's side, in points
PADDING = 1.5

Point = tuple[float, float]


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point, in data coordinates."""

    x: float
    y: float
    text: str
    bold: bool = False


@dataclass(frozen=True)
class _Spot:
    """A place for a label: where its text is anchored and the box it fills, in pixels."""

    anchor: Point
    box: Bbox
    align: str
    distance: float


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    line: Sequence[Point] = (),
    avoid: Sequence[Bbox] = (),
    size: float = 8.5,
) -> list[Text]:
    """Write labels beside their points, each at the nearest free place, with a thin leader where that is far.

    Args:
        axes: its limits must be final.
        labels: one for each marker; their points are kept free of text.
        line: a line through data points that labels keep off where they can.
        avoid: boxes to keep free, in pixels.
        size: of the text, in points.
    """
    figure = axes.figure
    scale = figure.dpi / 72
    points = [tuple(axes.transData.transform((label.x, label.y))) for label in labels]
    taken = [*(_around(point, MARKER * scale) for point in points), *avoid]
    path = [tuple(axes.transData.transform(point)) for point in line]
    sizes = [_text_size(axes, label, size) for label in labels]
    room = axes.get_window_extent()
    leaders: list[tuple[Point, Point]] = []
    placed: dict[int, Text] = {}
    for index in _crowded_first(points):
        others = [box for at, box in enumerate(taken) if at != index]
        chosen = _best_spot(points[index], sizes[index], scale, room, others, leaders, path)
        taken.append(chosen.box)
        far = chosen.distance > LEADER_FROM * scale
        if far:
            leaders.append((points[index], chosen.anchor))
        placed[index] = _write(axes, labels[index], chosen, far, size)
    return [placed[index] for index in range(len(labels))]


def _best_spot(
    point: Point,
    size: Point,
    scale: float,
    room: Bbox,
    taken: Sequence[Bbox],
    leaders: Sequence[tuple[Point, Point]],
    path: Sequence[Point],
) -> _Spot:
    """The cheapest place within the room; the search ends where every place further out must cost more."""
    best, least = None, math.inf
    for spot in _spots(point, size, scale):
        if spot.distance > least:
            break
        cost = _cost(spot, point, taken, leaders, path) if _inside(spot.box, room) else math.inf
        if best is None or cost < least:
            best, least = spot, cost
    assert best is not None
    return best


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart and within [low, high] where that is possible.

    Returns them in the order given.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    positions = [0.0] * len(wanted)
    floor = low
    for index in order:
        positions[index] = floor = max(wanted[index], floor)
        floor += gap
    ceiling = high
    for index in reversed(order):
        positions[index] = min(positions[index], ceiling)
        ceiling = positions[index] - gap
    return positions


def _spots(point: Point, size: Point, scale: float) -> list[_Spot]:
    width, height = size
    spots = []
    for distance in (d * scale for d in DISTANCES):
        for degrees in DIRECTIONS:
            across, up = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
            x, y = point[0] + distance * across, point[1] + distance * up
            align = "left" if across > 0.1 else "right" if across < -0.1 else "center"
            left = x - {"left": 0.0, "right": width, "center": width / 2}[align]
            box = Bbox.from_bounds(left, y - height / 2, width, height)
            spots.append(_Spot((x, y), box, align, distance))
    return spots


def _cost(
    spot: _Spot,
    point: Point,
    taken: Sequence[Bbox],
    leaders: Sequence[tuple[Point, Point]],
    path: Sequence[Point],
) -> float:
    """How bad a place is: covering a text or marker is worst, then crossing lines, then being far."""
    padded = spot.box.padded(PADDING)
    covered = sum(padded.overlaps(box) for box in taken)
    crossed = sum(_crosses(start, end, padded) for start, end in leaders)
    through = sum(_crosses(point, spot.anchor, box.padded(-1)) for box in taken)
    over_path = sum(_crosses(start, end, padded) for start, end in itertools.pairwise(path))
    return 1e6 * covered + 1e5 * (crossed + through) + 40 * over_path + spot.distance


def _crosses(start: Point, end: Point, box: Bbox) -> bool:
    """Whether the straight line from start to end meets a box: clip the line to the box's two slabs."""
    enter, leave = 0.0, 1.0
    for at, to, low, high in ((start[0], end[0], box.x0, box.x1), (start[1], end[1], box.y0, box.y1)):
        if at == to:
            if not low <= at <= high:
                return False
            continue
        near, far = sorted(((low - at) / (to - at), (high - at) / (to - at)))
        enter, leave = max(enter, near), min(leave, far)
    return enter <= leave


def _crowded_first(points: Sequence[Point]) -> list[int]:
    def crowding(index: int) -> float:
        return -sum(1 / (1 + math.dist(points[index], other)) for other in points)

    return sorted(range(len(points)), key=lambda index: (crowding(index), index))


def _around(point: Point, half: float) -> Bbox:
    return Bbox.from_extents(point[0] - half, point[1] - half, point[0] + half, point[1] + half)


def _inside(box: Bbox, room: Bbox) -> bool:
    return box.x0 >= room.x0 and box.x1 <= room.x1 and box.y0 >= room.y0 + 2 and box.y1 <= room.y1


def _text_size(axes: Axes, label: Label, size: float) -> Point:
    probe = axes.text(0, 0, label.text, size=size, weight=_weight(label), transform=None)
    canvas = axes.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    box = probe.get_window_extent(canvas.get_renderer())
    probe.remove()
    return box.width, box.height


def _write(axes: Axes, label: Label, spot: _Spot, leader: bool, size: float) -> Text:
    start = {"left": 0.0, "right": 1.0, "center": 0.5}[spot.align]
    arrow = {
        "arrowstyle": "-",
        "color": MUTED,
        "linewidth": 0.6,
        "shrinkA": 1,
        "shrinkB": 4,
        "relpos": (start, 0.5),
    }
    points = 72 / axes.figure.dpi  # in points the place holds at whatever resolution the figure is saved
    return axes.annotate(
        label.text,
        (label.x, label.y),
        xytext=(spot.anchor[0] * points, spot.anchor[1] * points),
        textcoords="figure points",
        ha=spot.align,
        va="center",
        size=size,
        weight=_weight(label),
        color=INK,
        arrowprops=arrow if leader else None,
    )


def _weight(label: Label) -> str:
    return "bold" if label.bold else "normal"
