"""The largest batch: what was traced in any run is shown, and estimates are held to the same rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from densebench.capacities import CAPACITIES_GIB
from densebench.prediction.cuda import CONTEXT_BYTES, cublas_bytes
from densebench.records import Record
from densebench.report.blocks import Prose
from densebench.report.capacity import capacity_section, settings
from densebench.report.fits import Affine, affine, fits
from densebench.report.style import Roster
from densebench.report.tables import Table
from densebench.report.units import CROSS
from tests.report.conftest import Made
from tests.report.records import GIB, MIB, fit_records, full_size, make_case, make_record, timed

WORDS = f"DenseNet-121, 224{CROSS}224, float32"
PIXELS = 4 * 3 * 224 * 224
ON_TOP = CONTEXT_BYTES + cublas_bytes(None, "train")


def _cells(table: Table, row: str) -> dict[str, str]:
    line = next(line for line in table.rows if line[0] == row)
    return {name: str(cell) for name, cell in zip(table.columns, line, strict=True)}


def _tables(records: list[Record]) -> list[Table]:
    return capacity_section(records, Roster.of(records)).tables()


def _prose(records: list[Record]) -> str:
    blocks = capacity_section(records, Roster.of(records)).blocks
    return " ".join(block.text for block in blocks if isinstance(block, Prose))


def _step(name: str = "naive", run: str = "one", per_image: int = 128 * MIB, **changes: Any) -> Record:
    """A step that was predicted; of its peak 64 MiB do not grow with the batch, nor do they in any other run."""
    case = make_case(name, batch=8, autocast=None, source="predicted", device="cpu")
    case = dataclasses.replace(case, **changes)
    activations = case.batch * (per_image - PIXELS)
    peak = 64 * MIB + case.batch * per_image
    record = make_record(case, peak_delta_bytes=activations, peak_allocated_bytes=peak)
    return dataclasses.replace(record, run=run)


def _traced(name: str = "naive", run: str = "one", per_image: int = 128 * MIB) -> list[Record]:
    """What tracing answers for the same network: the driver and the workspaces are counted in."""
    records = []
    for gib in CAPACITIES_GIB:
        batch = (gib * GIB - ON_TOP - 64 * MIB) // per_image
        options = {"capacity_gib": gib, "largest_batch": batch}
        case = make_case(name, kind="fit", batch=batch, autocast=None, source="predicted", options=options)
        records.append(dataclasses.replace(make_record(case), run=run))
    return records


def test_largest_batch_is_that_of_the_line() -> None:
    fixed, image = 100 * MIB, 128 * MIB
    records = []
    for batch in (8, 32):
        record = timed(make_case(batch=batch), image * batch, [0.1] * 5)
        records.append(dataclasses.replace(record, peak_allocated_bytes=fixed + image * batch))
    line = affine(records)
    assert line is not None
    assert line.largest(8 * GIB) == (8 * GIB - CONTEXT_BYTES - fixed) // image, "its workspaces are in the peak"
    assert line.largest(MIB) == 0
    alone = affine(records[:1])
    assert alone is not None
    assert alone.per_image == pytest.approx(image + PIXELS), "one batch: activations and input grow, nothing else"
    assert affine([]) is None


def test_far_from_what_is_known_an_estimate_has_two_digits() -> None:
    line = Affine(0.0, 1.0, known=64)
    assert [line.shown(batch) for batch in (6399, 36506, 12999)] == [6399, 36000, 12000]
    assert Affine(0.0, 1.0, known=1).shown(156) == 150


def test_batches_that_were_tried_stand_for_themselves() -> None:
    records = [timed(make_case(name), GIB, [0.1] * 5) for name in ("naive", "fused")]
    (table,) = _tables([*records, *fit_records()])
    naive = _cells(table, "naive")
    assert naive["8 GiB"] == "56"
    assert naive["24 GiB"].startswith("≈")
    assert naive["known from"] == "run at 8, 16 GiB; batch 64 on Synthetic GPU"


def test_an_estimate_subtracts_what_a_traced_answer_does() -> None:
    """torchvision needs what naive needs, to the byte: so many images more or fewer cannot fit."""
    (table,) = _tables([_step(), _step("torchvision"), *_traced()])
    naive, torchvision = _cells(table, "naive"), _cells(table, "torchvision")
    assert naive["known from"] == "traced"
    assert torchvision["known from"] == "batch 8, predicted"
    for gib in CAPACITIES_GIB:
        assert torchvision[f"{gib} GiB"] == f"≈ {naive[f'{gib} GiB']}"


def test_what_any_run_traced_is_taken() -> None:
    """One table, though the first run did not trace, and a later one has a contender more."""
    first = [_step("naive", "one"), _step("fused", "one", 20 * MIB)]
    second = [*_traced("naive", "two"), _step("fused_recompute", "two", 10 * MIB)]
    (table,) = _tables([*first, *second])
    assert "≈" not in "".join(_cells(table, "naive").values())
    assert [row[0] for row in table.rows] == ["naive", "fused", "fused_recompute"]
    assert table.caption == f"Largest batch. Training step: {WORDS}"


def test_the_bound_of_estimates_is_that_of_the_records() -> None:
    known = [_step(), _step("fused", per_image=20 * MIB), *_traced(), *_traced("fused", per_image=25 * MIB)]
    assert "Where a number without ≈ is known, an estimate would be off by 0.0 % to +25." in _prose(known)
    assert f"10 cases of {WORDS}. The farthest is fused at" in _prose(known)
    assert "how far off estimates are is not known" in _prose([_step()])


def test_runs_that_traced_the_same_are_counted() -> None:
    alike = [*_traced(), *_traced(run="two")]
    assert "All 5 such numbers were found in several runs, which agree." in _prose(alike)
    apart = [*_traced(), *_traced(run="two", per_image=129 * MIB)]
    assert "found in several runs, which differ by up to" in _prose(apart)
    assert "several runs" not in _prose(_traced())


def test_of_each_contender_what_ran_on_a_gpu_comes_first() -> None:
    """Then what was predicted, then what ran on a CPU; a line is never drawn through two of these."""
    measured = timed(make_case(autocast=None), GIB, [0.1] * 5)
    on_cpu = [
        timed(make_case(name, autocast=None, device="cpu", batch=2), GIB, [0.1] * 5) for name in ("naive", "timm")
    ]
    records = [*on_cpu, *full_size(), measured]
    roster = Roster.of(records)
    (members,) = settings(records, roster)
    sources = {fit.name: fit.source for fit in fits(members, roster)}
    assert sources["naive"] == "batch 64 on Synthetic GPU"
    assert sources["fused"] == "batch 64, predicted"
    assert sources["timm"] == "batch 2 on a CPU"


def test_networks_are_not_mixed(gpu: Made) -> None:
    roster = Roster.of(r for r in gpu.records if r.case.kind != "kernel")
    records = [r for r in gpu.records if r.case.kind != "kernel"]
    for members in settings(records, roster):
        own = {r.case.model for r in members if roster[r.case.strategy].family != "yardstick"}
        assert len(own) == 1
    tables = _tables(records)
    captions = [table.caption for table in tables]
    assert len(captions) == len(set(captions)) > 3
    for table in tables:
        names = [row[0] for row in table.rows]
        assert len(names) == len(set(names))
