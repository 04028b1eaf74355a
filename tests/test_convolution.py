"""Products that stand for 1x1 convolutions: in float32 they are run as such."""

from __future__ import annotations

import pytest
import torch

from densebench.execution import convolution


@pytest.mark.parametrize("rows", [35, 37, 48])
@pytest.mark.parametrize("as_convolution", [False, True])
def test_products_and_their_weight_gradient(
    monkeypatch: pytest.MonkeyPatch, as_convolution: bool, rows: int
) -> None:
    """Operands as the strategy hands them over: a dense matrix, a slice of rows, a transposed weight."""
    monkeypatch.setattr(convolution, "_is_left_to_convolutions", lambda a: as_convolution)
    generator = torch.Generator().manual_seed(0)
    wide, grad = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (12, 7))
    weight = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    for a in (wide[:, :9].contiguous(), wide[:, :9]):
        torch.testing.assert_close(convolution.product(a, weight), a @ weight.t())
        torch.testing.assert_close(convolution.product_weight_gradient(grad, a), grad.t() @ a)
    torch.testing.assert_close(convolution.product(grad, weight.t()), grad @ weight)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
def test_products_in_float32_are_left_to_onednn(threads: int) -> None:
    """8 images of 7 x 7 pixels are none that PyTorch takes to be enough for it, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            convolution.product(torch.randn(8 * 7 * 7, 256), torch.randn(128, 256))
    finally:
        torch.set_num_threads(before)
    assert "aten::mkldnn_convolution" in {event.key for event in profiler.key_averages()}
