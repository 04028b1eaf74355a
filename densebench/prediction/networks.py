"""Any network as a workload of shapes without data; the network that was given is read, never changed."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._pytree import tree_leaves

from densebench.formats import CHANNELS_LAST
from densebench.models import build_model, list_models, set_strategy
from densebench.models.features import stages_in
from densebench.prediction.trace import StepTrace, trace_step
from densebench.registry import UnsupportedError
from densebench.workload import Workload, fake_model

Model = str | nn.Module
MOST_VALUES = 2**40  # of an input; of what a network makes of more, PyTorch's sizes overflow


class PredictionError(RuntimeError):
    """A network cannot be traced; the message says why and what to do about it."""


class AnyWorkload(Workload):
    """A workload whose network may return tensors in lists, tuples or dictionaries; all are trained on."""

    def forward(self) -> Any:
        return super().forward()

    def backward(self, output: Any) -> None:
        outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            raise PredictionError("the network's output needs no gradient; use mode='infer'")
        if self.upstream is None:  # one flat piece of memory stands for the gradients of all outputs
            self.upstream = torch.empty(sum(t.numel() for t in outputs), dtype=outputs[0].dtype)
        sizes = [t.numel() for t in outputs]
        pieces = self.upstream.split(sizes)
        gradients = [piece.view(t.shape).to(t.dtype) for piece, t in zip(pieces, outputs, strict=True)]
        torch.autograd.backward(outputs, gradients)


def trace_network(
    model: Model,
    input_shape: Sequence[int],
    strategy: str | None,
    mode: str,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    memory_format: str | None = None,
    device: str = "cpu",
) -> StepTrace:
    """Trace one step of a network by name, or of any module, whose parameters stay as and where they are.

    Args:
        input_shape: with the batch, [N, C, ...].
        strategy: None leaves the module's own.
        dtype: of parameters and input; None: the module's own.
        memory_format: "channels_last" or "contiguous"; None: see `default_format`.
        device: "cpu" or "cuda", for which the step is priced.

    Raises:
        ValueError: for an unknown model, strategy or mode, or a shape that is none.
        UnsupportedError: if the strategy cannot run the network.
        PredictionError: if the network cannot run that input, or PyTorch cannot trace it.
    """
    shape = checked_shape(input_shape)
    network = _named(model, shape[1:]) if isinstance(model, str) else model
    mode_of_tensors = FakeTensorMode(allow_non_fake_inputs=True)
    last = (memory_format or default_format(model)) == "channels_last"
    layout = CHANNELS_LAST.get(len(shape)) if last else None
    with mode_of_tensors:
        copy = _copy(network, dtype, layout)
        if strategy is not None and (strategy != "naive" or stages_in(copy)):
            set_strategy(copy, strategy)
        dtype = dtype or next((p.dtype for p in copy.parameters() if p.is_floating_point()), torch.float32)
        input = torch.empty(shape, dtype=dtype)
        input = input if layout is None else input.to(memory_format=layout)
        with _explained(model_name(model), shape):
            return trace_step(AnyWorkload(copy, input, mode, autocast), device)


def default_format(model: Model) -> str:
    """Channels-last for networks by name, as they are measured; else as the module's own weights lie."""
    if isinstance(model, str):
        return "channels_last"
    for parameter in model.parameters():
        last = CHANNELS_LAST.get(parameter.dim())
        if last and parameter.is_contiguous(memory_format=last) and not parameter.is_contiguous():
            return "channels_last"
    return "contiguous"


def model_name(model: Model) -> str:
    return model if isinstance(model, str) else type(model).__name__


def checked_model(model: Model) -> Model:
    """The model, as it is.

    Raises:
        ValueError: if it is neither a name nor a module, as where it and the shape are swapped.
    """
    if not isinstance(model, str | nn.Module):
        raise ValueError(
            f"model={in_a_line(model)} is no network; give a name of densebench.list_models() or a module, "
            "then input_shape"
        )
    return model


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple.

    Raises:
        ValueError: if it is not [N, C, ...] of positive integers, or beyond every memory.
    """
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sizes) < 2 or any(not isinstance(n, int) or isinstance(n, bool) for n in sizes):
        raise ValueError(
            f"input_shape={in_a_line(shape)} is no shape; give batch and image in one: "
            "[N, C, H, W] (or [N, C, D, H, W])"
        )
    if sizes[0] < 1:
        raise ValueError(f"a batch of {sizes[0]} has nothing to predict; give 1 or more")
    if min(sizes) < 1:
        raise ValueError(f"input_shape={list(sizes)!r} holds nothing: every size must be 1 or more")
    if math.prod(sizes) > MOST_VALUES:
        raise ValueError(
            f"input_shape={in_a_line(list(sizes))} holds more values than any memory; give smaller sizes"
        )
    return sizes


def in_a_line(value: Any) -> str:
    """An argument as one line shows it: a module or a tensor by its type, anything else cut short."""
    if isinstance(value, nn.Module | Tensor):
        return f"{type(value).__name__}(...)"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


@functools.lru_cache(maxsize=4)
def _named(name: str, input_shape: tuple[int, ...]) -> nn.Module:
    """A DenseNet of that name for an input [C, H, W] or [C, D, H, W]; a ResNet is for images of three channels."""
    if name not in list_models():
        raise ValueError(f"unknown model {name!r}; known: {', '.join(list_models())}")
    fits = name.startswith("densenet") and len(input_shape) in (3, 4)
    options = {"in_channels": input_shape[0], "spatial_dims": len(input_shape) - 1} if fits else {}
    with torch.device("meta"):
        return build_model(name, **options)


def _copy(network: nn.Module, dtype: torch.dtype | None, layout: torch.memory_format | None) -> nn.Module:
    try:
        return fake_model(network, dtype, layout)
    except Exception as error:
        raise PredictionError(
            f"{type(network).__name__} cannot be copied without its data ({_line(error)}); "
            "predict with a freshly built one"
        ) from error


@contextmanager
def _explained(name: str, shape: Sequence[int]) -> Iterator[None]:
    """Turn what goes wrong in a trace into one sentence with the remedy."""
    try:
        yield
    except (PredictionError, ValueError) as error:
        if isinstance(error, PredictionError):
            raise
        raise PredictionError(f"{name} cannot run an input of {list(shape)}: {_line(error)}") from error
    except UnsupportedOperatorException as error:
        raise PredictionError(_without_fake(str(error.func))) from error
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PredictionError(
            f"{name} branches on values ({error.func}), and a prediction has shapes only; "
            "predict the part of it that does not"
        ) from error
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if "fake impl" in str(error) or "'Meta' backend" in str(error):
            raise PredictionError(_without_fake(_operator_in(str(error)))) from error
        if isinstance(error, UnsupportedError):
            raise
        raise PredictionError(f"{name} cannot run an input of {list(shape)}: {_line(error)}") from error


def _without_fake(operator: str) -> str:
    return (
        f"operator {operator} has no fake implementation, so the shape of its result is unknown; "
        "register one with torch.library.register_fake"
    )


def _operator_in(message: str) -> str:
    """The name of the operator that PyTorch complains about: the first word with '::' in it."""
    words = message.replace("'", " ").replace("(", " ").replace(")", " ").replace(",", " ").split()
    return next((word.strip(".") for word in words if "::" in word), "(unnamed)")


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
