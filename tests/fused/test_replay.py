"""When stages are recorded and played back, and that the steps are the same bits as without.

In the interpreter launches are played back, as on a GPU; on the CPU path, in the other tests here, compiled loops
are: the rest is the same code.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from densebench.execution import autograd, parts
from densebench.kernels.started import watched
from densebench.models.layers import DenseBlock
from densebench.prediction.hidden import hidden_on_cpu
from densebench.replay import tracks
from densebench.step_tracker import StepTracker
from tests.comparison import Quantities, everything, upstream
from tests.fused.test_triton_networks import NETWORKS, batch_for
from tests.networks import images, lone_block, norms, small
from tests.replays import STEPS, Counts, Pair, assert_same_bits, infer, tracks_in, train


@contextlib.contextmanager
def launches_of(step: int) -> Iterator[None]:
    """In the block kernels are launched in the first step, in the second the recorder is told of it, then none."""
    launches: list[object] = []
    with watched(lambda *launch: launches.append(launch)):
        yield
    assert bool(launches) == (step == 0)


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
@pytest.mark.parametrize("name", NETWORKS)
def test_launches_are_played_back(name: str, variant: str) -> None:
    """From the third step on nothing is decided: not one launch is made anew."""
    options, _ = NETWORKS[name]
    pair = Pair(small(**options), variant)
    for number in range(STEPS):
        with launches_of(number):
            found = train(pair.replayed, batch_for(name, seed=number))
        with mock.patch.object(autograd, "replayable", return_value=False):
            assert_same_bits(found, train(pair.plain, batch_for(name, seed=number)), f"in step {number + 1}")
    assert [track.refusal for track in tracks_in(pair.replayed)] == [None] * 2 * len(
        pair.replayed.features.stages()
    )


@pytest.mark.usefixtures("replayed")
def test_inference_is_played_back() -> None:
    pair = Pair(small(stem="imagenet", block_config=(2, 1), growth_rate=5).eval())
    for number in range(STEPS):
        with launches_of(number):
            found = infer(pair.replayed, images(2, 20, seed=number))
        with mock.patch.object(autograd, "replayable", return_value=False):
            assert_same_bits(found, infer(pair.plain, images(2, 20, seed=number)))


def test_first_as_it_is_then_recorded_then_played_back(counts: Counts) -> None:
    network = small("fused", block_config=(2,))
    seen = []
    for _ in range(4):
        train(network, images())
        seen.append(dict(counts))
        counts.clear()
    assert seen == [{"plain": 2}, {"recorded": 2}, {"played": 2}, {"played": 2}]


def test_strategies_that_say_nothing_of_it_are_never_recorded(counts: Counts) -> None:
    network = small("shared_buffer")
    for _ in range(3):
        train(network, images())
    assert not counts


def test_sizes_in_turn(counts: Counts) -> None:
    """A smaller last batch, and another side; both are known when they come again."""
    pair = Pair(small())
    for _ in range(3):
        for batch, size in ((4, 8), (2, 8), (4, 6)):
            pair.step(train, images(batch, size))
    assert counts["played"] == 3 * 2 * 2


def test_training_and_evaluation_in_turn(counts: Counts) -> None:
    pair = Pair(small())
    for _ in range(3):
        pair.both(nn.Module.train)
        pair.step(train, images(seed=1))
        pair.both(nn.Module.eval)
        pair.step(train, images(seed=2))
        pair.step(infer, images(seed=3))
    assert counts["played"] == 2 * (2 + 2 + 1)


def test_with_and_without_gradients(counts: Counts) -> None:
    """Of parameters alone: all that differs is whether something is kept."""

    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        output = network(x)
        output.backward(upstream(output))
        return everything(network, output=output)

    pair = Pair(lone_block().eval())
    for _ in range(3):
        pair.step(infer, images(2, 4, 5, seed=1))
        pair.step(infer, images(2, 4, 5, seed=2))
        pair.step(step, images(2, 4, 5, seed=3))
    assert counts["played"] == 2 + 4


def test_what_changes_between_steps_is_seen(counts: Counts) -> None:
    """Modes, options, frozen parameters, dtypes, layouts, and memory that is another's."""
    pair = Pair(small(drop_rate=0.2))

    def of_norms(change: Callable[[nn.BatchNorm2d], object]) -> Callable[[nn.Module], object]:
        return lambda network: change(norms(network)[2])

    def moved(network: nn.Module) -> None:
        for parameter in network.parameters():
            wider = torch.cat((parameter.data.new_zeros(3), parameter.data.flatten()))
            parameter.data = wider[3:].view_as(parameter)

    changes: list[Callable[[nn.Module], object]] = [
        of_norms(lambda norm: setattr(norm, "eps", 0.1)),
        of_norms(lambda norm: setattr(norm, "momentum", 0.5)),
        of_norms(lambda norm: setattr(norm, "track_running_stats", False)),
        of_norms(lambda norm: norm.weight.requires_grad_(False)),
        lambda network: network.features.denseblock1.requires_grad_(False),
        lambda network: setattr(network.features.denseblock2.denselayer1, "drop_rate", 0.5),
        lambda network: network.to(memory_format=torch.channels_last),
        moved,
        lambda network: delattr(network.features.transition1, "pool"),
        of_norms(lambda norm: norm.eval()),
    ]
    for change in changes:
        for number in range(3):
            pair.step(train, images(seed=number))
        before = counts["played"]
        pair.both(change)
        pair.step(train, images())
        assert counts["played"] < before + 4, "all stages were played back, though one had changed"


