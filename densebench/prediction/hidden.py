"""What operators allocate inside themselves, which no tracker at dispatch level sees, on a CPU.

Each formula says why the bytes are needed. They were read off PyTorch's allocator event by event (PyTorch 2.13,
oneDNN 3.12, 2 threads, with AVX-512 and without) and explained, not fitted; tests/prediction/test_hidden.py holds
each of them against the allocator of the machine it runs on. Not modelled: convolutions of contiguous 16-bit maps
on processors with AMX, whose tiles are laid out otherwise; they take up to two maps more. On CUDA nothing of this
applies: see `densebench.prediction.cuda`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from densebench.formats import CHANNELS_LAST
from densebench.kernels.library import WORKSPACE

aten = torch.ops.aten

# oneDNN's scratchpad of a forward convolution in channels-last: constant but for the widest 1x1.
ONEDNN_SCRATCH_BYTES = 12_336
_FLOATS = 8  # float32 numbers in a vector register without AVX-512

Formula = Callable[..., int]
_FORMULAS: dict[Any, Formula] = {}


def hidden_on_cpu(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    """Bytes that a call allocates inside and frees before it returns; 0 where nothing is known."""
    packet = func._overloadpacket
    if packet in WORKSPACE:
        return WORKSPACE[packet](*args, **kwargs)
    formula = _FORMULAS.get(packet)
    return 0 if formula is None else formula(result, *args)


def _formula(packet: Any) -> Callable[[Formula], Formula]:
    def register(formula: Formula) -> Formula:
        _FORMULAS[packet] = formula
        return formula

    return register


@_formula(aten.native_batch_norm_backward)
def _batch_norm_backward(result: Any, grad: Tensor, x: Tensor, *rest: Any) -> int:
    """batch_norm_backward_cpu makes its result twice: `grad_input` is assigned anew with the first alive."""
    wanted = rest[-1]
    return x.nbytes if wanted[0] else 0


@_formula(aten.convolution)
def _convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> int:
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    backend = _backend(x, weight, None if bias is None else list(bias.shape), settings)
    if backend.startswith("Slow"):
        return _columns_bytes(backend, x, weight, out, stride, padding)
    if backend != "Mkldnn":
        return 0
    if _runs_channels_last(x, weight):
        # Maps are used as they lie; the weight is reordered into oneDNN's blocks of filters.
        return _blocked(weight, 0) + _dense_copy(x) + ONEDNN_SCRATCH_BYTES
    blocked_weight = _blocked(weight, 0, 1)
    # Input, weight and output in blocks of channels; then the output in its own layout beside the blocked one.
    blocked_x, blocked_out = _blocked_map(x), _blocked(out, 1)
    return max(blocked_x + blocked_weight + blocked_out - out.nbytes, blocked_out)


@_formula(aten.convolution_backward)
def _convolution_backward(
    results: Sequence[Tensor | None],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> int:
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    backend = _backend(x, weight, bias_sizes, settings)
    if backend.startswith("Slow"):
        return _columns_bytes(backend, x, weight, grad, stride, padding)
    if backend != "Mkldnn":
        return 0
    blocked_weight = _blocked(weight, 0, 1)
    last = _runs_channels_last(x, weight)
    unfolding = wanted[1] and _unfolds(x, weight, padding, dilation)
    unfolded = _unfolded_bytes(grad, x, weight, last) if unfolding else 0
    if last:
        # The weight's gradient in blocks, and a second one that the threads' shares are added up in.
        weights = unfolded or blocked_weight + weight.nbytes
        # In 16 bits it also transposes image by image, whatever the batch: one image of both is charged.
        transposed_image = 0 if x.element_size() > 2 else (x.nbytes + grad.nbytes) // max(1, x.shape[0])
        return weights + transposed_image + _dense_copy(x) + _dense_copy(grad)
    blocked_x, blocked_grad = _blocked_map(x), _blocked(grad, 1)
    grad_x, grad_weight = x.nbytes * wanted[0], weight.nbytes * wanted[1]
    of_data = max(blocked_grad + blocked_weight + blocked_x, blocked_x + grad_x) if wanted[0] else 0
    in_blocks = max(blocked_x + blocked_grad + blocked_weight, blocked_weight + grad_weight)
    of_weight = grad_x + (unfolded + grad_weight if unfolding else in_blocks)
    return max(of_data, of_weight if wanted[1] else 0) - grad_x - grad_weight


def _unfolds(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether oneDNN takes the weight's gradient by matrix products of unfolded slices (`x64:gemm:jit`).

    It does in float32 without AVX-512, where its direct kernel knows neither dilation, nor padding in depth, nor
    images lower or shallower than the filter (`jit_avx2_conv_bwd_weights_kernel_f32_t::init_conf`, oneDNN 3.12).
    """
    if x.dtype != torch.float32 or _has_avx512() or math.prod(weight.shape[2:]) == 1:
        return False
    low = any(taps > side for taps, side in zip(weight.shape[2:-1], x.shape[2:-1], strict=True))
    return low or any(step > 1 for step in dilation) or (len(padding) == 3 and padding[0] > 0)


