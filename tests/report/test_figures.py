"""Figures: no text covers another or leaves the picture, at either width; axes start where they should."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from densebench.contenders import get_contender, list_contenders
from densebench.records import Record
from densebench.report.depths import depth_groups
from densebench.report.drawing import NARROW, WIDE, Canvas, plain, round_step
from densebench.report.figure_answer import paint_answer
from densebench.report.figure_batch import paint_batches
from densebench.report.figure_depth import exponent, fitted, paint_depth
from densebench.report.figure_kernels import paint_kernels
from densebench.report.figure_learning import paint_learning
from densebench.report.figure_prediction import both, paint_prediction
from densebench.report.figure_strategies import paint_strategies
from densebench.report.figure_timeline import paint_timelines
from densebench.report.kernels import machines
from densebench.report.selection import comparisons, ladders
from densebench.report.style import _FIXED, RC, Roster
from densebench.report.timelines import timeline_groups
from densebench.training.records import by_strategy
from tests.report.records import cpu_run, gpu_run, learning_run, make_case, power_law, timed

Paint = Callable[[float], Canvas]


def _paints(records: list[Record]) -> dict[str, Paint]:
    steps = [record for record in records if record.case.kind != "kernel"]
    roster = Roster.of(steps)
    found = comparisons(steps, roster)
    timelines = timeline_groups(steps, roster)[0]
    paints: dict[str, Paint] = {
        "answer": lambda width: paint_answer(found[0], width),
        "strategies": lambda width: paint_strategies(found[0], width),
        "depth": lambda width: paint_depth(depth_groups(steps, roster)[0], width),
        "timeline": lambda width: paint_timelines(timelines.members, timelines.setting, width),
        "prediction": lambda width: paint_prediction(both(found), width),
    }
    if ladders(found):
        paints["batch"] = lambda width: paint_batches(ladders(found)[0], width)
    if machines(records):
        paints["kernels"] = lambda width: paint_kernels(machines(records)[0], width)
    return paints


GPU, CPU = _paints(gpu_run()), _paints(cpu_run())
PAINTS = [pytest.param(paint, id=f"gpu-{name}") for name, paint in GPU.items()]
PAINTS += [pytest.param(paint, id=f"cpu-{name}") for name, paint in CPU.items()]
PAINTS += [pytest.param(lambda width: paint_learning(by_strategy(learning_run()), width), id="learning")]


def _draw(paint: Paint, width: float) -> Canvas:
    with matplotlib.rc_context(RC):
        page = paint(width)
        page.figure.canvas.draw()
    return page


def _texts(page: Canvas) -> list[Text]:
    """All texts that are drawn; matplotlib also keeps labels of ticks beyond the ends of an axis."""
    hidden = set()
    for axes in page.figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    found = [text for text in page.figure.findobj(Text) if isinstance(text, Text) and text not in hidden]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


@pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("paint", PAINTS)
def test_texts_are_apart_and_inside(paint: Paint, width: float) -> None:
    page = _draw(paint, width)
    canvas = page.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()
    boxes = [(text.get_text(), Text.get_window_extent(text, renderer).padded(-1)) for text in _texts(page)]
    assert len(boxes) > 8
    for (one, here), (other, there) in itertools.combinations(boxes, 2):
        assert not here.overlaps(there), f"{one!r} covers {other!r}"
    edge = page.figure.bbox.padded(2)
    for text, box in boxes:
        within = edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1
        assert within, f"{text!r} leaves the picture"


@pytest.mark.parametrize("paint", PAINTS)
def test_texts_keep_their_size_on_a_narrow_screen(paint: Paint) -> None:
    pixels = 390 - 32  # of a phone, less the page's margins
    page = _draw(paint, NARROW)
    smallest = min(float(text.get_fontsize()) for text in _texts(page))
    assert smallest * pixels / (72 * NARROW) >= 8


@pytest.mark.parametrize("name", ["answer", "batch", "depth", "timeline"])
def test_memory_is_linear_from_zero(name: str) -> None:
    axes = [a for a in _draw(GPU[name], WIDE).figure.axes if a.get_yscale() == "linear"]
    assert axes
    assert all(a.get_ylim()[0] == 0 for a in axes)


def test_batches_are_to_base_2() -> None:
    for axes in _draw(GPU["batch"], WIDE).figure.axes:
        assert axes.get_xscale() == "log"
        assert list(axes.get_xticks()) == [1, 4, 16, 64, 128, 256]


@pytest.mark.parametrize("width", [WIDE, NARROW], ids=["wide", "narrow"])
def test_depths_are_linear_from_zero_and_then_logarithmic(width: float) -> None:
    """Both axes of a panel are of one kind: on a mixed pair growth in proportion looks exponential."""
    linear, logarithmic = _draw(GPU["depth"], width).figure.axes
    assert (linear.get_xscale(), linear.get_yscale()) == ("linear", "linear")
    assert (linear.get_xlim()[0], linear.get_ylim()[0]) == (0, 0)
    assert linear.get_xticks()[0] == 0
    assert linear.get_xlim()[1] >= 192
    assert (logarithmic.get_xscale(), logarithmic.get_yscale()) == ("log", "log")
    assert list(logarithmic.get_xticks()) == [48, 68, 96, 136, 192]


def test_numbers_of_layers_have_room_on_a_narrow_screen() -> None:
    """1,000 layers stand close to 700: what does not fit has no tick, the largest always has."""
    records = [power_law("naive", depth) for depth in (100, 196, 292, 508, 700, 1000)]
    (group,) = depth_groups(records, Roster.of(records))
    page = _draw(lambda width: paint_depth(group, width), NARROW)
    ticks = [label for label in page.figure.axes[1].get_xticklabels() if label.get_text()]
    assert ticks[-1].get_text() == "1,000"
    boxes = [label.get_window_extent() for label in ticks]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_errors_of_predictions_stand_at_round_numbers() -> None:
    records = [r for r in gpu_run() if r.case.kind == "step" and r.case.source == "measured"]
    exact = [
        dataclasses.replace(r, predicted_peak_bytes=r.peak_allocated_bytes, workspace_bytes=0) for r in records
    ]
    rows = both(comparisons(exact, Roster.of(exact)))
    for width, ticks in ((WIDE, [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]), (NARROW, [-1, -0.5, 0, 0.5, 1])):
        (axes,) = _draw(lambda width: paint_prediction(rows, width), width).figure.axes
        assert [100 * tick for tick in axes.get_xticks()] == pytest.approx(ticks)


def test_titles_say_what_was_measured() -> None:
    for name in ("answer", "strategies", "batch"):
        texts = " ".join(text.get_text() for text in _texts(_draw(GPU[name], WIDE)))
        for words in ("memory", "Training step", "DenseNet-121", "bfloat16 autocast", "Synthetic GPU"):
            assert words in texts


def test_one_look_a_strategy() -> None:
    roster = Roster(["naive", "fused", "shared_buffer", "one_new", "another_new", "third_new", "eager"])
    looks = [entry.look for entry in roster]
    assert len({(look.color, look.marker, str(look.line)) for look in looks}) == len(looks)
    assert roster["eager"].look.hollow
    assert Roster(["fused", "naive"])["fused"].look == roster["fused"].look


def test_exponents_are_those_of_the_records() -> None:
    records = [power_law(name, depth) for name in ("naive", "fused") for depth in (48, 96, 192)]
    (group,) = depth_groups(records, Roster.of(records))
    assert fitted(group.curves) == pytest.approx({"naive": 1.9, "fused": 1.0}, abs=1e-3)
    assert exponent([(2, 12.0), (4, 48.0), (8, 192.0)]) == pytest.approx(2.0)
    assert exponent([(48, 1.0), (96, 2.0)]) is None


def test_depths_on_two_devices_are_two_figures() -> None:
    records = [power_law("naive", depth, device=device) for device in ("cpu", "cuda") for depth in (48, 96)]
    assert len(depth_groups(records, Roster.of(records))) == 2


def test_a_picture_is_not_drawn_of_nothing() -> None:
    from densebench.report.figure_answer import answer_picture
    from densebench.report.figure_strategies import strategies_picture
    from tests.report.records import make_record

    lonely = [timed(make_case(), 10**9, [0.1] * 5)]
    assert answer_picture(comparisons(lonely, Roster.of(lonely))[0]) is None
    failed = [make_record(make_case(name), "oom") for name in ("naive", "fused")]
    assert strategies_picture(comparisons(failed, Roster.of(failed))[0], "none") is None


@pytest.mark.parametrize("rough", [0.02, 0.2, 2.1, 21.0, 210.0])
def test_ticks_say_where_they_stand(rough: float) -> None:
    """12.5, not 12: evenly spaced labels of 10, 12, 15, 18 are a wrong axis."""
    step = round_step(rough)
    for i in range(1, 10):
        assert float(plain(step * i).replace(",", "")) == pytest.approx(step * i, rel=1e-9)


def test_every_contender_of_this_package_has_a_look_of_its_own() -> None:
    """A peer always the same: else figures of two runs cannot be laid side by side. New strategies take spares."""
    ours = {name for name in list_contenders() if get_contender(name).module.startswith("densebench.")}
    peers = {name for name in ours if get_contender(name).family != "strategy"}
    assert peers <= set(_FIXED), "give what is new an entry in densebench/report/style.py"
    assert set(_FIXED) <= ours, "an entry in densebench/report/style.py is of nothing"
    looks = [entry.look for entry in Roster([*ours, "unknown", "unknown_too"])]
    assert len(set(looks)) == len(looks) == len(ours) + 2