def test_cumulative_averages(counts: Counts) -> None:
    """Their momentum is another in every step, so no step is like one before; nor does it displace others."""
    network = small()
    for norm in norms(network):
        norm.momentum = None
    pair = Pair(network)
    for number in range(5):
        pair.step(train, images(seed=number))
    assert not counts


def test_two_forwards_then_two_backwards(counts: Counts) -> None:
    def step(network: nn.Module, first: Tensor, second: Tensor) -> Quantities:
        network.zero_grad()
        outputs = [network(first), network(second)]
        for output in outputs if first.sum() > second.sum() else reversed(outputs):
            output.backward(upstream(output))
        return everything(network)

    pair = Pair(small())
    for number in range(4):
        pair.step(step, images(seed=number), images(seed=number + 10))
    assert counts["played"] > 0


def test_backward_twice(counts: Counts) -> None:
    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        output = network(x)
        output.backward(upstream(output), retain_graph=True)
        output.backward(upstream(output, seed=3))
        return everything(network)

    pair = Pair(small())
    for number in range(3):
        pair.step(step, images(seed=number))
    assert counts["played"] > 0


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_a_part_of_the_gradients(counts: Counts, which: str) -> None:
    """`torch.autograd.grad` for a few parameters, before and after all of them were asked for."""
    network = small(block_config=(parts.LAYERS_A_NODE * 2 + 2, 1))
    chosen = {"first": 0, "middle": 70, "last": -3}[which]

    def step(network: nn.Module, x: Tensor) -> Quantities:
        output = network(x)
        wanted = list(network.parameters())[chosen]
        (found,) = torch.autograd.grad(output, [wanted], upstream(output))
        return everything(network, found=found)

    def whole(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        output = network(x)
        output.backward(upstream(output))
        return everything(network)

    pair = Pair(network)
    for number in range(3):
        pair.step(step, images(seed=number))
    for number in range(3):
        pair.step(whole, images(seed=number))
    played = counts["played"]
    pair.step(step, images())
    assert counts["played"] > played


def test_gradients_that_lie_in_another_way(counts: Counts) -> None:
    """Of a sum, of a slice, of the output itself."""

    def step(network: nn.Module, x: Tensor, chosen: Callable[[Tensor], Tensor]) -> Quantities:
        network.zero_grad()
        output = network(x)
        loss = chosen(output)
        loss.backward(upstream(loss))
        return everything(network)

    pair = Pair(lone_block())
    ways: list[Callable[[Tensor], Tensor]] = [Tensor.sum, lambda y: y[..., 1:], lambda y: y, lambda y: y.mT]
    for number in range(3):
        for way in ways:
            pair.step(step, images(2, 4, 5, seed=number), way)
    assert counts["played"] > 0


def test_other_parameters_for_a_call(counts: Counts) -> None:
    """`functional_call` puts tensors in the parameters' places that are no leaves."""

    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        others = {name: 2 * value for name, value in network.named_parameters()}
        output = functional_call(network, others, (x,))
        output.backward(upstream(output))
        return everything(network)

    pair = Pair(small())
    for number in range(3):
        pair.step(step, images(seed=number))
    assert counts["played"] > 0


def test_first_layers_that_are_frozen(counts: Counts) -> None:
    """Backward ends before it has come to them, always at the same."""

    def step(network: nn.Module, x: Tensor) -> Quantities:
        network.zero_grad()
        output = network(x)
        output.backward(upstream(output))
        return everything(network, output=output)

    network = small(block_config=(parts.LAYERS_A_NODE + 2,))
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("layer10" in name or "classifier" in name)
    pair = Pair(network)
    for number in range(STEPS):
        pair.step(step, images(seed=number))
    assert counts == {"plain": 2, "recorded": 2, "played": 4}


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_step_that_fails_while_played_back(counts: Counts, way: str) -> None:
    """It leaves no trace but the buffers that a whole forward has moved, and the next step is right."""
    pair = Pair(small(block_config=(3,)))
    for number in range(3):
        pair.step(train, images(seed=number))
    before = everything(pair.replayed)
    forward, backward = tracks_in(pair.replayed)
    (play,) = (forward if way == "forward" else backward).recording.functions  # type: ignore[union-attr]
    names = play.__globals__
    last = [name for name in names if "relu_norm_product" in name][-1]
    with mock.patch.dict(names, {last: mock.Mock(side_effect=torch.OutOfMemoryError("announced"))}):
        output = pair.replayed(images(seed=3)) if way == "backward" else None
        with pytest.raises(torch.OutOfMemoryError):
            pair.replayed(images(seed=3)) if output is None else output.backward(upstream(output))
    if output is None:
        assert_same_bits(everything(pair.replayed), before)
    else:
        pair.plain(images(seed=3))
    pair.step(train, images(seed=4))


def test_a_copy_knows_nothing_and_nothing_outlives_its_network(counts: Counts) -> None:
    network = small("fused")
    for _ in range(3):
        train(network, images())
    assert list(tracks_in(network))
    assert not list(tracks_in(copy.deepcopy(network)))
    known = [weakref.ref(track) for track in tracks_in(network)]
    del network
    gc.collect()
    assert all(reference() is None for reference in known)


def test_only_what_was_last_in_use_is_kept(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks, "MOST", 2)
    network = small("fused", block_config=(1,))
    for batch in (2, 3, 2, 4):
        train(network, images(batch))
    (block,) = (module for module in network.modules() if isinstance(module, DenseBlock))
    assert len(tracks.tracks_of(block)) == 2
    counts.clear()
    train(network, images(2))
    train(network, images(3))  # the one that had gone
    assert counts == {"played": 2, "plain": 2}


def test_what_cannot_be_written_out_is_done_all_the_same(counts: Counts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracks, "Recording", mock.Mock(side_effect=SyntaxError("announced")))
    pair = Pair(small(block_config=(1,)))
    for number in range(STEPS):
        pair.step(train, images(seed=number))
    assert counts == {"plain": 6, "recorded": 2}
    assert {track.refusal for track in tracks_in(pair.replayed)} == {"announced"}


@pytest.mark.parametrize(("stem", "width"), [("imagenet", 8), ("imagenet", 64), ("cifar", 64)])
@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
def test_no_more_memory_than_without(
    counts: Counts, variant: str, stem: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor so much less that a prediction, which is of a step as it is, would be wrong."""
    network = small(variant, stem=stem, block_config=(4, 3), growth_rate=8, num_init_features=width)
    x = images(4, 64 if stem == "imagenet" else 16)
    for _ in range(3):
        train(network, x)

    def peak() -> int:
        """What operators allocate inside is what they declare; played back, it is seen."""
        with StepTracker(hidden_on_cpu) as tracker:
            train(network, x)
        changes = [0] * (tracker.event + 2)
        for allocation in tracker.allocations:
            changes[allocation.born] += allocation.nbytes
            changes[(tracker.event if allocation.died is None else allocation.died) + 1] -= allocation.nbytes
        inside = [0, *(operation.hidden for operation in tracker.operations)]
        return max(live + hidden for live, hidden in zip(itertools.accumulate(changes), inside, strict=False))

    as_it_is = peak()
    monkeypatch.setattr(autograd, "replayable", lambda x, others, dtype: True)
    assert 0.99 * as_it_is < peak() < 1.001 * as_it_is  # vectors may live a line longer


@pytest.mark.parametrize("variant", ["fused", "fused_recompute"])
@pytest.mark.parametrize("growth_rate", [12, 32])
def test_bfloat16_tile_by_tile_is_played_back(growth_rate: int, variant: str, counts: Counts) -> None:
    """On a CPU: passes of its own and PyTorch's products, of bfloat16 or of float32."""
    network = small(
        stem="imagenet", block_config=(2, 1), growth_rate=growth_rate, num_init_features=2 * growth_rate
    )
    pair = Pair(network.float(), variant)
    for number in range(STEPS):
        x = images(4, 64, seed=number, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            found = pair.replayed(x)
            found.float().square().sum().backward()
            with mock.patch.object(autograd, "replayable", return_value=False):
                expected = pair.plain(x)
                expected.float().square().sum().backward()
        assert torch.equal(found, expected)
        for one, other in zip(pair.replayed.parameters(), pair.plain.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), f"in step {number + 1}"
    assert counts["played"]