def _unfolded_bytes(grad: Tensor, x: Tensor, weight: Tensor, channels_last: bool) -> int:
    """oneDNN's scratch for such a gradient: `init_conf` in its gemm_convolution_utils.cpp (3.12).

    Each thread that has images of its own unfolds one slice of an image (of a volume: one depth), transposes the
    whole image first if it lies in channels-last, and has a share of the gradient, for which four times its bytes
    are booked. Large slices are cut where all this would exceed a limit.
    """
    threads = torch.get_num_threads()
    pixels = math.prod(grad.shape[-2:])
    column = x.shape[1] * math.prod(weight.shape[2:]) * x.element_size()
    share = 4 * weight.nbytes
    limit = min(2**30, 15 * threads * (x.nbytes + weight.nbytes + grad.nbytes))
    image = x.nbytes // x.shape[0] if channels_last else 0
    least = share + image + column * (pixels if channels_last else _FLOATS)
    apart = threads * least < limit and pixels // threads < 256 and x.shape[0] > 1
    users = threads if apart else 1
    available = limit - users * share
    if not channels_last and available < users * column * pixels:
        pixels = max(_FLOATS, int(available // (users * column) * 0.05))
    return users * (column * pixels + share + image)


def _backend(x: Tensor, weight: Tensor, bias_sizes: Sequence[int] | None, settings: Sequence[Any]) -> str:
    """The name of the implementation that PyTorch chooses; "" where it does not tell."""
    select = getattr(torch._C, "_select_conv_backend", None)
    if select is None:
        return ""
    stride, padding, dilation, transposed, output_padding, groups = settings
    chosen = select(
        x,
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        output_padding=output_padding,
        groups=groups,
        bias=None,
        bias_sizes=bias_sizes or None,
    )
    return str(chosen).rsplit(".", 1)[-1]


def _columns_bytes(
    backend: str, x: Tensor, weight: Tensor, out: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> int:
    """PyTorch's own convolutions (float64, for one) unfold the input: a column of taps for each output pixel.

    The dilated ones unfold one image at a time, the others the batch, but not for a plain 1x1.
    """
    taps = math.prod(weight.shape[2:])
    pixels = math.prod(out.shape[2:])
    columns = x.shape[1] * taps * pixels * x.element_size()
    if "Dilated" in backend:
        return columns
    plain = taps == 1 and all(s == 1 for s in stride) and not any(padding)
    copies = 0 if backend != "Slow3d" or x.is_contiguous() else x.nbytes + weight.nbytes
    return copies + (0 if plain else x.shape[0] * columns)


def _runs_channels_last(x: Tensor, weight: Tensor) -> bool:
    """oneDNN runs in channels-last if the input or the weight lies that way; of one channel, strides tell."""
    last = CHANNELS_LAST.get(x.dim())
    return last is not None and any(suggest_memory_format(tensor) is last for tensor in (x, weight))


def _dense_copy(x: Tensor) -> int:
    """The copy that is made of a map which is not dense in channels-last, such as a slice of a wider one."""
    return 0 if x.is_contiguous(memory_format=CHANNELS_LAST[x.dim()]) else x.nbytes


def _blocked_map(x: Tensor) -> int:
    """An input in blocks of channels; one of 3 channels or fewer (an image) is read as it lies."""
    return 0 if x.shape[1] <= 3 else _blocked(x, 1)


def _blocked(x: Tensor, *dimensions: int) -> int:
    """Bytes of a tensor whose channel dimensions are rounded up to the width of a vector register."""
    block = 16 if _has_avx512() else _FLOATS
    shape = [-(-size // block) * block if at in dimensions else size for at, size in enumerate(x.shape)]
    return math.prod(shape) * x.element_size()


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
