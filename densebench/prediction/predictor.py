"""`predict_memory`: what a step of a network will need, before it is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from densebench.prediction.batches import PeakCurve
from densebench.prediction.cache import cached
from densebench.prediction.cuda import CONTEXT_BYTES, cublas_bytes
from densebench.prediction.gpus import Gpu, get_gpu
from densebench.prediction.networks import (
    Model,
    checked_model,
    checked_shape,
    default_format,
    in_a_line,
    model_name,
    trace_network,
)
from densebench.prediction.optimizers import OptimizerCost, optimizer_cost
from densebench.prediction.prediction import Prediction
from densebench.prediction.sizes import parse_size
from densebench.prediction.trace import StepTrace
from densebench.registry import get_strategy
from densebench.workload import MODES

DEVICES = ("cuda", "cpu")


def predict_memory(
    model: str | nn.Module,
    input_shape: Sequence[int],
    strategy: str | None = None,
    mode: str = "train",
    *,
    dtype: str | torch.dtype | None = None,
    autocast: str | torch.dtype | None = None,
    optimizer: str | None = None,
    device_memory: int | str | None = None,
    device: str = "cuda",
    gpu: str = "H100",
    memory_format: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Prediction:
    """Predict a step's memory and work from shapes alone: no GPU, no data, the network untouched.

    The step is one in a training loop: gradients and optimizer state exist. What a loss function and a data
    loader hold is not in it.

    Args:
        model: a name of `densebench.list_models()`, or any module whose forward takes one tensor.
        input_shape: with the batch: [N, C, H, W] or [N, C, D, H, W], for which a DenseNet by name is built.
        strategy: one of `densebench.list_strategies()`; None: naive for a name, a module's own.
        mode: "train", "forward" (with graph, no backward) or "infer".
        dtype: of parameters and input, e.g. "bfloat16"; None: float32 for a name, a module's own.
        autocast: dtype of autocast; None: none.
        optimizer: None, "sgd", "sgd_momentum", "adam", "adamw", "rmsprop" or "adagrad".
        device_memory: bytes, or e.g. "24GiB"; with it the largest batch is searched (a few more traces).
        device: "cuda", or "cpu": which allocator, and which operators' inner workings.
        gpu: whose bandwidth and rates make the floor of the time (see `densebench.prediction.gpus`), and whose
            workspace cuBLAS takes.
        memory_format: "channels_last" or "contiguous"; None: channels-last for a name, a module's own.
        progress: called with a line before each trace.

    Raises:
        ValueError: for names, sizes, shapes or modes that are none; the message lists what is.
        UnsupportedError: if the strategy cannot run the network.
        PredictionError: if the network cannot run that input or cannot be traced; the message says what to do.
    """
    question = _Question(
        checked_model(model),
        checked_shape(input_shape),
        "naive" if strategy is None and isinstance(model, str) else strategy,
        _one_of("mode", mode, MODES),
        as_dtype(dtype),
        as_dtype(autocast),
        optimizer_cost(optimizer if mode == "train" else None),
        None if device_memory is None else parse_size(device_memory),
        _one_of("device", device, DEVICES),
        get_gpu(gpu),
        _one_of("memory_format", memory_format or default_format(model), ("channels_last", "contiguous")),
        progress,
    )
    if not isinstance(strategy, str | None):
        raise ValueError(
            f"strategy={in_a_line(strategy)} is no name of densebench.list_strategies(); "
            "the batch is the first size of input_shape"
        )
    if question.strategy is not None:
        get_strategy(question.strategy)
    if not isinstance(model, str):
        return question.answer()  # its code cannot be told by a name, so nothing is kept
    return Prediction.from_dict(cached(question.as_json(), lambda: question.answer().to_dict()))


@dataclass
class _Question:
    """The checked arguments of `predict_memory`, and the way to its answer."""

    model: Model
    shape: tuple[int, ...]
    strategy: str | None
    mode: str
    dtype: torch.dtype | None
    autocast: torch.dtype | None
    optimizer: OptimizerCost
    memory: int | None
    device: str
    gpu: Gpu
    memory_format: str
    progress: Callable[[str], None]
    traces: dict[int, StepTrace] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[:-2]}
        return {name: str(value) for name, value in settings.items()}

    def answer(self) -> Prediction:
        trace = self.trace(self.shape[0])
        breakdown, in_optimizer = self._breakdown(trace)
        event = trace.operations[trace.peak_event - 1] if trace.operations and not in_optimizer else None
        return Prediction(
            model_name(self.model),
            self.shape,
            self.strategy,
            self.mode,
            _name(self.dtype),
            _name(self.autocast),
            None if self.optimizer.name == "none" else self.optimizer.name,
            self.device,
            sum(breakdown.values()),
            trace.activation_bytes,
            breakdown,
            "optimizer step" if event is None else event.name,
            "" if event is None or event.owner is None else event.owner.rpartition(".")[0],
            self._flops_model(trace),
            trace.flops,
            trace.bytes_moved,
            self.gpu.name,
            trace.roofline_seconds(self.gpu),
            trace.timeline(),
            self._reserved(),
            self.memory,
            *self._fit(trace),
        )

    def trace(self, batch: int) -> StepTrace:
        if batch not in self.traces:
            self.progress(f"tracing {model_name(self.model)} {self.strategy or ''} at batch {batch}")
            shape = (batch, *self.shape[1:])
            found = trace_network(self.model, shape, self.strategy, self.mode, *self._precision(), self.device)
            self.traces[batch] = found
        return self.traces[batch]

    def _precision(self) -> tuple[torch.dtype | None, torch.dtype | None, str]:
        return self.dtype, self.autocast, self.memory_format

    def _breakdown(self, trace: StepTrace) -> tuple[dict[str, int], bool]:
        """Bytes by category at the peak, and whether that lies in the optimizer's step."""
        at_peak = trace.at_peak()
        live = {name: at_peak.pop(name) for name in trace.series}
        state, step = self._optimizer_bytes(trace)
        in_optimizer = step > sum(live.values())
        if in_optimizer:
            live = dict.fromkeys(live, 0) | {"temporaries": step}
        live["workspace"] += self._libraries()
        return {**at_peak, "optimizer": state, **live}, in_optimizer

    def _optimizer_bytes(self, trace: StepTrace) -> tuple[int, int]:
        """What the optimizer keeps, and what its step needs beside that."""
        trained = trace.at_peak()["gradients"]
        return self.optimizer.state * trained, self.optimizer.temporaries * trained

    def _libraries(self) -> int:
        return cublas_bytes(self.gpu, self.mode) if self.device == "cuda" else 0

    def _reserved(self) -> int:
        return CONTEXT_BYTES if self.device == "cuda" else 0

    def _fit(self, trace: StepTrace) -> tuple[bool | None, int | None]:
        if self.memory is None:
            return None, None
        state, step = self._optimizer_bytes(trace)
        curve = PeakCurve(self.trace, state + self._libraries() + self._reserved(), step)
        batch = self.shape[0]
        fits = curve.peak(batch) <= self.memory
        return fits, curve.largest(self.memory)

    def _flops_model(self, trace: StepTrace) -> int | None:
        """Without recomputation: those of naive, which grow with the batch exactly."""
        if not isinstance(self.model, str):
            return trace.flops if self.strategy == "naive" else None
        key = (self.model, self.shape[1:], self.mode, *self._precision())
        if self.strategy == "naive":
            _flops_of_naive[key] = trace.flops // self.shape[0]
        elif key not in _flops_of_naive:
            two = trace_network(self.model, (2, *self.shape[1:]), "naive", self.mode, *self._precision())
            _flops_of_naive[key] = two.flops // 2
        return _flops_of_naive[key] * self.shape[0]


_flops_of_naive: dict[Any, int] = {}  # an image, by network, image, mode and precision


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A floating-point dtype by name ("bfloat16", or short: "bf16").

    Raises:
        ValueError: if it is none; the message lists them.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    short = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}
    name = short.get(dtype, dtype)
    if name not in short.values():
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join((*short, *short.values()))}")
    found: torch.dtype = getattr(torch, name)
    return found


def _name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _one_of(what: str, value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    return value
