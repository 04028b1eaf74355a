"""What stands around the answer: the numbers beneath it, its scope, its picture, and the least gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import matplotlib
import numpy as np

from densebench.records import Record
from densebench.report.blocks import Prose
from densebench.report.comparison_tables import main_table
from densebench.report.figure_answer import answer_picture, paint_answer
from densebench.report.fits import Fit
from densebench.report.key_figures import KeyFigure, key_figures
from densebench.report.report import make_report
from densebench.report.sections import naive_section
from densebench.report.selection import Comparison, comparisons
from densebench.report.sources import Loaded
from densebench.report.style import RC, Roster
from tests.report.records import GIB, MIB, make_case, timed

CROSS = "\N{MULTIPLICATION SIGN}"


def _run(**changes: object) -> list[Record]:
    """naive, two strategies of which the smaller is the slower, three peers alike, and another network."""
    times = {
        "naive": 0.1,
        "fused": 0.05,
        "fused_recompute": 0.06,
        "torchvision": 0.099,
        "timm": 0.0985,
        "monai": 0.098,
    }
    sizes = {"fused": GIB // 4, "fused_recompute": GIB // 8}
    records = [
        timed(make_case(name, **changes), sizes.get(name, GIB), [time] * 20) for name, time in times.items()
    ]
    return [*records, timed(make_case("eager", model="resnet50", **changes), GIB // 2, [0.09] * 20)]


def _comparison(records: Sequence[Record]) -> Comparison:
    return comparisons(records, Roster.of(records))[0]


def test_the_smallest_the_fastest_and_the_best_of_the_others() -> None:
    comparison = _comparison(_run())
    winner = next(row for row in comparison.rows if row.name == "fused_recompute")
    assert key_figures(comparison, winner) == (
        KeyFigure("activation memory, fused_recompute", "128 MiB", f"↓ less: 0.12{CROSS} the 1,024 MiB of naive"),
        KeyFigure(
            "time of a step, fused_recompute",
            "60.0 ms",
            f"↑ faster: 0.60{CROSS} (0.60 to 0.60) the 100 ms of naive",
        ),
        KeyFigure(
            "time of a step, fused",
            "50.0 ms",
            f"↑ faster: 0.50{CROSS} (0.50 to 0.50) the 100 ms of naive, at 0.25{CROSS} its memory",
        ),
        KeyFigure(
            "time of a step, monai",
            "98.0 ms",
            f"the fastest other way to run this network; fused_recompute: 0.61{CROSS} (0.61 to 0.61) of it",
        ),
        KeyFigure(
            "activation memory, ResNet-50",
            "512 MiB",
            f"at 711 img/s; fused_recompute: 0.25{CROSS} its memory, 1.50{CROSS} its speed",
        ),
    )


def test_what_fits_a_card_is_told_where_it_was_tried() -> None:
    comparison = _comparison(_run())
    winner = next(row for row in comparison.rows if row.name == "fused_recompute")
    sizes = {"naive": 191, "fused": 868, "fused_recompute": 1581}
    fitting = [Fit(name, name, {24: (batch,)}, True, None, "") for name, batch in sizes.items()]
    (found,) = [one for one in key_figures(comparison, winner, fitting) if "24 GiB" in one.term]
    assert found == KeyFigure(
        "largest batch in 24 GiB, predicted, fused_recompute", "1,581", "instead of 191 of naive; fused 868"
    )
    for less in (fitting[1:], fitting[:2]):
        assert not [one for one in key_figures(comparison, winner, less) if "24 GiB" in one.term]


def test_an_incorrect_peer_is_not_the_fastest() -> None:
    records = _run()
    records[5] = dataclasses.replace(records[5], status="incorrect")
    comparison = _comparison(records)
    winner = next(row for row in comparison.rows if row.name == "fused")
    assert [figure.term for figure in key_figures(comparison, winner)][2] == "time of a step, timm"


def test_that_no_gpu_was_measured_is_said_and_only_then() -> None:
    on_cpu = _run(device="cpu", autocast=None)
    for records, said in ((on_cpu, True), ([*on_cpu, *_run()], False)):
        scope = make_report(Loaded(records)).answer.scope
        assert ("No GPU" in (scope or "")) is said


def test_the_line_joins_what_none_beats_and_peers_share_a_label() -> None:
    comparison = _comparison(_run())
    with matplotlib.rc_context(RC):
        axes = paint_answer(comparison).figure.axes[0]
        (line,) = [line for line in axes.lines if np.size(line.get_xdata()) == 2 and line.get_zorder() == 1.5]
        assert np.asarray(line.get_ydata()).tolist() == [GIB // 8, GIB // 4]
        texts = [text.get_text() for text in axes.texts]
    assert "torchvision, timm, monai" in texts
    assert {"naive", "fused", "fused_recompute"} <= set(texts)


def test_what_is_incorrect_is_not_on_the_line() -> None:
    """However small and fast."""
    wrong = timed(make_case("torchvision"), GIB // 16, [0.01] * 20)
    comparison = _comparison([*_run()[:3], dataclasses.replace(wrong, status="incorrect")])
    with matplotlib.rc_context(RC):
        axes = paint_answer(comparison).figure.axes[0]
        (line,) = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_zorder() == 1.5]
    assert list(line.get_ydata()) == [GIB // 8, GIB // 4]


def test_what_is_incorrect_says_why_and_has_no_verdict() -> None:
    records = _run()
    wrong = dataclasses.replace(records[3], status="incorrect", reason="buffers off by 6.9e-02 (naive: 2.0e-07)")
    comparison = _comparison([*records[:3], wrong, *records[4:]])
    picture = answer_picture(comparison)
    assert picture is not None
    assert "Incorrect: torchvision, buffers off by 6.9e-02 (naive: 2.0e-07)." in picture.caption
    table = main_table(comparison)
    verdicts = {row[0]: row[table.columns.index("verdict")] for row in table.rows}
    assert verdicts["torchvision"] == "incorrect"
    assert verdicts["timm"] == "= same speed"


def test_the_least_gain_is_told() -> None:
    """Of the fastest strategy of each comparison."""
    other = [timed(make_case(name, batch=8), size, [time] * 20) for name, size, time in (
        ("naive", GIB, 0.1), ("fused", GIB // 4, 0.09), ("fused_recompute", 90 * MIB, 0.11)
    )]  # fmt: skip
    records = [*_run(), *other]
    blocks = naive_section(comparisons(records, Roster.of(records))).blocks
    (text,) = [block.text for block in blocks if isinstance(block, Prose)]
    assert f"The least gain: 0.90{CROSS} naive's time, Training step: DenseNet-121, batch 8" in text
    assert "Batches were 8 to 64." in text
