"""Checkpointing for strategies: what backward recomputes moves no running statistics, and sees no later change.

`torch.utils.checkpoint` on modules is wrong in training: a norm that is called again moves its statistics again.
And it is wrong where modules change between forward and backward: their modes, a parameter that
`torch.func.functional_call` puts back. So layers are settled first, as functions of what they have now; a function
of settled layers can be recomputed:

    layers = settled_layers(stage.layers)
    new = recomputed(lambda *features: layers[0](torch.cat(features, 1)), layers[:1], *features)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from densebench.execution.batch_norm import NormCall, NormCalls, commit_copies
from densebench.execution.convolution import ConvOptions, convolve_as_given
from densebench.execution.plan import norms_and_convs
from densebench.models.dimensions import BatchNorm, Conv
from densebench.models.layers import DenseLayer
from densebench.registry import those_with


@dataclass(frozen=True)
class _Unit:
    """norm-ReLU-convolution. `call` holds copies of the running statistics, which each run may move."""

    call: NormCall
    gamma: Tensor | None
    beta: Tensor | None
    weight: Tensor
    options: ConvOptions

    @classmethod
    def of(cls, norm: BatchNorm, conv: Conv, calls: NormCalls) -> _Unit:
        return cls(calls.add(norm), norm.weight, norm.bias, conv.weight, ConvOptions.of(conv))

    def __call__(self, x: Tensor) -> Tensor:
        call = self.call
        x = F.batch_norm(x, *call.running, self.gamma, self.beta, call.by_batch, call.momentum, call.eps)
        x = F.relu(x, inplace=not torch.is_grad_enabled())
        return convolve_as_given(x, self.options, self.weight)


@dataclass(frozen=True)
class Settled:
    """A dense layer, or its first half, with the modes, parameters and statistics that it had when settled.

    Called with the channels before it, [N, C, H, W] (of volumes with a depth), it returns its own, [N, k, H, W];
    a first half those of the bottleneck.
    """

    units: tuple[_Unit, ...]
    drop_rate: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return F.dropout(x, self.drop_rate) if self.drop_rate > 0 else x


def settled_layers(layers: Sequence[DenseLayer]) -> list[Settled]:
    """Layers as functions. Settle together what is recomputed together: layers may share a norm."""
    calls = NormCalls(copied=True)
    return [
        Settled(
            tuple(_Unit.of(norm, conv, calls) for norm, conv in norms_and_convs(layer)),
            layer.drop_rate if layer.training else 0.0,
        )
        for layer in layers
    ]


def settled_first_half(layer: DenseLayer) -> Settled:
    """norm1-ReLU-conv1 of a layer as a function; without a bottleneck that is all of it but its dropout."""
    return Settled((_Unit.of(layer.norm1, layer.conv1, NormCalls(copied=True)),))


def recomputed(function: Callable[..., Tensor], settled: Sequence[Settled], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, of which nothing but the inputs is kept: backward runs it again.

    The running statistics of the norms move once, when the first run has come to its end.

    Args:
        function: calls the settled layers, each once, and no module.
        settled: the layers that it calls.
        inputs: what it is given, each kept.

    Raises:
        RuntimeError: in backward, if an input or a parameter has been written since.
        NotImplementedError: inside a gradient of torch.func.
    """
    units = [unit for one in settled for unit in one.units]
    parameters = [tensor for unit in units for tensor in (unit.gamma, unit.beta, unit.weight)]
    seen: list[list[int]] = []

    def run(*inputs: Tensor) -> Tensor:
        versions = [t._version for t in (*parameters, *inputs) if t is not None and not t.is_inference()]
        if seen:
            _check_versions(versions, seen[0])
            return function(*inputs)
        seen.append(versions)
        output = function(*inputs)
        commit_copies([unit.call for unit in units])
        return output

    if not torch.is_grad_enabled():
        return run(*inputs)
    _refuse_transforms()
    drawn = any(one.drop_rate > 0 for one in settled)
    output: Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=drawn)
    return output


def _check_versions(versions: list[int], before: list[int]) -> None:
    """Refuse to recompute from what has been written since the forward.

    Autograd does this for the tensors that it saves; what is recomputed from it does not see.
    """
    if versions != before:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            "a parameter or input of a layer that backward recomputes has changed since the forward"
        )


def _refuse_transforms() -> None:
    """PyTorch would ask for an issue about saved-tensor hooks, by which checkpointing works."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    if any(one.key() == torch._C._functorch.TransformType.Grad for one in stack):
        raise NotImplementedError(f"gradients of torch.func (grad, vjp, ...) work with {those_with('all')} only")
