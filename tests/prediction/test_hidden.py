"""What operators allocate inside themselves is what the formulas say, on the machine the test runs on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from densebench.prediction.hidden import hidden_on_cpu

aten = torch.ops.aten
SMALL = 128 * 1024  # scratch that depends on the machine and not on the batch: threads' buffers, oneDNN's own


def _seen(func: Any, args: tuple[Any, ...], folder: Path) -> tuple[int, Any]:
    """Bytes that a call allocated and released inside itself, and its result."""
    func(*args)  # whatever libraries keep from a first call
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler, record_function("measured"):
        result = func(*args)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    mark = next(e for e in events if e.get("name") == "measured" and e.get("ph") == "X")
    inside = [
        e for e in events if e.get("name") == "[memory]" and mark["ts"] <= e["ts"] <= mark["ts"] + mark["dur"]
    ]
    live = peak = 0
    for event in sorted(inside, key=lambda e: e["ts"]):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak - live, result


def _maps(dtype: torch.dtype, channels_last: bool, dimensions: int = 2) -> Callable[..., Tensor]:
    last = torch.channels_last if dimensions == 2 else torch.channels_last_3d

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).contiguous(
            memory_format=last if channels_last else torch.contiguous_format
        )

    return make


def _convolutions() -> Iterator[Any]:
    """(dtype, channels-last?, dimensions, channels in and out, size, kernel, stride, dilation)"""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for channels_last in (True, False):
            for shape in ((2, 64, 128, 28, 1, 1, 1), (2, 128, 32, 28, 3, 1, 1), (2, 64, 64, 28, 3, 1, 2)):
                yield pytest.param(dtype, channels_last, *shape, id=f"{dtype}-{channels_last}-{shape}")
    yield pytest.param(torch.float32, True, 3, 64, 32, 12, 3, 1, 1, id="3d")
    yield pytest.param(torch.float64, False, 3, 32, 16, 8, 3, 1, 1, id="3d float64")
    yield pytest.param(torch.float64, False, 2, 64, 32, 28, 1, 2, 1, id="strided 1x1 float64")


@pytest.mark.parametrize(
    ("dtype", "channels_last", "dimensions", "channels", "filters", "size", "kernel", "stride", "dilation"),
    list(_convolutions()),
)
def test_convolution(
    dtype: torch.dtype,
    channels_last: bool,
    dimensions: int,
    channels: int,
    filters: int,
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    tmp_path: Path,
) -> None:
    if dtype == torch.bfloat16 and not channels_last and _multiplies_with_amx():
        pytest.skip("not modelled: oneDNN's AMX convolutions; ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 rules them out")
    maps = _maps(dtype, channels_last, dimensions)
    x = maps(8, channels, *[size] * dimensions)
    weight = maps(filters, channels, *[kernel] * dimensions)
    padding = [dilation * (kernel // 2)] * dimensions
    settings = ([stride] * dimensions, padding, [dilation] * dimensions, False, [0] * dimensions, 1)
    seen, out = _seen(aten.convolution.default, (x, weight, None, *settings), tmp_path)
    _agree(seen, hidden_on_cpu(aten.convolution.default, (x, weight, None, *settings), {}, out), x)
    backward = (torch.randn_like(out), x, weight, [0], *settings, [True, True, False])
    seen, results = _seen(aten.convolution_backward.default, backward, tmp_path)
    _agree(seen, hidden_on_cpu(aten.convolution_backward.default, backward, {}, results), x)


@pytest.fixture(params=[1, 2, 5, 64])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("batch", "channels", "filters", "size", "dilation"),
    [
        pytest.param(4, 64, 32, (12, 12, 12), 1, id="small slices"),
        pytest.param(2, 32, 16, (4, 40, 40), 1, id="slices that threads share"),
        pytest.param(2, 64, 16, (20, 20), 2, id="dilated"),
        pytest.param(2, 128, 32, (4, 48, 48), 1, id="too much for many threads, cut or one at a time"),
        pytest.param(1, 32, 16, (28, 28, 28), 1, id="one volume"),
        pytest.param(8, 128, 32, (2, 9), 1, id="lower than the filter"),
    ],
)
def test_unfolded_gradient(
    batch: int,
    channels: int,
    filters: int,
    size: tuple[int, ...],
    dilation: int,
    channels_last: bool,
    threads: int,
    tmp_path: Path,
) -> None:
    """To a cache line or so for each thread: nothing else is allocated."""
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        pytest.skip("oneDNN unfolds nothing where it has AVX-512")
    axes = len(size)
    maps = _maps(torch.float32, channels_last, axes)
    x, grad = maps(batch, channels, *size), maps(batch, filters, *size)
    weight = maps(filters, channels, *[3] * axes)
    settings = ([1] * axes, [dilation] * axes, [dilation] * axes, False, [0] * axes, 1)
    arguments = (grad, x, weight, [0], *settings, [False, True, False])
    seen, results = _seen(aten.convolution_backward.default, arguments, tmp_path)
    formula = hidden_on_cpu(aten.convolution_backward.default, arguments, {}, results)
    assert 0 <= seen - formula <= 1024


def _multiplies_with_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return supported() and "ONEDNN_MAX_CPU_ISA" not in os.environ


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_batch_norm(dtype: torch.dtype, channels_last: bool, tmp_path: Path) -> None:
    x, w = _maps(dtype, channels_last)(8, 64, 28, 28), torch.rand(64, dtype=dtype)
    _, mean, inv_std = aten.native_batch_norm(x, w, w, None, None, True, 0.1, 1e-5)
    arguments = (torch.randn_like(x), x, w, w, w, mean, inv_std, True, 1e-5, [True, True, True])
    seen, results = _seen(aten.native_batch_norm_backward.default, arguments, tmp_path)
    _agree(seen, hidden_on_cpu(aten.native_batch_norm_backward.default, arguments, {}, results), x)


def _agree(seen: int, formula: int, x: Tensor) -> None:
    """To a scratch that does not grow with the batch, or (16 bits: see the formula) an image's worth."""
    images = 4 * x.nbytes // x.shape[0] if x.element_size() == 2 else 0
    assert abs(seen - formula) <= SMALL + 0.01 * seen + images, (seen, formula)
