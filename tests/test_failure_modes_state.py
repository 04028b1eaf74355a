"""What goes wrong with memory and state: buffers shared too long, statistics moved twice, retries, copies.

Numbers are those of the project's list of failure modes.
"""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Iterable
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from densebench.models import set_strategy
from densebench.registry import list_strategies
from tests.comparison import (
    TIGHT,
    Quantities,
    assert_as_naive,
    assert_same,
    buffers,
    everything,
    play,
    step,
    upstream,
)
from tests.networks import images, small, with_strategy


def test_04_no_statistics_kept_by_address(strategy: str) -> None:
    """A freed tensor's address comes back with other values in it: 998 of 1000 times, measured."""

    def scenario(network: Any) -> Quantities:
        results: Quantities = {}
        for number in range(4):
            x = images(seed=number)
            results |= {f"{number}: {name}": value for name, value in step(network, x).items()}
            del x
        return results

    assert_as_naive(strategy, scenario, small())


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_05_running_statistics_move_once_a_step(every_strategy: str, steps: int) -> None:
    """Recomputing a norm in backward must not count its batch again (pytorch/pytorch#96136)."""
    network, truth = small(every_strategy), small()
    for number in range(steps):
        step(network, images(seed=number))
        with torch.no_grad():
            truth(images(seed=number))
    assert_same(buffers(network), buffers(truth))
    assert {int(b) for n, b in network.named_buffers() if "num_batches" in n} == {steps}


def test_05_forward_alone_moves_them(strategy: str) -> None:
    """They belong to the forward: a step that is given up has moved them, and backward adds nothing."""

    def scenario(network: Any) -> Quantities:
        network(images())
        return buffers(network)

    assert_as_naive(strategy, scenario, small())


def test_05_without_gradients_too(strategy: str) -> None:
    """Re-estimating statistics under `no_grad` is common; the square root of momentum trick fails there."""

    def scenario(network: Any) -> Quantities:
        with torch.no_grad():
            output = network(images())
        return everything(network, output=output)

    assert_as_naive(strategy, scenario, small())


def test_05_second_backward_does_not_move_them(strategy: str) -> None:
    """`backward(retain_graph=True)` recomputes twice."""

    def scenario(network: Any) -> Quantities:
        output = network(images())
        output.backward(upstream(output), retain_graph=True)
        output.backward(upstream(output))
        return everything(network)

    assert_as_naive(strategy, scenario, small())


class _Fail(TorchDispatchMode):
    """Counts operations and runs out of memory at one of them."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at = at
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise MemoryError("injected")
        return func(*args, **(kwargs or {}))


def _operations(network: nn.Module, x: Tensor) -> tuple[int, int]:
    """Operations of the forward, and of forward and backward."""
    network = copy.deepcopy(network)
    with _Fail() as count:
        output = network(x)
        forward = count.count
        output.backward(upstream(output))
    return forward, count.count


def _places(start: int, stop: int, number: int = 12) -> Iterable[int]:
    return range(start, stop + 1, max(1, (stop - start) // number))


def _fail(network: nn.Module, x: Tensor, at: int) -> None:
    def fail() -> None:
        output = network(x)
        output.backward(upstream(output))

    with pytest.raises(MemoryError, match="injected"), _Fail(at):
        fail()


def test_06_failed_forward_leaves_no_half_moved_statistics(strategy: str) -> None:
    """Out of memory halfway: each running statistic is as before or as after the step, never between.

    Those of a stage that has finished may have moved, as they have in plain modules.
    """
    network, x = small(strategy), images()
    before = buffers(network)
    after = play(lambda n: step(n, x), network, strategy)
    for at in _places(1, _operations(network, x)[0]):
        broken = copy.deepcopy(network)
        _fail(broken, x, at)
        for name, value in buffers(broken).items():
            unmoved, moved = torch.equal(value, before[name]), torch.equal(value, after[name])
            assert unmoved or moved, f"{name} is half moved by a failure at operation {at}"


def test_06_retry_after_a_failed_forward_or_backward(strategy: str) -> None:
    """After a failure and with the state restored, a step is what it would have been."""
    network, x = small(strategy), images()
    state = copy.deepcopy(network.state_dict())
    expected = play(lambda n: step(n, x), network, "naive")
    for at in _places(1, _operations(network, x)[1]):
        _fail(network, x, at)
        network.load_state_dict(state)
        network.zero_grad()
        assert_same(step(network, x), expected)
        network.load_state_dict(state)
        network.zero_grad()


def test_13_gradients_share_no_memory(every_strategy: str) -> None:
    """Gradients that alias make any comparison of them compare a tensor with itself (Liger-Kernel#1305)."""
    x, y = images().requires_grad_(), images(seed=2).requires_grad_()
    network, other = small(every_strategy), small(every_strategy)
    outputs = [network(x), other(y)]
    for output in outputs:
        output.backward(upstream(output))
    tensors = [x, y, x.grad, y.grad, *outputs]
    for each in (network, other):
        tensors += [t for p in each.parameters() for t in (p.data, p.grad)] + list(each.buffers())
    ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors)
    for (_, end), (start, _) in pairwise(ranges):
        assert end <= start, "two tensors of one step lie in the same memory"


