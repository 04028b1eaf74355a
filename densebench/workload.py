"""A case made runnable: the network, its input, and one step of training or inference.

A training step is a forward and a backward from a fixed random upstream gradient (no loss function, no
optimizer): what differs between contenders, and nothing that does not. Gradients accumulate.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from densebench.contenders import get_contender
from densebench.formats import CHANNELS_LAST
from densebench.records import Case

MODES = ("train", "forward", "infer")
# Options that tell cases apart and leave the network as it is: "beside" names what a case is timed beside, so that
# the same case can be timed in more than one group.
NOT_OF_THE_MODEL = ("beside",)


class Workload:
    """One contender with its input, ready to step.

    Args:
        model: the network; it is put in training or evaluation mode as `mode` says.
        input: [N, C, H, W] or [N, C, D, H, W].
        mode: "train" (forward and backward), "forward" (with graph, no backward) or "infer" (without graph).
        autocast: dtype of autocast, or None.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(
        self, model: nn.Module, input: Tensor, mode: str = "train", autocast: torch.dtype | None = None
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        self.model = model.train(mode != "infer")
        self.input = input
        self.mode = mode
        self.autocast = autocast
        self.upstream: Tensor | None = None

    def step(self) -> Tensor:
        """One step; returns the output."""
        output = self.forward()
        if self.mode == "train":
            self.backward(output)
        return output.detach()

    def forward(self) -> Tensor:
        with torch.set_grad_enabled(self.mode != "infer"), self._autocast():
            output: Tensor = self.model(self.input)
        return output

    def backward(self, output: Tensor) -> None:
        output.backward(self._upstream_for(output))

    def allocate_gradients(self) -> None:
        """Give every trained parameter a gradient, as after a first step."""
        if self.mode == "train":
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def clear_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def constant_bytes(self) -> int:
        """Parameters, gradients, buffers, input and upstream gradient, computed from their shapes."""
        return sum(self.constants().values())

    def constants(self) -> dict[str, int]:
        """Bytes of what exists at every moment of a step, by category."""
        return {name: _bytes(tensors) for name, tensors in self.constant_tensors().items()}

    def constant_tensors(self) -> dict[str, list[Tensor]]:
        """The tensors themselves; a trained parameter stands for its gradient."""
        parameters: list[Tensor] = list(self.model.parameters())
        return {
            "parameters": parameters,
            "gradients": [p for p in parameters if p.requires_grad] if self.mode == "train" else [],
            "buffers": list(self.model.buffers()),
            "input": [self.input] if self.upstream is None else [self.input, self.upstream],
        }

    def _upstream_for(self, output: Tensor) -> Tensor:
        """A random gradient, always the same: that of a mean loss is tiny, that of a sum constant."""
        if self.upstream is None:
            with torch.random.fork_rng(devices=[output.device] if output.is_cuda else []):
                torch.manual_seed(1)
                # Drawn in one dtype: another one draws other numbers from the same seed.
                drawn = torch.randn(output.shape, device=output.device)
                self.upstream = drawn.to(output.dtype)
        return self.upstream

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.input.device.type, self.autocast)


def build_workload(case: Case, state: dict[str, Tensor] | None = None, seed: int = 0) -> Workload:
    """The workload of a case on its device.

    Args:
        case: what to run; its options go to the model.
        state: weights to load; random ones if None.
        seed: of the weights and the input.
    """
    torch.manual_seed(seed)
    model = get_contender(case.strategy).build(case.model, **model_options(case))
    if state is not None:
        load_weights(plain(model), state)
    input = torch.randn(case.batch, *case.input_shape, device=case.device)  # the same numbers in every dtype
    input = input.to(dtype=_dtype(case.dtype), memory_format=_memory_format(case))
    return Workload(_placed(model, case, case.device), input, case.mode, _dtype(case.autocast))


def fake_workload(case: Case) -> tuple[FakeTensorMode, Workload]:
    """The workload of a case as shapes without data, and the mode to step it in.

    The parameters lie on a fake CPU whatever the case's device: a torch built without CUDA cannot fake one.
    """
    with torch.device("meta"):
        model = get_contender(case.strategy).build(case.model, **model_options(case))
        model = _placed(model, case, "meta")
    mode = FakeTensorMode()
    with mode:
        input = torch.empty(case.batch, *case.input_shape, dtype=_dtype(case.dtype))
        input = input.to(memory_format=_memory_format(case))
        return mode, Workload(fake_model(model), input, case.mode, _dtype(case.autocast))


def fake_model(
    model: nn.Module, dtype: torch.dtype | None = None, memory_format: torch.memory_format | None = None
) -> nn.Module:
    """A copy whose parameters and buffers are shapes without data; call inside a FakeTensorMode.

    Args:
        dtype: of what is floating-point in the copy; None: as in the model.
        memory_format: of its maps' weights; None: as in the model.
    """
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    fakes = {key: _fake(tensor, dtype, memory_format) for key, tensor in tensors.items()}
    return copy.deepcopy(model, fakes)


def load_weights(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights of the same network, also where a peer gives its modules other names in the same order.

    Raises:
        RuntimeError: from `load_state_dict`, if the two do not match.
    """
    own = model.state_dict()
    if own.keys() != state.keys() and len(own) == len(state):
        state = {name: state[other] for name, other in zip(sorted(own), sorted(state), strict=True)}
    model.load_state_dict(state)


def plain(model: nn.Module) -> nn.Module:
    """The network inside whatever a contender wraps around it (as its `network`)."""
    return getattr(model, "network", model)


def model_options(case: Case) -> dict[str, Any]:
    """The case's options that go to the model's function."""
    options = {key: value for key, value in case.options.items() if key not in NOT_OF_THE_MODEL}
    return {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}


def _fake(tensor: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
    if memory_format is not None and memory_format is CHANNELS_LAST.get(tensor.dim()):
        empty = empty.contiguous(memory_format=memory_format)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _placed(model: nn.Module, case: Case, device: str) -> nn.Module:
    return model.to(  # type: ignore[call-overload]
        device=device, dtype=_dtype(case.dtype), memory_format=_memory_format(case)
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _memory_format(case: Case) -> torch.memory_format:
    if case.memory_format != "channels_last":
        return torch.contiguous_format
    return CHANNELS_LAST[1 + len(case.input_shape)]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
