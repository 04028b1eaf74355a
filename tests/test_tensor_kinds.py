"""Inputs that are tensors of a kind of their own, and what autograd and torch.func put in a tensor's place."""

from __future__ import annotations

import threading
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from densebench.registry import UnsupportedError, get_strategy
from tests.comparison import assert_same, buffers, everything, upstream
from tests.networks import images, lone_block, small

WITH_PLAIN = True


class Marked(Tensor):
    """As MONAI's MetaTensor: carries something beside its values, and makes new tensors of a tuple alone."""

    mark: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        marks = [vars(arg)["mark"] for arg in tree_leaves(args) if isinstance(arg, Marked) and "mark" in vars(arg)]
        if isinstance(made, Marked) and marks:
            made.mark = marks[0]
        return made

    def new_empty(self, size: tuple[int, ...], dtype: Any = None, device: Any = None) -> Any:  # type: ignore[override]
        return super().new_empty(tuple(size), dtype=dtype, device=device)


def _marked(x: Tensor) -> Marked:
    made = x.as_subclass(Marked)
    made.mark = "affine"
    return made


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_subclass_comes_out_as_from_modules(strategy: str, training: bool) -> None:
    """With what it carries, and with gradients."""
    found = []
    for name in ("naive", strategy):
        network = small(name).train(training)
        for number in range(3):
            network.zero_grad()
            output = network(_marked(images(seed=number)))
            assert type(output) is Marked
            assert output.mark == "affine"
            output.backward(upstream(output.as_subclass(Tensor)))
        found.append(everything(network, output=output.detach().as_subclass(Tensor)))
    assert_same(found[1], found[0])


def test_without_gradients_too(strategy: str) -> None:
    with torch.inference_mode():
        outputs = [small(name).eval()(_marked(images())) for name in ("naive", strategy)]
    torch.testing.assert_close(*(output.as_subclass(Tensor) for output in outputs))


def test_imagined_tensors_have_shapes(strategy: str) -> None:
    """On the device `meta`, as whoever counts parameters and shapes before there is memory uses it."""
    network = small(strategy).to("meta")
    x = images().to("meta")
    output = network(x)
    output.sum().backward()
    assert output.shape == small()(images()).shape
    assert network.eval()(x).shape == output.shape
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())


def _first_only(strategy: str) -> bool:
    return get_strategy(strategy).derivatives == "first"


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_is_right_or_refused_in_a_sentence(strategy: str, grad: bool) -> None:
    network, x = small(strategy).eval(), images(3)
    with torch.set_grad_enabled(grad):
        if _first_only(strategy):
            with pytest.raises(NotImplementedError, match=r"torch\.vmap"):
                torch.vmap(network)(x[:, None])
        else:
            torch.testing.assert_close(torch.vmap(network)(x[:, None])[:, 0], network(x))


def test_gradients_in_batches_are_right_or_refused_in_a_sentence(strategy: str) -> None:
    network = lone_block(strategy).eval()
    x = images(2, 4, 5).requires_grad_()
    output = network(x)
    batch = torch.stack([torch.ones_like(output), upstream(output)])
    if _first_only(strategy):
        with pytest.raises(NotImplementedError, match="is_grads_batched"):
            torch.autograd.grad(output, x, batch, is_grads_batched=True)
    else:
        (found,) = torch.autograd.grad(output, x, batch, is_grads_batched=True, retain_graph=True)
        torch.testing.assert_close(found[1], *torch.autograd.grad(output, x, batch[1]))


def test_a_second_derivative_is_right_or_an_error_whatever_is_asked_for(strategy: str) -> None:
    """Also where autograd only goes to what it was asked for: parameters, or x, of block and head."""
    for network, channels in ((lone_block(strategy), 5), (small(strategy), 3)):
        x = images(channels=channels).requires_grad_()
        output = network(x)
        # The gradient given depends on nothing: through one that does, errors would find their way, too.
        (gradient,) = torch.autograd.grad(output, x, upstream(output), create_graph=True)
        penalty = output.sum() + gradient.square().sum()
        for wanted in ([x], [next(network.parameters())], list(network.parameters())):
            if not _first_only(strategy):
                torch.autograd.grad(penalty, wanted, retain_graph=True)
                continue
            with pytest.raises(RuntimeError, match="differentiate twice"):
                torch.autograd.grad(penalty, wanted, retain_graph=True)
    if not _first_only(strategy):
        return
    x5 = images(2, 4, 5)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.functional.hvp(lambda x: lone_block(strategy).eval()(x).square().sum(), x5, x5)


