"""Products that stand for 1x1 convolutions: in float32 they are run as such."""

from __future__ import annotations

import pytest
import torch

from densebench.execution import convolution


@pytest.mark.parametrize("as_convolution", [False, True])
def test_products_and_their_weight_gradient(monkeypatch: pytest.MonkeyPatch, as_convolution: bool) -> None:
    """Operands as the strategy hands them over: a dense matrix, a slice of rows, a transposed weight."""
    monkeypatch.setattr(convolution, "_is_left_to_convolutions", lambda a: as_convolution)
    generator = torch.Generator().manual_seed(0)
    wide, grad = (torch.randn(35, n, generator=generator, dtype=torch.float64) for n in (12, 7))
    weight = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    for a in (wide[:, :9].contiguous(), wide[:, :9]):
        torch.testing.assert_close(convolution.product(a, weight), a @ weight.t())
        torch.testing.assert_close(convolution.product_weight_gradient(grad, a), grad.t() @ a)
    torch.testing.assert_close(convolution.product(grad, weight.t()), grad @ weight)
