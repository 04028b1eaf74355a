"""What goes wrong with shapes and memory layouts: tails, single values, empty batches, strides.

Numbers are those of the project's list of failure modes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.comparison import Quantities, assert_as_naive, everything, play, step, step_or_error, upstream
from tests.networks import images, lone_block, norms, small, with_strategy
from tests.properties import HealthCheck, given, settings, st


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # `strategy` is a name: nothing to set up anew
)
@given(data=st.data())
def test_16_odd_shapes(strategy: str, data: st.DataObject) -> None:
    """Tails: channels, pixels and images that are no power of two or multiple of a tile (NVIDIA/apex#1768)."""
    block = {
        "layers": data.draw(st.integers(1, 4)),
        "channels": data.draw(st.sampled_from([1, 3, 17, 63, 64, 65])),
        "growth_rate": data.draw(st.sampled_from([1, 3, 12, 17])),
        "bn_size": data.draw(st.sampled_from([None, 1, 4])),
    }
    batch, height, width = (data.draw(st.integers(1, top)) for top in (9, 7, 14))
    x = images(batch, 14, block["channels"])[:, :, : height + 1, :width]
    network = lone_block(**block).train(data.draw(st.booleans()))
    assert_as_naive(strategy, lambda n: step(n, x), network)


SHAPES = {
    "one value a channel": (1, 5, 1, 1),
    "two images of one pixel": (2, 5, 1, 1),
    "one row": (1, 5, 1, 9),
    "one column": (3, 5, 7, 1),
    "no image": (0, 5, 4, 4),
    "no row": (2, 5, 0, 4),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
def test_27_smallest_shapes(strategy: str, shape: tuple[int, ...], training: bool) -> None:
    """Naive's result or naive's exception, word for word (pytorch#2961, #12013, #29975)."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    network = lone_block().train(training)

    assert_as_naive(strategy, lambda n: step_or_error(n, x), network)


def _flat_buffers(network: nn.Module) -> nn.Module:
    """Running statistics that are strided slices of one tensor, as optimizers and DDP flatten them."""
    for norm in norms(network):
        flat = torch.stack((norm.running_mean, norm.running_var), 1)
        norm.running_mean, norm.running_var = flat[:, 0], flat[:, 1]
    return network


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every second column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "some channels of more": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("weights", ["contiguous", "channels last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_33_memory_layouts(strategy: str, layout: str, weights: str) -> None:
    """Any layout of input, weights and running statistics (pytorch#107199, #33867: a lost update)."""
    chosen = torch.channels_last if weights == "channels last" else torch.contiguous_format

    def scenario(network: Any) -> Quantities:
        x: Tensor = LAYOUTS[layout](images(channels=5)).requires_grad_()
        network = _flat_buffers(network.to(memory_format=chosen))
        output = network(x)
        output.backward(upstream(output))
        return everything(network, output=output, input=x.grad)

    assert_as_naive(strategy, scenario, lone_block())


def test_33_output_has_the_layout_of_naives(strategy: str) -> None:
    """A channels-last network must stay one, and a contiguous one too: what follows would convert every map."""
    network = small(block_config=(2, 2), global_pool=False, num_classes=None)
    for layout in ("contiguous", "channels last"):
        x = LAYOUTS[layout](images())
        outputs = [play(lambda n, x=x: {"y": n(x)}, network, name)["y"] for name in ("naive", strategy)]
        assert outputs[0].stride() == outputs[1].stride(), layout


def test_33_empty_batch_changes_nothing(every_strategy: str) -> None:
    """No image: no statistics moved, no gradient but zero (an odd last batch after filtering)."""
    network = with_strategy(small(), every_strategy)
    before = {n: b.clone() for n, b in network.named_buffers() if "running" in n}
    output = network(images(0).requires_grad_())
    output.sum().backward()
    assert output.shape == (0, 5)
    assert all(torch.equal(b, before[n]) for n, b in network.named_buffers() if "running" in n)
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())
