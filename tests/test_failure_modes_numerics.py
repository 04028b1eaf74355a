"""What goes wrong with numbers: masks, variances, NaN, odd norm options, degenerate shapes, memory layouts.

Numbers are those of the project's list of failure modes.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.comparison import (
    TIGHT,
    Quantities,
    assert_as_naive,
    everything,
    play,
    relative_error,
    step,
    upstream,
)
from tests.networks import align_masks, images, lone_block, norms, small, with_strategy


def test_09_gradients_in_float32_with_masks_aligned(strategy: str) -> None:
    """Without values near zero in any ReLU float32 agrees to 1e-5, so a larger error is no mask flip."""
    network = small(block_config=(2, 2, 2)).float()
    align_masks(network)
    x = images(dtype=torch.float32)
    assert_as_naive(strategy, lambda n: _without_buffers(step(n, x)), network, gate=1e-5)


def _without_buffers(quantities: Quantities) -> Quantities:
    return {name: value for name, value in quantities.items() if not name.startswith("buffer")}


@pytest.mark.parametrize("spread", [0, 1, 1e1, 1e2, 1e3, 1e4])
def test_10_variance_of_values_far_from_zero(every_strategy: str, spread: float) -> None:
    """E[x^2] - E[x]^2 cancels: at mean/std 1e4 it is negative (tensorflow/tensorflow#25115)."""
    network = lone_block(every_strategy, layers=1).float()
    norm = network.denseblock1.denselayer1.norm1
    norm.momentum = 1.0
    x = (images(8, 8, 5) + spread).float()
    network(x)
    error = (norm.running_var.double() / x.double().var((0, 2, 3)) - 1).abs().max()
    assert error <= 2e-5


def test_10_values_near_the_end_of_float32(strategy: str) -> None:
    """Squares overflow and the norms become whatever PyTorch's become, not something else."""
    x = images(channels=5, dtype=torch.float32) * 1e30
    assert_as_naive(strategy, lambda n: step(n, x), lone_block().float(), gate=1e-5)


def test_14_no_result_is_left_uncomputed(strategy: str) -> None:
    """Fresh memory is often zero or the right values of last time; here it is filled with NaN.

    ScalingIntelligence/KernelBench#165: zeros pass four of sixty problems.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "this PyTorch does not poison fresh memory"
    assert_as_naive(strategy, lambda n: step(n, images()), small())
    assert_as_naive(strategy, lambda n: step(n.eval(), images()), small())


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
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


def test_20_dropout_mask_is_drawn_once(strategy: str) -> None:
    """A mask redrawn in backward zeroes other elements than the forward did (openai/guided-diffusion#167).

    And the random numbers after the step are those that would follow naive's.
    """

    def scenario(network: Any) -> Quantities:
        result = step(network, images())
        return result | {"next random numbers": torch.rand(4, dtype=torch.float64)}

    assert_as_naive(strategy, scenario, small(drop_rate=0.3), TIGHT)


def test_20_no_dropout_in_evaluation(strategy: str) -> None:
    """Dropout belongs to training, layer by layer: a layer in evaluation drops nothing."""
    network = small(drop_rate=0.3)
    network.features.denseblock2.denselayer2.eval()
    assert_as_naive(strategy, lambda n: step(n, images()), network, TIGHT)
    assert_as_naive(strategy, lambda n: step(n.eval(), images()), network, TIGHT)


def _odd_weights(network: nn.Module) -> nn.Module:
    """Norm weights from -2 to 2 with zeros, and biases of which every other is zero."""
    values = torch.tensor([-2.0, -1e-8, 0.0, 1e-8, 2.0, 0.0, 1.0])
    for norm in norms(network):
        with torch.no_grad():
            norm.weight.copy_(values.repeat(norm.num_features)[: norm.num_features])
            norm.bias[::2] = 0.0
    return network


@pytest.mark.parametrize("training", [True, False])
def test_21_negative_and_zero_norm_weights(strategy: str, training: bool) -> None:
    """|weight|, division by weight, and a mask that is open at exactly zero (mapillary/inplace_abn#4, #92)."""
    network = _odd_weights(small()).train(training)
    assert_as_naive(strategy, lambda n: step(n, images()), network)


def test_21_training_through_zero(strategy: str) -> None:
    """Ten steps of SGD that carry norm weights across zero."""

    def scenario(network: Any) -> Quantities:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.03)
        for number in range(10):
            optimizer.zero_grad()
            output = network(images(seed=number))
            output.backward(upstream(output))
            optimizer.step()
        return everything(network, **dict(network.named_parameters()))

    network = _odd_weights(small())
    before = network.features.denseblock1.denselayer1.norm1.weight.sign()
    results = assert_as_naive(strategy, scenario, network)
    after = results["features.denseblock1.denselayer1.norm1.weight"].sign()
    assert (before != after).any(), "no weight crossed zero: the test shows nothing"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_22_nan_and_infinity_pass_through(strategy: str, value: float, training: bool) -> None:
    """A maximum or a `where` swallows NaN where PyTorch's ReLU hands it, and its gradient, on.

    NVIDIA/TensorRT-LLM#18082. Everything that naive makes NaN or infinite must be just that.
    """
    x = images(channels=5)
    x[1, 2, 3, 4] = value
    network = lone_block(bn_size=2).train(training)
    results = assert_as_naive(strategy, lambda n: step(n, x), network)
    assert not results["output"].isfinite().all()


def test_22_gradient_scaler_skips_the_step(every_strategy: str) -> None:
    """An overflow that a strategy hides would be trained on."""
    network = small(every_strategy).float()
    before = network.classifier.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = images(dtype=torch.float32)
    x[0, 0, 0, 0] = math.inf
    scaler.scale(network(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0
    assert torch.equal(network.classifier.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_23_statistics_of_half_precision_maps(every_strategy: str, dtype: torch.dtype) -> None:
    """Sums of large values overflow float16 (apple/coreai-torch#54), and bfloat16 loses the variance."""
    network = lone_block(every_strategy, layers=1).float()
    norm = network.denseblock1.denselayer1.norm1
    norm.momentum = 1.0
    x = (images(8, 8, 5) * 2e3 + 1e4).to(dtype)
    with torch.autocast("cpu", dtype):
        network(x)
    assert norm.running_var.dtype == norm.running_mean.dtype == torch.float32
    assert relative_error(norm.running_mean, x.double().mean((0, 2, 3))) < 1e-6
    assert relative_error(norm.running_var, x.double().var((0, 2, 3))) < 1e-4


OPTIONS: dict[str, dict[str, Any]] = {
    "momentum None": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 0.3": {"momentum": 0.3},
    "momentum 1": {"momentum": 1.0},
    "large eps": {"eps": 0.3},
    "eps 0": {"eps": 0.0},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", list(OPTIONS.values()), ids=list(OPTIONS))
def test_24_options_of_batch_norm(strategy: str, options: dict[str, Any], training: bool) -> None:
    """Each norm's own eps, momentum, affine and statistics count; every second norm has the options."""
    network = small(block_config=(3, 2))
    for name, module in list(network.features.named_modules())[::2]:
        if type(module) is nn.BatchNorm2d:
            parent, _, child = name.rpartition(".")
            norm = nn.BatchNorm2d(module.num_features, **options).double()
            setattr(network.features.get_submodule(parent), child, norm)

    def scenario(network: Any) -> Quantities:
        results = step(network, images(seed=1))
        return results | {f"then {name}": value for name, value in step(network, images(seed=2)).items()}

    assert_as_naive(strategy, scenario, network.train(training))


def test_24_running_statistics_from_their_definition(every_strategy: str) -> None:
    """Unbiased variance, momentum the weight of the new batch: against arithmetic, not against naive."""
    network = lone_block(every_strategy, layers=1)
    norm = network.denseblock1.denselayer1.norm1
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    x = images(channels=5)
    network(x)
    torch.testing.assert_close(norm.running_mean, 0.9 * mean + 0.1 * x.mean((0, 2, 3)), rtol=1e-13, atol=0)
    torch.testing.assert_close(norm.running_var, 0.9 * var + 0.1 * x.var((0, 2, 3)), rtol=1e-13, atol=0)


@pytest.mark.parametrize("outer", [True, False])
def test_25_any_norms_in_the_other_mode(strategy: str, outer: bool) -> None:
    """Frozen norms inside a network in training, or the reverse: each goes by its own flag, in backward too."""
    network = lone_block(layers=3, bn_size=None).train(outer)
    inner = list(norms(network))
    for count in range(1, len(inner) + 1):
        for chosen in combinations(range(len(inner)), count):
            for number, norm in enumerate(inner):
                norm.train(outer if number not in chosen else not outer)
            assert_as_naive(strategy, lambda n: step(n, images(channels=5)), network)


def test_25_second_norm_of_a_layer_in_the_other_mode(strategy: str) -> None:
    """The norm between bottleneck and 3x3 has a flag of its own."""
    network = lone_block(layers=2)
    network.denseblock1.denselayer1.norm2.eval()
    network.denseblock1.denselayer2.norm1.eval()
    assert_as_naive(strategy, lambda n: step(n, images(channels=5)), network)


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

    def scenario(network: nn.Module) -> Quantities:
        try:
            return step(network, x) | {"ran": torch.ones(1)}
        except (ValueError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
            return {message: torch.ones(1)}

    assert_as_naive(strategy, scenario, network)


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
    """A channels-last network must stay one: the next convolution would convert every map."""
    network = lone_block().to(memory_format=torch.channels_last)
    for layout in ("contiguous", "channels last"):
        x = LAYOUTS[layout](images(channels=5))
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
