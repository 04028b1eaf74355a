"""What goes wrong between a strategy and the rest of PyTorch: hooks, SyncBatchNorm, autocast, compilation.

Numbers are those of the project's list of failure modes.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from densebench import UnsupportedError, get_strategy, registry, set_strategy
from densebench.prediction.networks import trace_network
from tests.comparison import TIGHT, Quantities, assert_same, buffers, everything, play, step, upstream
from tests.networks import images, lone_block, small, with_strategy

WITH_PLAIN = True


def test_15_offsets_in_kernels_are_64_bits_wide(repository: Path) -> None:
    """Beyond 2^31 elements a 32-bit offset wraps around (triton-lang/triton#832): rows times stride is 64-bit."""
    products = 0
    for file in sorted((repository / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                for product, wide in _products_with_a_stride(node):
                    products += 1
                    assert wide, f"{file.name}, line {product.lineno}: {ast.unparse(product)}"
    assert products > 10, "no kernel multiplies by a stride any more: this test reads nothing"


def _products_with_a_stride(kernel: ast.FunctionDef) -> Iterator[tuple[ast.BinOp, bool]]:
    """`row * ..._stride` in a kernel, and whether the row was made 64 bits wide there or by assignment."""
    assigned = [node for node in ast.walk(kernel) if isinstance(node, ast.Assign)]
    wide = {ast.unparse(node.targets[0]) for node in assigned if "tl.int64" in ast.unparse(node.value)}
    for node in ast.walk(kernel):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            row, stride = ast.unparse(node.left), ast.unparse(node.right)
            if stride.endswith("_stride"):
                yield node, "tl.int64" in row or row.split("[")[0] in wide


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_28_nothing_is_rectified_in_place(every_strategy: str, mode: str) -> None:
    """ReLU in place on what others read too (pytorch/vision#4164): input and output stay what they are."""
    network = lone_block(every_strategy).train(mode == "train")
    x = images(channels=5).requires_grad_(mode != "no_grad")
    before = x.detach().clone()
    with torch.set_grad_enabled(mode != "no_grad"):
        output = network(x)
    assert torch.equal(x, before)
    assert torch.equal(output[:, :5], before)
    kept = output.detach().clone()
    if mode != "no_grad":
        output.backward(upstream(output))
    assert torch.equal(x, before)
    assert torch.equal(output, kept)


def test_28_backward_hooks_on_every_module() -> None:
    """Full backward hooks fail where a ReLU works in place (jacobgil/pytorch-grad-cam#147); naive has none."""
    network = small()
    called: set[str] = set()
    for name, module in network.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: called.add(name))
    step(network, images())
    assert called == {name for name, _ in network.named_modules()}


def _weight_norm(module: nn.Module) -> None:
    parametrizations.weight_norm(module)


def _replace_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *arguments: 2 * forward(*arguments)


ADDITIONS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "forward hook": ("norm1", lambda m: m.register_forward_hook(lambda _m, _i, output: 2 * output)),
    "forward pre-hook": ("conv1", lambda m: m.register_forward_pre_hook(lambda _m, given: (2 * given[0],))),
    "backward hook": ("relu1", lambda m: m.register_full_backward_hook(lambda _m, grads, _o: (2 * grads[0],))),
    "backward pre-hook": ("conv2", lambda m: m.register_full_backward_pre_hook(lambda _m, grads: (2 * grads[0],))),
    "hook on a layer": ("", lambda m: m.register_forward_hook(lambda _m, _i, output: 2 * output)),
    "pruning": ("conv1", lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "weight norm": ("conv2", _weight_norm),
    "replaced forward": ("conv1", _replace_forward),
}


@pytest.mark.parametrize("addition", ADDITIONS)
def test_29_what_a_user_adds_is_run_or_refused(strategy: str, addition: str) -> None:
    """Run around a hook and it never fires (state-spaces/mamba#59): it is refused by name, when set and later."""
    child, add = ADDITIONS[addition]
    target = f"denseblock2.denselayer1.{child}".rstrip(".")
    network = small()
    add(network.features.get_submodule(target))
    if get_strategy(strategy).bypasses == "nothing":
        same = small(strategy)  # built again, not copied: what pruning makes cannot be
        add(same.features.get_submodule(target))
        assert_same(step(same, images()), step(network, images()))
        return
    message = rf"strategy '{strategy}' does not call {target}, which has a .*; remove it, or use strategy 'naive'"
    with pytest.raises(UnsupportedError, match=message):
        set_strategy(network, strategy)
    assert network.strategy == "naive"
    late = small(strategy)
    add(late.features.get_submodule(target))
    before = buffers(late)
    with pytest.raises(UnsupportedError, match=message):
        late(images())
    unchanged = {name: value for name, value in buffers(late).items() if "denseblock2" in name}
    assert_same(unchanged, {name: before[name] for name in unchanged}, 0.0)


@pytest.mark.parametrize("target", ["transition1", "norm5", "conv0"])
def test_29_hooks_outside_of_what_is_bypassed_are_called(strategy: str, target: str) -> None:
    """A strategy calls each module that it does not say it bypasses."""
    network = small()
    calls: list[str] = []
    network.features.get_submodule(target).register_forward_hook(lambda *_: calls.append(target))
    part_of_a_stage = target != "conv0"
    if get_strategy(strategy).bypasses == "stage" and part_of_a_stage:
        with pytest.raises(UnsupportedError, match=target):
            set_strategy(network, strategy)
    else:
        with_strategy(network, strategy)(images())
        assert calls == [target]


@pytest.mark.parametrize("where", ["network", "one norm"])
def test_30_sync_batch_norm_is_called_or_refused(strategy: str, where: str) -> None:
    """A norm that talks to other processes is no norm to compute by oneself (pytorch-image-models#1254)."""

    def convert(network: nn.Module) -> nn.Module:
        if where == "network":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        layer = network.features.denseblock1.denselayer2
        layer.norm1 = nn.SyncBatchNorm.convert_sync_batchnorm(layer.norm1)
        return network

    converted = convert(small())
    if get_strategy(strategy).bypasses == "nothing":
        expected = convert(small()).eval()(images())  # in training it needs a GPU, and other processes
        assert torch.equal(set_strategy(converted, strategy).eval()(images()), expected)
        return
    message = r"denseblock1.*norm\d is SyncBatchNorm; .*[Uu]se 'naive'"
    with pytest.raises(UnsupportedError, match=message):
        set_strategy(converted, strategy)
    assert converted.strategy == "naive"
    late = convert(small(strategy))
    with pytest.raises(UnsupportedError, match=message):
        late(images())


def test_32_parameters_given_from_outside(strategy: str) -> None:
    """`torch.func.functional_call` runs a network with parameters that are not its own (meta-learning, EMA)."""

    def scenario(network: Any) -> Any:
        given = {name: (0.9 * p.detach()).requires_grad_() for name, p in network.named_parameters()}
        output = torch.func.functional_call(network, given, (images(),))
        output.backward(upstream(output))
        results = everything(network, output=output)
        return results | {f"gradient of given {name}": p.grad for name, p in given.items()}

    network = small()
    assert_same(play(scenario, network, strategy), play(scenario, network, "naive"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [4, 2], ids=["pooled", "not pooled"])
@pytest.mark.parametrize(("bn_size", "dims"), [(4, 2), (None, 2), (4, 3)], ids=["bottleneck", "plain", "volumes"])
def test_35_dtypes_under_autocast(
    strategy: str, dtype: torch.dtype, bn_size: int | None, dims: int, stride: int
) -> None:
    """Every output, gradient and statistic has naive's dtype (values: test_equivalence.py).

    Of volumes most are float32 on a CPU, where autocast pools them in that.
    """
    options = {"initial_output_stride": stride, "spatial_dims": dims, "global_pool": False, "num_classes": None}
    network = small(stem="imagenet", bn_size=bn_size, **options).float()

    def dtypes(name: str) -> dict[str, torch.dtype | None]:
        chosen = with_strategy(copy.deepcopy(network), name)
        x = images(2, 40 if dims == 2 else 12, dtype=torch.float32, dims=dims).requires_grad_()
        with torch.autocast("cpu", dtype):
            points = chosen.end_points(x)
            output = chosen(x)
        assert output.dtype == points["output"].dtype
        output.backward(upstream(output))
        quantities = everything(chosen, input=x.grad, **{f"end point {n}": p for n, p in points.items()})
        return {name: None if value is None else value.dtype for name, value in quantities.items()}

    expected = dtypes("naive")
    assert dtypes(strategy) == expected
    assert set(expected.values()) >= {dtype, torch.float32}


def test_35_no_map_is_copied_to_another_dtype(strategy: str) -> None:
    """Autocast has every map in 16 bits where convolutions read it; copies of it would be slow, and wide."""

    def widest_copy(name: str) -> int:
        shape = (64, 3, 64, 64)
        trace = trace_network("densenet121", shape, name, "train", autocast=torch.bfloat16, device="cuda")
        return max(one.nbytes for one in trace.allocations if one.operation.startswith("aten._to_copy"))

    assert widest_copy(strategy) <= widest_copy("naive")


def test_35_autocast_switched_off_inside(every_strategy: str) -> None:
    """`autocast(enabled=False)` in the middle means float32, as before it and after it."""
    network = small(every_strategy).float()
    x = images(dtype=torch.float32)
    expected = step(copy.deepcopy(network), x)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            actual = step(copy.deepcopy(network), x)
        assert network(x).dtype == torch.bfloat16
    assert_same(actual, expected, TIGHT)


def test_35_backward_under_another_autocast(every_strategy: str) -> None:
    """The forward's precision decides, wherever backward is called (pytorch#87979)."""
    network = lone_block(every_strategy).float()
    x = images(channels=5, dtype=torch.float32)

    def gradients(at_backward: torch.dtype | None) -> Any:
        copied = copy.deepcopy(network)
        with torch.autocast("cpu", torch.bfloat16):
            output = copied(x)
        with torch.autocast("cpu", at_backward or torch.bfloat16, enabled=at_backward is not None):
            output.backward(upstream(output))
        return everything(copied, output=output)

    assert_same(gradients(torch.float16), gradients(None), TIGHT)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_36_compiled_is_eager(every_strategy: str, backend: str) -> None:
    """A graph break is fine, another value never; and no second compilation for the same shapes."""
    network = small(every_strategy)
    compiler = _Counting(backend)
    compiled = torch.compile(copy.deepcopy(network), backend=compiler)
    torch._dynamo.reset()
    counts = []
    for seed in range(3):
        assert_same(_plain_names(step(compiled, images(seed=seed))), step(network, images(seed=seed)))
        counts.append(compiler.compilations)
        network.zero_grad()
        compiled.zero_grad()
    torch._dynamo.reset()
    assert counts[0] > 0, "nothing was compiled"
    assert counts[2] == counts[0], "the same shapes were compiled again"


def _plain_names(quantities: Quantities) -> Quantities:
    """Names without what `torch.compile` puts before them."""
    return {name.replace("_orig_mod.", ""): value for name, value in quantities.items()}


class _Counting:
    """A compiler backend that counts the graphs it is given."""

    def __init__(self, backend: str) -> None:
        self.backend = torch._dynamo.lookup_backend(backend)
        self.compilations = 0

    def __call__(self, graph: Any, inputs: list[Tensor]) -> Any:
        self.compilations += 1
        return self.backend(graph, inputs)


def test_36_strategy_set_after_compilation(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled network follows `set_strategy`: what was traced for another strategy is not run on."""
    network = small()
    compiled = torch.compile(network, backend="eager")
    torch._dynamo.reset()
    expected = step(copy.deepcopy(network), images())
    step(compiled, images())
    network.zero_grad()
    network.load_state_dict(small().state_dict())
    calls: list[str] = []
    registered = get_strategy(strategy)

    def counted(stage: Any, x: Tensor) -> Tensor:
        calls.append(stage.name)
        return registered.function(stage, x)

    with monkeypatch.context() as registration:
        registration.setitem(registry._strategies, strategy, replace(registered, function=counted))
        set_strategy(network, strategy)
        actual = _plain_names(step(compiled, images()))
    torch._dynamo.reset()
    assert calls == ["denseblock1", "denseblock2"]
    assert_same(actual, expected)
