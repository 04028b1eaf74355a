"""What one run of a stage needs besides differentiable tensors: what each norm does, where parameters stand.

A strategy that computes a stage in one autograd function gets its parameters as one flat list; a unit knows
its place in it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from densebench.execution.batch_norm import NormCall, NormCalls
from densebench.execution.convolution import ConvOptions
from densebench.kernels.norm import Norm
from densebench.models.dimensions import BatchNorm, Conv
from densebench.models.layers import DenseLayer, Transition
from densebench.models.stage import FinalNorm, Stage

Gradients = dict[int, Tensor]  # by place in the flat list of parameters


class Flat(Protocol):
    """The flat list of a stage's parameters, or of what stands for each."""

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class NormUnit:
    """norm-ReLU; the norm's weight and bias stand at `first` and `first + 1` of the flat list."""

    call: NormCall
    first: int

    @property
    def eps(self) -> float:
        return self.call.eps

    def affine(self, flat: Flat) -> tuple[Any, Any]:
        """What stands for the norm's weight and bias."""
        return flat[self.first], flat[self.first + 1]

    def reading(self, statistics: tuple[Tensor, Tensor], flat: Flat) -> Norm:
        """The norm over the statistics (mean, var) that it normalizes by."""
        return Norm(*statistics, *self.affine(flat), self.eps)

    def affine_gradients(self, needs: Flat, grad_gamma: Tensor, grad_beta: Tensor) -> Gradients:
        """Those of the norm's weight and bias that are needed."""
        found = zip((grad_gamma, grad_beta), self.affine(needs), strict=True)
        return {self.first + place: grad for place, (grad, needed) in enumerate(found) if needed}


@dataclass(frozen=True)
class ConvUnit(NormUnit):
    """norm-ReLU-convolution; the convolution's weight stands at `first + 2`."""

    options: ConvOptions
    conv: Conv

    def weight(self, flat: Flat) -> Any:
        """What stands for the convolution's weight."""
        return flat[self.first + 2]

    def matrix(self, flat: Flat) -> Tensor:
        """A 1x1 convolution's weight as a matrix [N, C]."""
        weight: Tensor = self.weight(flat)
        return weight.flatten(1)

    def weight_gradient(self, needs: Flat, grad: Tensor) -> Gradients:
        """That of the weight, if it is needed, in the parameter's shape; given as that or as a 1x1's matrix."""
        if not self.weight(needs):
            return {}
        ones = (1,) * len(self.options.padding)
        return {self.first + 2: grad if grad.dim() > 2 else grad.view(*grad.shape, *ones)}

    def trained(self, needs: Flat) -> bool:
        """Whether any of its parameters needs a gradient."""
        return any(needs[self.first + place] for place in range(3))


@dataclass(frozen=True)
class LayerPlan:
    """A dense layer: its units, the channels before it, those it adds, and its dropout in this run."""

    units: tuple[ConvUnit, ...]
    start: int
    width: int
    drop_rate: float

    @property
    def new(self) -> slice:
        """Its channels in the block's feature buffer."""
        return slice(self.start, self.start + self.width)

    @property
    def parameters(self) -> slice:
        """Its parameters in the flat list."""
        return slice(self.units[0].first, self.units[-1].first + 3)


class StagePlan:
    """The dense block of a stage for one run, and the flat list of its parameters.

    Attributes:
        layers: in the order of the forward.
        start, channels: width of the block's input and output.
        parameters: of every unit in turn (see `ConvUnit`).
        calls: of every norm in turn.
        head, tail: units of the stage's head and tail, if the plan is of the whole stage and it has them; the
            tail is a `ConvUnit` in a transition.

    Args:
        stage: the stage.
        whole: take in the head and the tail.
        copied: let the calls hold copies of the running statistics (see `NormCall.copied`).
    """

    def __init__(self, stage: Stage, whole: bool = False, copied: bool = False) -> None:
        self.parameters: list[Tensor | None] = []
        self._norms = NormCalls(copied)
        self.calls = self._norms.calls
        self.start = stage.block.in_channels
        self.channels = stage.block.out_channels
        self.head = self._unit(stage.head.norm) if whole and stage.head is not None else None
        self.layers = [self._layer(layer) for layer in stage.layers]
        self.tail = self._tail(stage.tail) if whole and stage.tail is not None else None

    def _layer(self, layer: DenseLayer) -> LayerPlan:
        units = tuple(self._conv_unit(norm, conv) for norm, conv in norms_and_convs(layer))
        drop_rate = layer.drop_rate if layer.training else 0.0
        return LayerPlan(units, layer.in_channels, layer.growth_rate, drop_rate)

    @property
    def shares_statistics(self) -> bool:
        """Whether any norm that reads the block's channels normalizes by the batch."""
        readers = [layer.units[0].call for layer in self.layers] + ([self.tail.call] if self.tail else [])
        return any(call.by_batch for call in readers)

    @property
    def spatial_dims(self) -> int:
        """2 for images, 3 for volumes."""
        return len(self.layers[0].units[0].options.padding)

    @property
    def buffers(self) -> list[Tensor | None]:
        """All that the norms read or move: running statistics and counters."""
        return [buffer for call in self.calls for buffer in (*call.running, call.norm.num_batches_tracked)]

    @property
    def signature(self) -> Hashable:
        """All that it says beside parameters and buffers."""
        convolutions = tuple(unit.options for unit in self._conv_units())
        layers = tuple((layer.start, layer.width, layer.drop_rate, len(layer.units)) for layer in self.layers)
        kinds = (type(self.head), type(self.tail))
        return tuple(call.signature for call in self.calls), layers, convolutions, kinds

    def units(self) -> Iterator[NormUnit]:
        """Every unit in turn."""
        if self.head is not None:
            yield self.head
        yield from self._conv_units()
        if self.tail is not None:
            yield self.tail

    def _conv_units(self) -> Iterator[ConvUnit]:
        for layer in self.layers:
            yield from layer.units

    def _tail(self, tail: Transition | FinalNorm) -> NormUnit:
        norm = cast("BatchNorm", tail.norm)
        return self._conv_unit(norm, cast("Conv", tail.conv)) if isinstance(tail, Transition) else self._unit(norm)

    def _unit(self, norm: BatchNorm) -> NormUnit:
        unit = NormUnit(self._norms.add(norm), len(self.parameters))
        self.parameters += [norm.weight, norm.bias]
        return unit

    def _conv_unit(self, norm: BatchNorm, conv: Conv) -> ConvUnit:
        unit = ConvUnit(self._norms.add(norm), len(self.parameters), ConvOptions.of(conv), conv)
        self.parameters += [norm.weight, norm.bias, conv.weight]
        return unit


def norms_and_convs(layer: DenseLayer) -> Iterator[tuple[BatchNorm, Conv]]:
    """Of the layer's norm-ReLU-convolutions, in order."""
    yield layer.norm1, layer.conv1
    if layer.bottleneck:
        yield layer.norm2, layer.conv2
