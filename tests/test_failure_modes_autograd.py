"""What goes wrong between a strategy and autograd: graphs that overlap, repeat, or come with odd gradients.

Numbers are those of the project's list of failure modes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from densebench.models import Transition
from densebench.models.features import Features
from densebench.step_tracker import StepTracker
from tests.comparison import (
    TIGHT,
    Quantities,
    assert_as_naive,
    assert_same,
    everything,
    play,
    step,
    upstream,
)
from tests.networks import architecture, draw_norms, images, lone_block, small, with_strategy


def _backward(output: Tensor, seed: int = 7, **options: Any) -> None:
    output.backward(upstream(output, seed), **options)


@pytest.mark.parametrize("order", ["in order", "last first", "summed"])
def test_01_second_forward_before_first_backward(strategy: str, order: str) -> None:
    """A buffer kept on the module is overwritten by the second forward: gradients silently wrong.

    linkedin/Liger-Kernel#1251, unslothai/unsloth#5002, gpleiss/efficient_densenet_pytorch#11.
    """

    def scenario(network: Any) -> Quantities:
        first, second = images(seed=1).requires_grad_(), images(seed=2).requires_grad_()
        a, b = network(first), network(second)
        if order == "summed":
            _backward(a + 2 * b)
        else:
            for output in (a, b) if order == "in order" else (b, a):
                _backward(output)
        return everything(network, a=a, b=b, first=first.grad, second=second.grad)

    assert_as_naive(strategy, scenario, small())


def test_01_evaluation_between_forward_and_backward(strategy: str) -> None:
    """A validation pass in the middle of a step must not touch what backward will read."""

    def scenario(network: Any) -> Quantities:
        output = network(images())
        with torch.no_grad():
            evaluated = network.eval()(images(seed=2))
        network.train()
        _backward(output)
        return everything(network, output=output, evaluated=evaluated)

    assert_as_naive(strategy, scenario, small())


def test_02_right_in_the_whole_network(strategy: str) -> None:
    """Right alone and wrong between its neighbors (gpleiss/efficient_densenet_pytorch#28)."""
    network, x = architecture("four_blocks")
    assert_as_naive(strategy, lambda network: step(network, x), network)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("tail", [True, False])
def test_03_gradient_through_shared_statistics(every_strategy: str, training: bool, tail: bool) -> None:
    """Mean and variance of a feature feed every later layer; leave one path out and training looks normal.

    Against finite differences, so no strategy is the reference.
    """
    network = lone_block(growth_rate=2, channels=3, bn_size=1)
    if tail:
        network.add_module("transition1", Transition(9))
        draw_norms(network)
    network = with_strategy(network.double().train(training), every_strategy)
    inputs = (images(2, 3, 3).requires_grad_(), *network.parameters())
    # The parameters are the network's own tensors: gradcheck moves them in place.
    torch.autograd.gradcheck(lambda x, *_: network(x), inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


def test_07_backward_twice(strategy: str) -> None:
    """What the first backward overwrites or frees, the second misses (Liger-Kernel RMSNorm in_place)."""

    def scenario(network: Any) -> Quantities:
        x = images().requires_grad_()
        output = network(x)
        _backward(output, seed=1, retain_graph=True)
        once = everything(network, input=x.grad)
        _backward(output, seed=2)
        return {**once, **{f"twice {n}": v for n, v in everything(network, input=x.grad).items()}}

    assert_as_naive(strategy, scenario, small())


def test_07_gradient_of_the_output_is_left_alone(every_strategy: str) -> None:
    """The gradient that autograd hands in belongs to others too (Dao-AILab/quack#209)."""
    network = lone_block(every_strategy)
    output = network(images(channels=5).requires_grad_())
    given = upstream(output)
    before = given.clone()
    output.backward(given)
    assert torch.equal(given, before)


@pytest.mark.parametrize("name", [n for n, _ in lone_block(layers=1).named_parameters() if not n.endswith("bias")])
def test_07_parameter_changed_before_backward(every_strategy: str, name: str) -> None:
    """An optimizer step between forward and backward: autograd refuses, and what is recomputed must too."""
    network = lone_block(every_strategy)
    output = network(images(channels=5).requires_grad_())
    with torch.no_grad():
        network.get_parameter(name).add_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        _backward(output)


def _strided(values: Tensor) -> dict[str, Tensor]:
    """The same values in memory laid out in ways that a kernel may not expect."""
    wide = torch.full((*values.shape[:3], 2 * values.shape[3]), torch.nan, dtype=values.dtype)
    wide[..., ::2] = values
    flat = torch.full((values.numel() + 1,), torch.nan, dtype=values.dtype)
    flat[1:] = values.flatten()
    return {
        "transposed": values.transpose(2, 3).contiguous().transpose(2, 3),
        "every second element": wide[..., ::2],
        "channels last": values.contiguous(memory_format=torch.channels_last),
        "at an offset": flat[1:].view(values.shape),
    }


@pytest.mark.parametrize("name", list(_strided(torch.zeros(1, 1, 1, 1))))
def test_08_strided_gradient_of_the_output(every_strategy: str, name: str) -> None:
    """A gradient need not be contiguous (mapillary/inplace_abn#155, Dao-AILab/flash-attention#355)."""
    contiguous = _from_gradient(every_strategy, lambda g: g)
    strided = _from_gradient(every_strategy, lambda g: _strided(g)[name])
    assert_same(strided, contiguous, TIGHT)


def test_08_expanded_gradient_of_the_output(every_strategy: str) -> None:
    """`output.sum()` gives a gradient of stride 0, one element in memory."""
    contiguous = _from_gradient(every_strategy, torch.ones_like)
    expanded = _from_gradient(every_strategy, lambda g: torch.ones((), dtype=g.dtype).expand(g.shape))
    assert_same(expanded, contiguous, TIGHT)


def _from_gradient(strategy: str, lay_out: Callable[[Tensor], Tensor]) -> Quantities:
    network = lone_block(strategy)
    x = images(channels=5).requires_grad_()
    output = network(x)
    output.backward(lay_out(upstream(output)))
    return everything(network, input=x.grad)


def test_19_backward_in_another_thread(strategy: str) -> None:
    """Autograd runs CUDA backwards in its own threads: nothing may be kept per thread (pytorch#124565)."""

    def scenario(network: Any) -> Quantities:
        x = images().requires_grad_()
        output = network(x)
        errors: list[BaseException] = []

        def backward() -> None:
            try:
                _backward(output)
            except BaseException as error:  # shown below: in a thread it would be lost
                errors.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
        assert not errors, errors
        return everything(network, input=x.grad)

    assert_as_naive(strategy, scenario, small())


def test_19_without_autograd_threads(strategy: str) -> None:
    """`set_multithreading_enabled(False)` changes who runs backward, not what comes out."""

    def scenario(network: Any) -> Quantities:
        with torch.autograd.set_multithreading_enabled(False):
            return step(network, images())

    assert_as_naive(strategy, scenario, small())


@pytest.mark.parametrize("frozen", range(16))
def test_26_every_combination_of_frozen_parts(strategy: str, frozen: int) -> None:
    """Each of input, norm weights, norm biases and convolutions may need no gradient (pytorch/vision#2221)."""

    def scenario(network: Any) -> Quantities:
        for name, parameter in network.features.named_parameters():
            kind = 1 if "conv" in name else 2 if name.endswith("weight") else 3
            parameter.requires_grad_(not frozen & (1 << kind))
        x = images().requires_grad_(not frozen & 1)
        _backward(network(x))
        return everything(network, input=x.grad)

    assert_as_naive(strategy, scenario, small())


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_26_frozen_beginning(strategy: str, layers: int) -> None:
    """Fine-tuning the end of a block: backward stops where nothing before needs a gradient."""

    def scenario(network: Any) -> Quantities:
        for layer in list(network.denseblock1.children())[:layers]:
            layer.requires_grad_(False)
        _backward(network(images(channels=5)))
        return everything(network)

    assert_as_naive(strategy, scenario, lone_block())


def test_26_no_work_for_what_is_frozen(every_strategy: str) -> None:
    """A frozen network costs no convolution in backward: only the classifier's product is computed."""
    network = small(every_strategy)
    network.features.requires_grad_(False)
    output = network(images())
    with StepTracker() as tracker:
        _backward(output)
    assert tracker.flops == 2 * 4 * network.classifier.weight.numel()


def test_26_gradients_of_some_tensors_only(strategy: str) -> None:
    """`torch.autograd.grad` asks for a few gradients, and another call for the rest of the same graph."""

    def scenario(network: Any) -> Quantities:
        x = images().requires_grad_()
        output = network(x)
        weight = network.features.denseblock2.denselayer2.conv1.weight
        (some,) = torch.autograd.grad(output, weight, upstream(output), retain_graph=True)
        (rest,) = torch.autograd.grad(output, x, upstream(output), retain_graph=True)
        _backward(output)
        return everything(network, some=some, rest=rest)

    assert_as_naive(strategy, scenario, small(block_config=(2, 12)))


def test_34_second_derivative_right_or_refused(strategy: str) -> None:
    """A custom backward built on detached numbers gives a wrong second derivative in silence.

    A gradient penalty added to another loss, as it is trained with: a penalty whose gradient is a constant to
    autograd would just drop out of the sum.
    """
    network = lone_block()

    def scenario(network: Features) -> Quantities:
        x = images(2, 4, 5).requires_grad_()
        output = network(x)
        (gradient,) = torch.autograd.grad(output, x, upstream(output), create_graph=True)
        assert gradient.requires_grad
        (output.square().sum() + gradient.square().sum()).backward()
        return everything(network, input=x.grad)

    expected = play(scenario, network, "naive")
    try:
        actual = play(scenario, network, strategy)
    except RuntimeError as error:
        assert "differentiate twice" in str(error)  # noqa: PT017 - either ending is right
    else:
        assert_same(actual, expected)