def test_first_derivatives_with_a_graph_are_those_without(strategy: str) -> None:
    found = []
    for graph in (False, True):
        network, x = small(strategy), images().requires_grad_()
        wanted = [x, *network.parameters()]
        found.append(torch.autograd.grad(network(x).square().sum(), wanted, create_graph=graph))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_of_torch_func_are_right_or_refused_in_a_sentence(strategy: str, training: bool) -> None:
    """In training PyTorch itself refuses the modules' counters, which are written in place."""
    network, x = small(strategy).train(training), images()
    parameters = dict(network.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    if get_strategy(strategy).derivatives != "all":
        with pytest.raises(NotImplementedError, match=r"gradients of torch\.func .* work with .*'naive'"):
            torch.func.grad(loss)(parameters)
    elif not training:
        try:
            found = torch.func.grad(loss)(parameters)
        except RuntimeError as error:
            raise AssertionError(
                f"{strategy} has derivatives='all'; 'autograd' are those without these"
            ) from error
        network(x).square().sum().backward()
        assert_same(found, {name: parameter.grad for name, parameter in network.named_parameters()})
    else:
        with pytest.raises(RuntimeError, match="in-place operation"):
            torch.func.grad(loss)(parameters)


def test_forward_mode_derivatives_are_right_or_refused_in_a_sentence(strategy: str) -> None:
    network, x = small(strategy).eval(), images()
    if _first_only(strategy):
        with pytest.raises(NotImplementedError, match=r"forward-mode derivatives work with .*'naive'"):
            torch.func.jvp(network, (x,), (x,))
        return
    if torch.__version__ < "2.12" and get_strategy(strategy).derivatives != "all":
        pytest.skip("before PyTorch 2.12 torch.utils.checkpoint refuses forward-mode differentiation")
    torch.testing.assert_close(
        torch.func.jvp(network, (x,), (x,)), torch.func.jvp(small().eval(), (x,), (x,)), rtol=1e-9, atol=1e-9
    )


def test_what_replaces_a_convolution_inside_is_refused_or_called(strategy: str) -> None:
    """`_conv_forward` of one's own, as for images whose borders join."""
    network = small(strategy)
    conv = network.get_submodule("features.denseblock1.denselayer2.conv2")
    calls: list[nn.Module] = []

    def forward(conv: nn.Conv2d, *arguments: Any) -> Tensor:
        calls.append(conv)
        return nn.Conv2d._conv_forward(conv, *arguments)

    conv._conv_forward = types.MethodType(forward, conv)
    if get_strategy(strategy).bypasses == "nothing":
        network(images())
        assert calls == [conv]
        return
    with pytest.raises(UnsupportedError, match=r"denselayer2\.conv2, which has a replaced _conv_forward"):
        network(images())


def test_threads_go_back_through_one_graph_at_a_time(strategy: str) -> None:
    """Each backward has buffers of its own; PyTorch's nodes can be run by several threads."""
    network, x = small(strategy).eval(), images().requires_grad_()
    expected, ends = torch.autograd.grad(small().eval()(x).square().sum(), x)[0], []

    def go_back(loss: Tensor) -> None:
        try:
            (found,) = torch.autograd.grad(loss, x, retain_graph=True)
            ends.append("right" if torch.allclose(found, expected) else "wrong")
        except BaseException as error:
            ends.append(repr(error))

    for _ in range(10):
        loss = network(x).square().sum()
        threads = [threading.Thread(target=go_back, args=(loss,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(ends) == {"right"}


def test_norms_that_layers_share_and_whose_momentum_is_cumulative(strategy: str) -> None:
    """Each call counts as a batch of its own."""
    found = []
    for name in ("naive", strategy):
        network = small(name)
        for own in ("denseblock1", "denseblock2"):
            first, second, *_ = network.get_submodule(f"features.{own}").layers
            second.norm2 = first.norm2
            first.norm2.momentum = None
        for number in range(4):
            network(images(seed=number))
        found.append(buffers(network))
    assert_same(found[1], found[0])
