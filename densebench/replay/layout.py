"""Inputs of a playback that are not what was recorded, or do not lie as that did.

PyTorch's version counters tell of values that have changed, not of `parameter.data = ...` between a forward and
its backward, nor of hooks that hand back a saved tensor laid out anew. Recorded strides would read other values.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densebench.replay.recording import ALIGNMENT, Input, Tensors


class NotAsRecordedError(RuntimeError):
    """A playback has met what was not met when it was recorded; its recording is of no use any more."""


def laid_out(tensors: Tensors, inputs: Sequence[Input]) -> Tensors:
    """The tensors; of those that lie in memory in another way than was recorded, copies that lie in that.

    Raises:
        NotAsRecordedError: if one has another shape, dtype or device, or would be written into and is a copy.
    """
    return [
        tensor if _lies_as(tensor, one) else _copy_lying_as(tensor, one)
        for tensor, one in zip(tensors, inputs, strict=True)
    ]


def _lies_as(tensor: Tensor, one: Input) -> bool:
    return (
        _is(tensor, one)
        and tensor.stride() == one.geometry.stride
        and tensor.data_ptr() % ALIGNMENT == one.alignment
    )


def _is(tensor: Tensor, one: Input) -> bool:
    return (tensor.shape, tensor.dtype, tensor.device) == (one.geometry.size, one.dtype, one.device)


def _copy_lying_as(tensor: Tensor, one: Input) -> Tensor:
    size, stride = one.geometry
    if one.written or not _is(tensor, one):
        raise NotAsRecordedError(
            f"a parameter or a tensor kept for backward was {one.dtype} of shape {list(size)} on {one.device}, "
            f"and is now {tensor.dtype} of shape {list(tensor.shape)} on {tensor.device}"
        )
    extents = zip(size, stride, strict=True)
    whole_rows = max((extent * step for extent, step in extents), default=1)  # as kernels may read them
    memory = tensor.new_empty(whole_rows + ALIGNMENT)
    first = (one.alignment - memory.data_ptr()) % ALIGNMENT // tensor.element_size()
    return memory.as_strided(size, stride, first).copy_(tensor)
