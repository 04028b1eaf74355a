"""What the tests of this folder do, on any device: what a GPU has to prove is rehearsed on the CPU, in small.

Rehearsed, the same functions run with plain stand-ins for what the CPU has not: no streams, no graphs, and a lack
of memory that is only announced.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from densebench import DenseNet
from tests.comparison import Quantities, everything, size, upstream
from tests.networks import align_masks, images, lone_block, small, with_strategy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REPEATS = [100, pytest.param(1000, marks=[pytest.mark.gpu, pytest.mark.nightly])]


def busy_network(
    strategy: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[DenseNet, Tensor]:
    """Stem, two blocks with bottlenecks and a transition, k = 32, and images that on a GPU fill it."""
    network = small(
        block_config=(3, 3), growth_rate=32, num_init_features=64, stem="imagenet", bn_size=4, num_classes=10
    )
    x = images(32, 128, dtype=dtype) if device.type == "cuda" else images(2, 32, dtype=dtype)
    network = network.to(device, dtype, memory_format=torch.channels_last)
    return with_strategy(network, strategy), x.to(device, memory_format=torch.channels_last)


def lone_stage(strategy: str, device: torch.device, layers: int = 6) -> tuple[nn.Module, Tensor]:
    """One dense block and an input for it, float32; on a GPU large enough that its maps are what takes memory."""
    network = lone_block(layers=layers, channels=32, growth_rate=16, bn_size=4).float().to(device)
    x = images(64, 64, 32, dtype=torch.float32) if device.type == "cuda" else images(4, 8, 32, dtype=torch.float32)
    return with_strategy(network, strategy), x.to(device, memory_format=torch.channels_last)


def train_step(network: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> Quantities:
    """Output, gradients (the input's, too) and buffers of one step whose gradients start as None."""
    network.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        output = network(x)
    output.backward(_upstream(output.shape, output.dtype, output.device))
    return everything(network, output=output, input=x.grad)


@functools.cache
def _upstream(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same random gradient each time; copied to the device once, as copying waits for it."""
    return upstream(torch.empty(shape, dtype=dtype)).to(device)


def assert_equal_bits(actual: Quantities, expected: Quantities, what: str) -> None:
    """Not one bit differs; NaN would, so there is none."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None, name
        assert torch.equal(actual[name], value), f"{name} differs {what}"


# Low precision, whole networks

# A single gradient of a deep network in low precision may be all cancellation, and which of two right runs errs
# less in it is chance; so errors are taken over all gradients together, and over all buffers.
ERROR_FACTOR = 2.0
FLOORS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
NUDGES = 4


@dataclass(frozen=True)
class Precision:
    """How a network computes.

    Attributes:
        autocast: the dtype of its products, float32 but for them.
        tf32: whether products of float32 may round their factors to ten bits of mantissa, as float16 has.
    """

    autocast: torch.dtype | None = None
    tf32: bool = False

    @property
    def unit(self) -> float:
        """Less than rounding a factor may change it, and enough that it is rounded another way."""
        return 2.0**-12 if self.tf32 else torch.finfo(self.autocast or torch.float32).eps / 2

    @property
    def floor(self) -> float:
        return FLOORS[torch.float16 if self.tf32 else self.autocast or torch.float32]


PRECISIONS = {
    "float32": Precision(),
    "tf32": Precision(tf32=True),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
}


def check_errors(
    strategy: str, network: nn.Module, x: Tensor, precision: Precision
) -> dict[str, tuple[float, float]]:
    """Hold a strategy to twice naive's own error against naive in float64; (error, gate) of each quantity.

    Naive's error is the largest of a few runs, on inputs changed by less than the rounding of its products: with
    TF32 allowed, changes of float32's last bits would make one run of all.
    """
    with repeatable(precision.tf32):
        return _check_errors(strategy, network, x, precision)


def _check_errors(
    strategy: str, network: nn.Module, x: Tensor, precision: Precision
) -> dict[str, tuple[float, float]]:
    autocast = precision.autocast
    align_masks(network)
    truth = train_step(_by("naive", network).double(), x.double())
    own: dict[str, float] = {}
    for seed in range(NUDGES):
        errors = joint_errors(train_step(_by("naive", network), _nudged(x, seed, precision.unit), autocast), truth)
        own = {name: max(own.get(name, 0.0), error) for name, error in errors.items()}
    errors = joint_errors(train_step(_by(strategy, network), x, autocast), truth)
    found = {name: (error, max(ERROR_FACTOR * own[name], precision.floor)) for name, error in errors.items()}
    for name, (error, gate) in found.items():
        assert error <= gate, f"{name} is off by {error:.1e}; naive: {own[name]:.1e}, gate {gate:.1e}"
    return found


def joint_errors(actual: Quantities, truth: Quantities) -> dict[str, float]:
    """|difference| over |truth| of the output, the input's gradient, all other gradients and all buffers."""
    sums: dict[str, list[float]] = {}
    for name, value in truth.items():
        other = actual[name]
        assert value is not None
        assert other is not None
        pair = sums.setdefault(name.split()[0], [0.0, 0.0])
        pair[0] += size(other.double() - value.double()) ** 2
        pair[1] += size(value) ** 2
    return {name: (difference / whole) ** 0.5 for name, (difference, whole) in sums.items()}


def _by(strategy: str, network: nn.Module) -> nn.Module:
    return with_strategy(copy.deepcopy(network), strategy)


def _nudged(x: Tensor, seed: int, unit: float) -> Tensor:
    if seed == 0:
        return x
    generator = torch.Generator().manual_seed(seed)
    change = 1 + unit * (2 * torch.rand(x.shape, generator=generator) - 1)
    return x * change.to(x.device)


# Graphs


class Training:
    """A few steps of plain SGD on one static input, as a CUDA graph can hold them."""

    def __init__(self, network: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> None:
        self.network, self.x, self.autocast = network, x.clone(memory_format=torch.preserve_format), autocast
        self.parameters = list(network.parameters())

    def step(self) -> None:
        self.network.zero_grad(set_to_none=True)
        # A graph that reads weights cast before it was captured would never see them change.
        enabled = self.autocast is not None
        with torch.autocast(self.x.device.type, self.autocast, enabled=enabled, cache_enabled=False):
            output = self.network(self.x)
        output.backward(_upstream(output.shape, output.dtype, output.device))
        with torch.no_grad():
            torch._foreach_add_(self.parameters, [p.grad for p in self.parameters], alpha=-0.01)

    def state(self) -> Quantities:
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}


def captured(training: Training) -> Callable[[], None]:
    """A replay of the step as a CUDA graph, with the network as it was before; on the CPU the step itself."""
    if not training.x.is_cuda:
        return training.step
    before = training.state()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            training.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    training.network.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        training.step()
    training.network.load_state_dict(before)  # in place: the graph knows these addresses
    return graph.replay


def as_graphs(network: nn.Module, x: Tensor) -> nn.Module:
    """Forward and backward as a CUDA graph each, as PyTorch makes them; on the CPU the network itself."""
    if not x.is_cuda:
        return network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sample = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    graphed: nn.Module = torch.cuda.make_graphed_callables(network, (sample,))
    network.load_state_dict(before)  # in place: warming up has moved the running statistics
    return graphed


# Lack of memory


class _Scarcity(TorchDispatchMode):
    """Announces a lack of memory at one operation; -1 counts operations only."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.operations = at, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations == self.at:
            raise torch.OutOfMemoryError("announced")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def scarce_memory(device: torch.device, share: float, step: Callable[[], object]) -> Iterator[None]:
    """Within the block a step has only a share of the memory that it takes beyond what is allocated now.

    (Of unused memory PyTorch may have kept parts that it cannot give back; so the limit counts from what is used.)
    """
    if device.type == "cpu":
        with _Scarcity(-1) as counted:
            step()
        with _Scarcity(int(share * counted.operations)):
            yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    needed = torch.cuda.max_memory_allocated() - before
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + share * needed) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def on_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A CUDA stream of its own; on the CPU nothing."""
    return torch.cuda.stream(torch.cuda.Stream()) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def repeatable(tf32: bool = False) -> Iterator[None]:
    """cuDNN's own algorithms the same in every call (ours always are), products of float32 exact unless `tf32`."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=tf32):
        yield
