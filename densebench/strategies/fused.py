"""Normalized activations never exist: the 1x1 convolution normalizes and rectifies while it loads.

One feature buffer and one gradient buffer a block. A channel's statistics are computed once, when it is
written; each later norm reads them with its own gamma, beta and eps. In backward every layer touches the
channels before it in one pass; the two terms that come from the statistics wait, as two numbers a channel, for
the next pass (see `densebench.kernels.deferred`). Kept for backward are the feature buffer and the bottleneck
outputs, with `recompute="bottleneck"` the buffer alone. The stem's norm-ReLU-pool, the transition (pooled
before its 1x1 convolution: both are linear) and the final norm are taken over.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor

from densebench.execution.autograd import compute
from densebench.execution.fused_stage import FusedStage
from densebench.kernels import language
from densebench.models.stage import Stage
from densebench.registry import UnsupportedError, strategy

Recompute = Literal["nothing", "bottleneck"]
DEVICES = ("cpu", "cuda")
LEAST_CAPABILITY = (8, 0)  # older ones have too few registers and too little shared memory


@functools.cache
def _lack(device: torch.device) -> str | None:
    """What is missing to run on a device; None if nothing."""
    if device.type not in (*DEVICES, "meta"):
        return f"runs on {' and '.join(DEVICES)}, not on {device.type}"
    if device.type != "cuda" or not torch.cuda.is_available():  # a CPU, or a tensor that is only imagined
        return None
    if not language.AVAILABLE:
        return "needs Triton, which is not installed, on a GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST_CAPABILITY:
        least, this = (".".join(map(str, pair)) for pair in (LEAST_CAPABILITY, capability))
        return f"needs a GPU of compute capability {least} or newer, this one has {this}"
    return None


@strategy(
    "fused",
    summary="norm and ReLU inside the 1x1 kernel, statistics once, backward in one pass",
    bypasses="stage",
    derivatives="first",
)
def fused(stage: Stage, x: Tensor, recompute: Recompute = "nothing") -> Tensor:
    """Keep the feature buffer and each bottleneck output (or, recomputing it, the buffer alone).

    Layers without bottleneck have no 1x1 to fuse into: they go through one shared normalized buffer.

    Args:
        stage: the stage.
        x: [N, C, H, W] or [N, C, D, H, W], on a CPU or a CUDA device.
        recompute: "bottleneck" recomputes each bottleneck output [N H W, 4 k] in backward.

    Raises:
        UnsupportedError: on another device, on a GPU without Triton, or on one older than A100.
        ValueError: if `recompute` is unknown.
    """
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute={recompute!r}; known: {', '.join(get_args(Recompute))}")
    lack = _lack(x.device)
    if lack:
        raise UnsupportedError(f"strategy 'fused' {lack}; use 'shared_buffer' there")
    computation, inputs = FusedStage(stage, x, recompute == "bottleneck"), [x]
    del x  # `compute` gets the only reference, and may free the input of a stage without gradients
    return compute(computation, inputs.pop())


@strategy(
    "fused_recompute",
    summary="fused, and bottleneck outputs are recomputed in backward",
    bypasses="stage",
    derivatives="first",
)
def fused_recompute(stage: Stage, x: Tensor) -> Tensor:
    """Keep the feature buffer alone."""
    inputs = [x]
    del x
    return fused(stage, inputs.pop(), recompute="bottleneck")
