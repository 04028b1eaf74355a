"""What goes wrong with numbers: masks, variances, dropout, NaN, odd norm options.

Numbers are those of the project's list of failure modes.
"""

from __future__ import annotations

import math
import statistics
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from tests.comparison import (
    FLOAT32,
    MOMENTS_FLOAT32,
    NEGLIGIBLE_FLOAT32,
    TIGHT,
    VARIANCE_FLOAT32,
    Quantities,
    assert_as_naive,
    everything,
    play,
    relative_error,
    relative_errors,
    step,
    step_or_error,
    upstream,
)
from tests.networks import align_masks, images, lone_block, norms, small


def test_09_gradients_in_float32_with_masks_aligned(every_strategy: str) -> None:
    """Without values near zero in any ReLU float32 is nearly exact, so a larger error is no mask flip.

    The median of some networks: a single one may cancel so well that naive itself is off by more.
    """
    errors: dict[str, list[float]] = {}
    for seed in range(5):
        network = small(block_config=(2, 2, 2), seed=seed).float()
        align_masks(network)
        x = images(dtype=torch.float32, seed=seed)
        truth = play(lambda n, x=x: step(n.double(), x.double()), network, "naive")
        actual = play(lambda n, x=x: step(n, x), network, every_strategy)
        for name, error in relative_errors(actual, truth, NEGLIGIBLE_FLOAT32).items():
            errors.setdefault(name, []).append(error)
    medians = {name: statistics.median(values) for name, values in errors.items()}
    assert all(error <= FLOAT32 for error in medians.values()), max(medians.items(), key=lambda item: item[1])
    assert max(medians.values()) > 0


@pytest.mark.parametrize("spread", [0, 1, 1e1, 1e2, 1e3, 1e4])
def test_10_variance_of_values_far_from_zero(every_strategy: str, spread: float) -> None:
    """E[x^2] - E[x]^2 cancels: at mean/std 1e4 it is negative (tensorflow/tensorflow#25115)."""
    network = lone_block(every_strategy, layers=1).float()
    norm = network.denseblock1.denselayer1.norm1
    norm.momentum = 1.0
    x = (images(8, 8, 5) + spread).float()
    network(x)
    error = (norm.running_var.double() / x.double().var((0, 2, 3)) - 1).abs().max()
    assert error <= VARIANCE_FLOAT32


@pytest.mark.parametrize("magnitude", [1e18, 1e30])
def test_10_values_near_the_end_of_float32(strategy: str, magnitude: float) -> None:
    """At 1e30 squares overflow, and the norms become what PyTorch's become: the bias, nothing else.

    Without bottlenecks: there the norm of what the first norm leaves would magnify rounding errors.
    """
    x = images(channels=5, dtype=torch.float32) * magnitude

    def scenario(network: Any) -> Quantities:
        results = step(network, x)
        return results | {"new channels": results["output"][:, 5:]}  # beside the input they are nothing

    results = assert_as_naive(strategy, scenario, lone_block(bn_size=None).float(), FLOAT32)
    overflown = results["buffer denseblock1.denselayer1.norm1.running_var"].isinf().all()
    assert overflown == (magnitude == 1e30)


def test_14_no_result_is_left_uncomputed(strategy: str) -> None:
    """Fresh memory is often zero or the right values of last time; here it is filled with NaN.

    ScalingIntelligence/KernelBench#165: zeros pass four of sixty problems.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all(), "this PyTorch does not poison fresh memory"
    assert_as_naive(strategy, lambda n: step(n, images()), small())
    assert_as_naive(strategy, lambda n: step(n.eval(), images()), small())


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
    assert relative_error(norm.running_mean, x.double().mean((0, 2, 3))) < MOMENTS_FLOAT32
    assert relative_error(norm.running_var, x.double().var((0, 2, 3))) < VARIANCE_FLOAT32


OPTIONS: dict[str, dict[str, Any]] = {
    "momentum None": {"momentum": None},
    "momentum 0": {"momentum": 0.0},
    "momentum 0.3": {"momentum": 0.3},
    "momentum 1": {"momentum": 1.0},
    "large eps": {"eps": 0.3},
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


@pytest.mark.parametrize("chosen", ["norm1", "norm2"])
def test_24_eps_of_zero(strategy: str, chosen: str) -> None:
    """PyTorch's own ValueError where it has one: in training, in version 2.11 in evaluation, too."""
    network = lone_block()
    for name, norm in network.named_modules():
        if name.endswith(chosen):
            norm.eps = 0.0
    assert_as_naive(strategy, lambda n: step_or_error(n.eval(), images(channels=5)), network)
    assert_as_naive(strategy, lambda n: step_or_error(n, images(channels=5)), network)


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
