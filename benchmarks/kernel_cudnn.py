"""cuDNN's own fusion of the forward operator, by its Python front end (package nvidia-cudnn-frontend).

relu(x * scale + bias), convolved, with sums and sums of squares of the output on the way out; scale and bias are
given, as they come out of the statistics. Operands are of the maps' dtype, the arithmetic is in float32.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_calls import Call, Results
from benchmarks.kernel_operands import Operands
from densebench.registry import UnsupportedError

_TYPES = {torch.float16: "HALF", torch.bfloat16: "BFLOAT16", torch.float32: "FLOAT"}


def missing() -> str | None:
    """Why cuDNN's fused operation cannot be run here, with the remedy; None if it can be tried."""
    if importlib.util.find_spec("cudnn") is None:
        return "cuDNN's Python front end is not installed; pip install nvidia-cudnn-frontend"
    return None if torch.cuda.is_available() else "cuDNN needs a CUDA device, and torch sees none"


def cudnn(operator: str, copies: Sequence[Operands]) -> list[Call]:
    """The fused operation on dense channels-last copies of x.

    Raises:
        UnsupportedError: if cuDNN has no plan for it on this device.
    """
    return [_call(operands) for operands in copies]


def _call(operands: Operands) -> Call:
    front_end = importlib.import_module("cudnn")
    x = operands.map(operands.x)
    weight = operands.weight[:, :, None, None].contiguous(memory_format=torch.channels_last)
    norm = operands.norm().folded()
    scale, bias = (t.to(x.dtype).view(1, -1, 1, 1) for t in (norm.scale, norm.shift))
    out = operands.map(torch.empty_like(operands.grad))
    sums, squares = torch.empty(2, 1, weight.shape[0], 1, 1, device=x.device, dtype=torch.float32).unbind()
    graph, pack = _graph(front_end, (x, scale, bias, weight), (out, sums, squares))
    workspace = torch.empty(max(1, graph.get_workspace_size()), device=x.device, dtype=torch.uint8)
    handle = _handle()

    def run() -> None:
        front_end.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(pack, workspace, handle=handle)

    def results() -> Results:
        rows = out.shape[0] * out.shape[2] * out.shape[3]
        mean = sums.double().flatten() / rows
        var = squares.double().flatten() / rows - mean.square()
        return {"out": out.permute(0, 2, 3, 1).reshape(rows, -1), "mean": mean, "var": var}

    return Call(run, results)


def _graph(
    front_end: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]
) -> tuple[Any, dict[Any, Tensor]]:
    """The operation's graph with its plan built, and its tensors by their places in the graph."""
    types, dtype = front_end.data_type, getattr(front_end.data_type, _TYPES[inputs[0].dtype])
    graph = front_end.pygraph(
        io_data_type=dtype, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=_handle()
    )
    x, scale, bias, weight = (
        graph.tensor(name=name, dim=list(t.shape), stride=list(t.stride()), data_type=dtype)
        for name, t in zip(("x", "scale", "bias", "weight"), inputs, strict=True)
    )
    activated = graph.relu(input=graph.bias(input=graph.scale(input=x, scale=scale), bias=bias))
    product = graph.conv_fprop(image=activated, weight=weight, padding=[0, 0], stride=[1, 1], dilation=[1, 1])
    product.set_output(True).set_data_type(dtype)
    sums, squares = graph.genstats(input=product)
    for statistic in (sums, squares):
        statistic.set_output(True).set_data_type(types.FLOAT)
    graph.validate()
    graph.build_operation_graph()
    try:
        graph.create_execution_plans([front_end.heur_mode.A, front_end.heur_mode.FALLBACK])
        graph.check_support()
    except front_end.cudnnGraphNotSupportedError as error:
        raise UnsupportedError(f"cuDNN has no plan for this shape here: {error}") from None
    graph.build_plans()
    places = (x, scale, bias, weight, product, sums, squares)
    return graph, dict(zip(places, (*inputs, *outputs), strict=True))


@functools.cache
def _handle() -> Any:
    return importlib.import_module("cudnn").create_handle()
