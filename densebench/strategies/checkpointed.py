"""Recompute each layer's concatenation, norm, ReLU and first convolution in backward.

What torchvision calls `memory_efficient` (Pleiss et al. 2017, arXiv 1707.06990), with one difference: a batch
norm that is recomputed does not move its running statistics a second time (pytorch/pytorch#96136).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from densebench.execution.batch_norm import call_norm, commit_copies
from densebench.execution.convolution import ConvOptions, convolve_as_given
from densebench.execution.structure import irregularity
from densebench.models.layers import DenseLayer
from densebench.models.stage import Stage
from densebench.registry import strategy


@strategy(
    "checkpointed",
    summary="recompute concatenation, norm, ReLU and 1x1 in backward",
    bypasses="block",
    objection=lambda stage: irregularity(stage, "block"),
)
def checkpointed(stage: Stage, x: Tensor) -> Tensor:
    """Keep each feature once and each bottleneck output; recompute what is quadratic in depth."""
    features = [stage.run_head(x)]
    del x
    for layer in stage.layers:
        new = checkpoint(_first_half(layer), *features, use_reentrant=False, preserve_rng_state=False)
        if layer.bottleneck:
            new = layer.conv2(layer.relu2(layer.norm2(new)))
        features.append(layer.dropout(new))
    x = torch.cat(features, 1)
    features.clear()  # without gradients they are no longer needed
    return stage.run_tail(x)


def _first_half(layer: DenseLayer) -> Callable[..., Tensor]:
    """cat-norm1-relu1-conv1 as a function that moves running statistics the first time only.

    What it works with is settled now: neither the modes, parameters or running statistics that the modules have
    at the time of backward (`torch.func.functional_call` puts others back by then) may change what is recomputed.
    """
    conv, call = layer.conv1, call_norm(layer.norm1).copied()
    gamma, beta, weight, options = call.norm.weight, call.norm.bias, conv.weight, ConvOptions.of(conv)
    versions: list[int] = []

    def run(*features: Tensor) -> Tensor:
        recomputing = bool(versions)
        used = [t for t in (gamma, beta, weight, *features) if t is not None and not t.is_inference()]
        _check_versions(used, versions)
        x = torch.cat(features, 1)
        # `call.running` are copies: recomputing may move them again, the module's own are stored once.
        x = F.batch_norm(x, *call.running, gamma, beta, call.by_batch, call.momentum, call.eps)
        if not recomputing:
            commit_copies([call])
        x = F.relu(x, inplace=not torch.is_grad_enabled())
        return convolve_as_given(x, options, weight)

    return run


def _check_versions(tensors: list[Tensor], versions: list[int]) -> None:
    """Note the versions of what is read, or refuse to recompute from what has been written since.

    Autograd does this for the tensors that it saves; what is recomputed from it does not see.
    """
    now = [tensor._version for tensor in tensors]
    if versions and versions != now:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            "a parameter or input of a layer that strategy 'checkpointed' recomputes has changed since the forward"
        )
    versions[:] = now
