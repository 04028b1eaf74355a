"""How a kernel is launched: what the device is, which columns may be loaded, one way to start it."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densebench.kernels.language import triton
from densebench.kernels.started import STREAM, Started, watcher
from densebench.kernels.tiling import Tile, cdiv


class Device(NamedTuple):
    """What the choice of tiles depends on: how many programs run side by side, and the architecture."""

    multiprocessors: int
    capability: tuple[int, int]
    is_amd: bool = False

    @property
    def is_hopper(self) -> bool:
        return self.capability == (9, 0) and not self.is_amd  # of AMD's, MI200 is 9.0 and MI300 9.4


H100 = Device(132, (9, 0))
# The interpreter runs one program after the other: few, but more than one, so that partial results are merged.
_INTERPRETER = Device(3, (9, 0))
_meta_device = H100


@contextlib.contextmanager
def compiling_for(device: Device) -> Iterator[None]:
    """Let launches on meta tensors, which are compiled and not run, be those for another device."""
    global _meta_device
    before, _meta_device = _meta_device, device
    try:
        yield
    finally:
        _meta_device = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
    *,
    tile: Tile,
    **constants: Any,
) -> None:
    """Start a kernel on the current stream; the only place where one is started.

    Triton's launcher works out at every call what each argument specializes the kernel for: 17 us, seven
    hundred times a training step. What it looks at - dtypes, the alignment of addresses, numbers - is the key
    under which the compiled kernel is found here, in 4 us (both against a driver that does nothing). Knobs that
    are turned after the first launch are not looked at again, and Triton's own launch hooks (Proton's) are not
    called; PyTorch's profiler and NVIDIA's need none. Nor, on AMD, is it looked at whether a storage is beyond
    2 GiB, since numbers bound every offset.

    Args:
        kernel: takes pointers, then numbers, then constants.
        grid: how many programs along each axis.
        tensors: whose addresses the pointers are.
    """
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    key = (
        id(kernel),
        grid,
        # Each tensor's device, too: addresses are not checked, and one from elsewhere would end the context.
        *[None if tensor is None else (tensor.dtype, tensor.get_device()) for tensor in tensors],
        *[None if address is None else address % 16 for address in addresses],
        numbers,
        tile,
        *constants.items(),
    )
    found = _compiled.get(key)
    if found is None:
        found = _compile(key, kernel, grid, (*tensors, *numbers), tile, constants)
    else:
        found.launch(current_stream(), addresses, numbers)
    tell = watcher()
    if tell is not None:
        tell(None if found is None else found.started(tensors, numbers))


def current_stream() -> int:
    """The stream that kernels are started on."""
    active = triton.runtime.driver.active
    stream: int = active.get_current_stream(active.get_current_device())
    return stream


class Found(NamedTuple):
    """A compiled kernel: what a launcher takes beside the stream and what a call brings.

    Attributes:
        start: the launcher of a compiled kernel.
        programs: along three axes.
        function: the compiled kernel's, and its metadata; then what nobody is there for: a profiler's, two hooks.
        constants: in the order of the kernel's parameters.
        owners: the kernel, and what owns the function; alive, so that no other kernel gets this one's id.
    """

    start: Callable[..., None]
    programs: tuple[int, ...]
    function: tuple[Any, ...]
    constants: tuple[Any, ...]
    owners: tuple[Any, ...]

    @property
    def name(self) -> str:
        """Of the kernel, with its file."""
        kernel = self.owners[0]
        return f"{kernel.__module__.rsplit('.', 1)[-1]}.{kernel.__name__}"

    def launch(self, stream: int, addresses: Sequence[int | None], numbers: tuple[int, ...]) -> None:
        """Start it; nothing is checked."""
        self.start(*self.programs, stream, *self.function, *addresses, *numbers, *self.constants)

    def started(self, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...]) -> Started:
        """What `launch` does."""
        arguments = (*self.programs, STREAM, *self.function, *tensors, *numbers, *self.constants)
        start, arguments = _without_scratch(self.start, arguments)
        return Started(start, self.name, arguments, self.owners)


def _without_scratch(start: Any, arguments: tuple[Any, ...]) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """The function in C behind Triton's launcher and what it is handed, where a kernel needs no scratch memory.

    Looking for scratch that is not needed takes the launcher a microsecond. It is asked once what it hands on:
    that differs between versions of Triton.
    """
    sizes = [getattr(start, name, 1) for name in ("global_scratch_size", "profile_scratch_size")]
    if any(sizes) or getattr(start, "gsan_enabled", False) or not hasattr(start, "launch"):
        return start, arguments
    handed: list[tuple[Any, ...]] = []
    asked = copy.copy(start)
    asked.launch = lambda *given: handed.append(given)
    asked(*arguments)
    return start.launch, handed[0]


_compiled: dict[tuple[Any, ...], Found] = {}
_MOST_COMPILED = 2**15  # each size of input takes some 400 of them, and a training run may see any number of sizes


def _compile(
    key: tuple[Any, ...],
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    tile: Tile,
    constants: dict[str, Any],
) -> Found | None:
    """Launch through Triton, which compiles what it has not compiled yet; remember what it launched."""
    limit = {} if tile.registers is None else {"maxnreg": tile.registers}
    compiled = kernel[grid](*arguments, **constants, num_warps=tile.warps, num_stages=tile.stages, **limit)
    if compiled is None:  # interpreted, or only recorded
        return None
    if len(_compiled) >= _MOST_COMPILED:
        _compiled.clear()
    values = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
    function = (compiled.function, compiled.packed_metadata, None, None, None)
    _compiled[key] = found = Found(compiled.run, (*grid, 1, 1)[:3], function, values, (kernel, compiled))
    return found


def device_of(x: Tensor) -> Device:
    """The device that kernels on x run on."""
    if x.is_cuda:
        return _cuda_device(x.get_device())
    return _meta_device if x.is_meta else _INTERPRETER


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return Device(properties.multi_processor_count, capability, is_amd=torch.version.hip is not None)


def loadable(x: Tensor) -> int:
    """How many columns of each row of a slice [M, C] may be loaded: C, or more where C would keep loads narrow.

    A mask at column C allows 16-byte loads only if C is a multiple of 16. The first columns of a wider buffer
    whose row stride is such a multiple may be loaded whole, and masked in registers.
    """
    columns, stride = x.shape[1], x.stride(0)
    if columns % 16 == 0 or stride % 16 != 0 or stride < columns or x.storage_offset() % stride != 0:
        return columns
    rows_end = (x.storage_offset() + x.shape[0] * stride) * x.element_size()
    return cdiv(columns, 16) * 16 if rows_end <= x.untyped_storage().nbytes() else columns


def pixel_stride(x: Tensor) -> int:
    """Values from one pixel of [N, H, W, C] to the next; the stride of an extent of 1 means nothing."""
    return next((x.stride(extent) for extent in (2, 1, 0) if x.shape[extent] > 1), x.shape[3])


def matmul_precision(dtype: torch.dtype) -> str:
    """How products of float32 are computed: as PyTorch is told to compute convolutions.

    Not `cudnn.allow_tf32`: reading that raises once precisions have been set one by one.
    """
    if dtype != torch.float32:  # first: reading the setting takes as long as a launch
        return "ieee"
    convolutions: str = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return "tf32" if convolutions == "tf32" else "ieee"
