"""Every shape rule answers as the operator does; whole traces are the same with and without the rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from densebench.prediction import shapes, trace_case, trace_step
from densebench.records import Case
from densebench.workload import fake_workload

aten = torch.ops.aten
pytestmark = pytest.mark.skipif(not shapes.AVAILABLE, reason="this PyTorch lacks what the rules need")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "slice": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "slice_contiguous": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "one_pixel": lambda x: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
}


def _calls(x: Tensor, y: Tensor, w: Tensor) -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls of all operators with rules on maps x and y of one shape, and vectors w of their channels."""
    norm = (w, w, w.clone(), w.clone().abs())
    _, mean, inv_std = aten.native_batch_norm(x, *norm, True, 0.1, 1e-5)
    buffers = {"save_mean": mean.clone(), "save_invstd": w.new_empty(0)}
    everything = [True, True, True]
    return {
        "add": (aten.add.Tensor, (x, y), {}),
        "add_alpha": (aten.add.Tensor, (x, y), {"alpha": 2}),
        "add_vector": (aten.add.Tensor, (x, w[:, None, None]), {}),
        "mul_number": (aten.mul.Tensor, (x, 2.0), {}),
        "relu": (aten.relu.default, (x,), {}),
        "threshold_backward": (aten.threshold_backward.default, (x, y, 0), {}),
        "threshold_backward_into": (aten.threshold_backward.grad_input, (x, y, 0), {"grad_input": y.clone()}),
        "cat": (aten.cat.default, ([x, y, x], 1), {}),
        "cat_rows": (aten.cat.default, ([x, y],), {}),
        "norm": (aten.native_batch_norm.default, (x, *norm, True, 0.1, 1e-5), {}),
        "norm_eval": (aten.native_batch_norm.default, (x, *norm, False, 0.1, 1e-5), {}),
        "norm_into": (aten.native_batch_norm.out, (x, *norm, True, 0.1, 1e-5), {"out": y.clone(), **buffers}),
        "norm_backward": (
            aten.native_batch_norm_backward.default,
            (y, x, w, w, w, mean, inv_std, True, 1e-5, everything),
            {},
        ),
        "clone": (aten.clone.default, (x,), {}),
        "clone_contiguous": (aten.clone.default, (x,), {"memory_format": torch.contiguous_format}),
        "new_empty": (aten.new_empty.default, (x, [3, 5]), {"dtype": torch.float64}),
        "slice": (aten.slice.Tensor, (x, 1, 1, 3), {}),
        "permute": (aten.permute.default, (x, [0, 2, 3, 1]), {}),
        "unsqueeze": (aten.unsqueeze.default, (x, 0), {}),
        "expand": (aten.expand.default, (w[:, None], [-1, 7]), {}),
        "select": (aten.select.int, (x, 0, 1), {}),
        "transpose": (aten.transpose.int, (x, 1, 2), {}),
        "view": (aten.view.default, (w, [2, -1]), {}),
        "add_in_place": (aten.add_.Tensor, (x.clone(), y), {}),
        "copy_in_place": (aten.copy_.default, (x.clone(), y), {}),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rules_answer_as_operators(layout: str, dtype: torch.dtype) -> None:
    x, y = (LAYOUTS[layout](torch.rand(2, 6, 4, 5, dtype=dtype)) for _ in range(2))
    applied = 0
    for name, (func, args, kwargs) in _calls(x, y, torch.rand(6)).items():
        rule = shapes.rule_for(func)
        assert rule is not None, name
        with FakeTensorMode() as mode:
            fake_args, fake_kwargs = tree_map(lambda v, mode=mode: _fake(v, mode), (args, kwargs))
            answer = rule(func, fake_args, fake_kwargs)
        if answer is NotImplemented:
            continue
        applied += 1
        assert _described(answer) == _described(func(*args, **kwargs)), name
    assert applied >= (4 if layout in ("one_pixel", "expanded") else 10)


@pytest.mark.parametrize("mixed", [False, True])
def test_rules_leave_mixed_arguments(mixed: bool) -> None:
    """Layouts that differ among the arguments are left to FakeTensorMode."""
    x, y = torch.rand(2, 6, 4, 5), LAYOUTS["channels_last"](torch.rand(2, 6, 4, 5))
    with FakeTensorMode() as mode:
        a, b = _fake(x, mode), _fake(y if mixed else x, mode)
        for func, args in ((aten.add.Tensor, (a, b)), (aten.cat.default, ([a, b], 1))):
            rule = shapes.rule_for(func)
            assert rule is not None
            assert (rule(func, args, {}) is NotImplemented) == mixed


def test_traces_are_the_same_without_rules(every_strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a PyTorch that lacks what the rules need, prediction is slower and the same."""
    options = {"block_config": (2, 3), "growth_rate": 8, "drop_rate": 0.1, "num_classes": 5}
    case = Case("step", "densenet_x", every_strategy, "train", 2, (3, 64, 64), options=options)
    quick = trace_case(case)
    monkeypatch.setattr(shapes, "_RULES", {})
    slow = trace_case(case)
    assert [(a.nbytes, a.operation, a.born, a.died) for a in slow.allocations] == [
        (a.nbytes, a.operation, a.born, a.died) for a in quick.allocations
    ]
    assert slow.operations == quick.operations


def test_rules_carry_most_of_a_trace() -> None:
    """Else a DenseNet-264 would take 20 s; counted, not timed."""
    mode, work = fake_workload(
        Case("step", "densenet_bc", "naive", "train", 4, (3, 32, 32), options={"depth": 40})
    )
    with mode:
        names = [operation.name for operation in trace_step(work).operations]
    ruled = {str(func) for func in shapes._RULES}
    assert sum(name in ruled for name in names) > 0.75 * len(names)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(value, Tensor):
        return value
    whole = torch.empty(value.untyped_storage().nbytes() // value.element_size(), dtype=value.dtype, device="meta")
    data = whole.as_strided(value.shape, value.stride(), value.storage_offset())
    return FakeTensor(mode, data, torch.device("cpu"))


def _described(result: Any) -> list[Any]:
    results = result if isinstance(result, (tuple, list)) else [result]
    return [(tuple(t.shape), t.stride(), t.dtype, t.storage_offset()) for t in results]
