"""Predicted peaks lie within 2 % of what the allocator measures."""

from __future__ import annotations

import pytest

from densebench.contenders import get_contender
from densebench.kernels.products import multiplies_halves
from densebench.records import Case
from tests.conftest import lack
from tests.prediction.table import HEADER, TOLERANCE, combinations, compare, describe, nightly


@pytest.mark.parametrize("case", combinations(), ids=describe)
def test_peak(case: Case, request: pytest.FixtureRequest) -> None:
    missing = get_contender(case.strategy).missing()
    if missing:
        lack(request.config, missing)
    if case.dtype == "bfloat16" and case.strategy == "naive" and not multiplies_halves():
        pytest.skip(
            "what PyTorch's own operators convert where a processor multiplies no bfloat16 is not predicted"
        )
    comparison = compare(case)
    assert abs(comparison.error) <= TOLERANCE, f"\n{HEADER}\n{comparison.row()}"


@pytest.mark.nightly
@pytest.mark.parametrize("case", nightly(), ids=describe)
def test_peak_at_full_size(case: Case) -> None:
    comparison = compare(case)
    assert abs(comparison.error) <= TOLERANCE, f"\n{HEADER}\n{comparison.row()}"


def test_enough_is_compared() -> None:
    """40 combinations of model, strategy and mode at least, each kind of network and setting among them."""
    cases = combinations()
    assert len({describe(case) for case in cases}) >= 40
    assert {case.mode for case in cases} == {"train", "forward", "infer"}
    assert {"float32", "float64", "bfloat16"} <= {case.dtype for case in cases}
    assert any(case.autocast for case in cases)
    options = {name for case in cases for name in case.options}
    assert {"drop_rate", "output_stride", "bn_size"} <= options