def test_17_smaller_batch_after_a_larger(strategy: str) -> None:
    """Rows of the batch before in a buffer kept for the largest (vllm-project/vllm-ascend#15714)."""
    sizes = [(8, 8), (8, 8), (3, 8), (8, 6), (2, 10), (1, 5)]

    def scenario(network: Any) -> Quantities:
        steps = ((f"{i}", step(network, images(n, side, seed=i))) for i, (n, side) in enumerate(sizes))
        return {f"{number}: {name}": value for number, values in steps for name, value in values.items()}

    assert_as_naive(strategy, scenario, small())


def test_18_two_networks_interleaved(strategy: str) -> None:
    """Networks alive together share no scratch that one of them still needs (efficient_densenet#17)."""

    def scenario(network: Any) -> Quantities:
        other = copy.deepcopy(network)
        a, b = network(images(seed=1)), other(images(seed=2))
        a.backward(upstream(a))
        b.backward(upstream(b))
        return everything(network) | {f"other {n}": v for n, v in everything(other).items()}

    assert_as_naive(strategy, scenario, small())


def test_18_two_threads(strategy: str) -> None:
    """Two threads with a network each get what each gets alone (flashinfer-ai/flashinfer#4476)."""
    networks = [small(strategy, seed=seed) for seed in (0, 1)]
    batches = [images(seed=seed) for seed in range(8)]
    alone = [[step(copy.deepcopy(network), x) for x in batches] for network in networks]
    together: list[list[Quantities]] = [[], []]

    def run(number: int) -> None:
        together[number] += [step(copy.deepcopy(networks[number]), x) for x in batches]

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, expected in zip(chain(*together), chain(*alone), strict=True):
        assert_same(actual, expected, TIGHT)


def test_32_state_has_the_same_names_under_every_strategy(every_strategy: str) -> None:
    """Scratch registered as a buffer would end up in checkpoints (efficient_densenet#22)."""
    network = small()
    names = list(network.state_dict())
    with_strategy(network, every_strategy)
    step(network, images())
    assert list(network.state_dict()) == names


def test_32_weights_pass_between_all_strategies(every_strategy: str) -> None:
    """A state saved mid-training under one strategy goes on under any other and back."""
    network = small(every_strategy)
    step(network, images(seed=1))
    network.zero_grad()
    expected = play(lambda n: step(n, images(seed=2)), network, every_strategy)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    for name in (*list_strategies(), every_strategy):
        file.seek(0)
        other = small(seed=3)
        other.load_state_dict(torch.load(file))
        assert_same(step(set_strategy(other, name), images(seed=2)), expected)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_32_copies_mid_training_are_independent(every_strategy: str, how: str) -> None:
    """A copy taken while a graph is alive goes on by itself and shares nothing (an EMA, a checkpoint)."""
    network = small(every_strategy)
    output = network(images(seed=1))
    copied = copy.deepcopy(network) if how == "deepcopy" else pickle.loads(pickle.dumps(network))
    pointers = {t.data_ptr() for t in chain(network.parameters(), network.buffers())}
    assert not pointers & {t.data_ptr() for t in chain(copied.parameters(), copied.buffers())}
    output.backward(upstream(output))
    network.zero_grad()
    assert copied.strategy == every_strategy
    assert_same(step(copied, images(seed=2)), step(network, images(seed=2)), TIGHT)
