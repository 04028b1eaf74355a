"""The compiled convolutions against PyTorch's: slices, lines, strips, blocks and threads of every remainder."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import densebench
from densebench.kernels import compiled
from densebench.kernels.bn_relu_conv3x3 import bn_relu_conv3x3
from densebench.kernels.bn_relu_conv3x3_backward import bn_relu_conv3x3_backward
from densebench.kernels.convolutions import Maps, convolve_bytes, library
from densebench.kernels.library import WORKSPACE
from densebench.measure.memory import measure_peak
from densebench.prediction.networks import trace_network
from tests.kernels.convolution_problems import CONVOLUTIONS
from tests.kernels.other_vectors import NARROWER, compiled_with
from tests.kernels.problems import Problem, Shape
from tests.kernels.test_operators import Call, dense
from tests.kernels.values import GATE, VARIANTS, relative_error
from tests.networks import images, small
from tests.properties import given, settings, st

pytestmark = pytest.mark.skipif(
    compiled.library(torch.float32, "convolutions") is None,
    reason=f"nothing is compiled here: {compiled.reason()}",
)


def assert_solved(name: str, shape: Shape) -> None:
    problem = CONVOLUTIONS[name](shape)
    produced = problem.solve("cpu")
    assert produced.keys() == problem.expected.keys()
    for quantity, truth in problem.expected.items():
        error = relative_error(produced[quantity], truth)
        assert error <= GATE[shape.dtype], f"{name}: {quantity} is off by {error:.1e} for {shape}"


@pytest.mark.parametrize("variant", [name for name, drawn in VARIANTS.items() if "16" not in name])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_values(name: str, variant: str) -> None:
    assert_solved(name, Shape(**VARIANTS[variant]))


SHAPES = [
    Shape(images=1, height=1, width=1, columns=1, outputs=1),
    Shape(images=3, height=1, width=9, columns=5, outputs=3),
    Shape(images=2, height=9, width=1, columns=16, outputs=17),
    Shape(images=5, height=7, width=7, columns=33, outputs=12),
    Shape(images=2, height=14, width=13, columns=48, outputs=12),
    Shape(images=1, height=31, width=40, columns=128, outputs=32),  # an image in several strips
    Shape(images=1, height=3, width=700, columns=130, outputs=2),  # lines that no strip holds three of
    Shape(images=3, height=6, width=5, columns=70, outputs=70),
    Shape(images=2, height=9, width=6, columns=20, outputs=12, dilation=2),
    Shape(images=1, height=3, width=4, columns=33, outputs=5, dilation=5),  # only the middle tap meets anything
    Shape(images=1, height=28, width=30, columns=128, outputs=32, dilation=4),
    Shape(images=2, depth=1, height=3, width=5, columns=20, outputs=12),
    Shape(images=3, depth=2, height=2, width=2, columns=128, outputs=32),
    Shape(images=2, depth=5, height=4, width=6, columns=33, outputs=17),
    Shape(images=1, depth=4, height=18, width=17, columns=128, outputs=32),  # a slice in several strips
    Shape(images=1, depth=3, height=3, width=90, columns=130, outputs=2),
    Shape(images=2, depth=7, height=5, width=6, columns=20, outputs=12, dilation=3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads_in_use", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s.images}x{s.size} {s.columns}-{s.outputs} {s.dilation}"
)
def test_as_pytorch_does(shape: Shape, threads_in_use: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads_in_use)
    for name in CONVOLUTIONS:
        assert_solved(name, dataclasses.replace(shape, dtype=dtype, seed=threads_in_use))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(CONVOLUTIONS)),
    images=st.integers(1, 4),
    height=st.integers(2, 20),  # of one value the norm is 0, and ReLU's mask a matter of rounding
    width=st.integers(1, 20),
    columns=st.integers(1, 70),
    outputs=st.integers(1, 70),
    depth=st.sampled_from([None, None, 1, 2, 3, 5]),
    dilation=st.sampled_from([1, 1, 2, 4]),
    extra=st.integers(0, 20),
    by_batch=st.booleans(),
    affine=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]),
    seed=st.integers(0, 99),
    in_use=st.integers(1, 4),
)
def test_fuzzed_shapes(name: str, in_use: int, **drawn: Any) -> None:
    torch.set_num_threads(in_use)
    assert_solved(name, Shape(**drawn))


@pytest.mark.parametrize("flags", NARROWER)
def test_with_narrower_vectors(flags: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with compiled_with(flags, tmp_path, monkeypatch):
        for dtype in (torch.float32, torch.float64):
            for shape in SHAPES:
                for name in CONVOLUTIONS:
                    assert_solved(name, dataclasses.replace(shape, dtype=dtype))


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_exact_on_integers(name: str) -> None:
    """On small integers and powers of two no order of summation rounds: not one bit may differ."""
    shape = Shape(images=4, height=4, width=4, columns=17, integers=True, dtype=torch.float32)
    problem = CONVOLUTIONS[name](shape)
    produced = problem.solve("cpu")
    for quantity in problem.expected.keys() - {"mean", "var"}:
        assert torch.equal(produced[quantity].double(), problem.expected[quantity]), quantity


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_as_many_threads_the_same_bits(name: str) -> None:
    torch.set_num_threads(3)
    problem = CONVOLUTIONS[name](Shape(images=3, height=13, width=11, columns=40, outputs=24, dtype=torch.float32))
    first = problem.solve("cpu")
    for _ in range(20):
        again = problem.solve("cpu")
        assert all(torch.equal(again[quantity], value) for quantity, value in first.items())


def test_an_image_does_not_depend_on_the_others() -> None:
    """Its prediction is the same in every batch, and by as many threads as there are."""
    torch.set_num_threads(2)
    shape = Shape(images=4, height=9, width=11, columns=40, outputs=24, dtype=torch.float32)
    problem = CONVOLUTIONS["bn_relu_conv3x3"](shape)
    whole = problem.solve("cpu")["out"]
    pixels = shape.height * shape.width
    for image in range(shape.images):
        arguments = list(problem.arguments)
        arguments[0] = arguments[0][image * pixels : (image + 1) * pixels]
        arguments[9] = torch.empty(pixels, shape.outputs)
        arguments[10:] = [None, None]
        bn_relu_conv3x3(*arguments)
        assert torch.equal(arguments[9], whole[image * pixels : (image + 1) * pixels])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_window(value: float) -> None:
    """A pixel at a line's end is no neighbour of the one that begins the next line."""
    shape = Shape(images=2, height=6, width=5, columns=20, outputs=12, by_batch=False)
    problem = CONVOLUTIONS["bn_relu_conv3x3"](shape)
    clean = problem.solve("cpu")["out"].view(2, 6, 5, 12)
    x, gamma = problem.arguments[0], problem.arguments[5]
    x.view(2, 6, 5, 20)[0, 2, 4, 7] = value * float(gamma[7].sign())  # or ReLU would make 0 of it
    touched = problem.solve("cpu")["out"].view(2, 6, 5, 12)
    window = torch.zeros(2, 6, 5, dtype=torch.bool)
    window[0, 1:4, 3:] = True
    assert torch.equal(touched[~window], clean[~window])
    a = torch.relu(F.batch_norm(x, *problem.arguments[3:7], eps=problem.arguments[7]))
    truth = F.conv2d(a.view(2, 6, 5, 20).permute(0, 3, 1, 2), problem.arguments[8], padding=1).permute(0, 2, 3, 1)
    assert not bool(truth[window].isfinite().all())
    assert torch.equal(touched.isfinite(), truth.isfinite())


@pytest.mark.parametrize("dilation", [1, 2])
def test_nan_stays_in_its_slices(dilation: int) -> None:
    """A slice at a volume's end is no neighbour of the one that begins the next volume."""
    shape = Shape(2, 6, 5, depth=3, dilation=dilation, columns=20, by_batch=False)
    problem = CONVOLUTIONS["bn_relu_conv3x3"](shape)
    clean = problem.solve("cpu")["out"].view(2, 3, 6, 5, 12)
    problem.arguments[0].view(2, 3, 6, 5, 20)[0, 2, 2, 4, 7] = float("nan")
    touched = problem.solve("cpu")["out"].view(2, 3, 6, 5, 12)
    pixel = torch.zeros(2, 1, 3, 6, 5)
    pixel[0, 0, 2, 2, 4] = 1
    window = F.conv3d(pixel, torch.ones(1, 1, 3, 3, 3), padding=dilation, dilation=dilation)[:, 0] > 0
    assert torch.equal(touched[~window], clean[~window])
    assert bool(touched[window].isnan().all())


@pytest.mark.parametrize("pixels", [(0, 0), (3, 4), (5, 0)])
def test_the_mean_beside_an_infinity(pixels: tuple[int, int]) -> None:
    """Infinite, not NaN: what values are taken relative to is finite wherever the infinity lies."""
    x, weight = torch.ones(2, 6, 5, 1), torch.ones(1, 1, 3, 3)
    x[(1, *pixels)] = float("inf")
    mean, var = torch.empty(2, 1)
    unit = (torch.zeros(1), torch.ones(1), None, None, 0.0)
    bn_relu_conv3x3(x.view(-1, 1), (6, 5), 1, *unit, weight, torch.empty(60, 1), mean, var)
    assert float(mean) == float("inf")


def test_only_what_is_needed() -> None:
    """Each result alone is what it is beside the others."""
    problem = CONVOLUTIONS["bn_relu_conv3x3_backward"](Shape(dtype=torch.float32))
    all_of_them = problem.solve("cpu")
    arguments = list(problem.arguments)
    arguments[11] = None
    _, beta, grad_weight = bn_relu_conv3x3_backward(*arguments)
    assert torch.equal(grad_weight, all_of_them["grad_weight"])
    assert not bool(beta.any())
    arguments = list(problem.arguments)
    arguments[12] = False
    gamma, _, none = bn_relu_conv3x3_backward(*arguments)
    assert torch.equal(arguments[11], all_of_them["grad_x"])
    assert torch.equal(gamma, all_of_them["grad_gamma"])
    assert none.numel() == 0


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_opcheck(name: str) -> None:
    for shape in (Shape(columns=17, outputs=5), Shape(dtype=torch.float32, affine=False, seed=1)):
        problem = CONVOLUTIONS[name](shape)
        torch.library.opcheck(getattr(torch.ops.densebench, name).default, dense(problem))


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("threads_in_use", [1, 3])
def test_workspace_is_what_the_allocator_saw(name: str, threads_in_use: int) -> None:
    torch.set_num_threads(threads_in_use)
    problem = CONVOLUTIONS[name](Shape(4, 56, 56, columns=128, outputs=32, dtype=torch.float32))
    operator = getattr(torch.ops.densebench, name)
    declared = WORKSPACE[operator](*problem.arguments)
    returned = sum(t.nbytes for t in operator(*problem.arguments) or ())
    peak = measure_peak(lambda: Call(operator, problem), torch.device("cpu"), repeats=1).peak_allocated_bytes
    assert peak - returned == pytest.approx(declared, rel=0.05, abs=64 * 1024)


def test_scratch_does_not_grow_beyond_the_image() -> None:
    for size in ((4, 4), (3, 4, 4)):
        given = torch.empty(math.prod(size), 8), torch.empty(4, 8, *[3] * len(size))
        near, far = (convolve_bytes(given[0], Maps(size, dilation), given[1]) for dilation in (4, 10_000))
        assert near == far


def test_flops_are_those_of_pytorchs_convolution() -> None:
    shape = Shape(columns=24, outputs=12)
    of_one = 2 * shape.rows * 9 * 24 * 12
    for name, convolutions in zip(CONVOLUTIONS, (1, 2), strict=True):
        problem = CONVOLUTIONS[name](shape)
        with FlopCounterMode(display=False) as counter:
            getattr(torch.ops.densebench, name)(*problem.arguments)
        assert counter.get_total_flops() == convolutions * of_one


def _with(problem: Problem, at: int, value: Any) -> list[Any]:
    return [value if place == at else argument for place, argument in enumerate(problem.arguments)]


def test_what_does_not_belong_together_is_refused() -> None:
    """The compiled form is given addresses; what it was not made for it must not be handed."""
    forward, backward = (build(Shape()) for build in CONVOLUTIONS.values())
    rows, columns, outputs = Shape().rows, 20, 12
    wrong = torch.empty(rows - 1, outputs).double(), torch.empty(rows, outputs + 1).double()
    for out in wrong:
        with pytest.raises(ValueError, match="takes out of"):
            bn_relu_conv3x3(*_with(forward, 9, out))
        with pytest.raises(ValueError, match="takes grad of"):
            bn_relu_conv3x3_backward(*_with(backward, 0, out))
    with pytest.raises(ValueError, match="takes grad_x of"):
        bn_relu_conv3x3_backward(*_with(backward, 11, torch.empty(rows, columns - 1).double()))
    with pytest.raises(ValueError, match="a weight of as many"):
        bn_relu_conv3x3(*_with(forward, 8, torch.empty(outputs, columns + 1, 3, 3).double()))
    for places in [(forward.arguments[10], None), (None, forward.arguments[11]), torch.empty(2, 2, 12).double()]:
        with pytest.raises(ValueError, match="are a mean and a variance"):
            bn_relu_conv3x3(*forward.arguments[:10], *places)
    for size in ((0, 7), (4, 7)):
        with pytest.raises(ValueError, match="not the pixels of whole images"):
            bn_relu_conv3x3(*_with(forward, 1, size))
    for size in ((7,), (1, 5, 7), (5, 1, 1, 7)):
        with pytest.raises(ValueError, match="is not for images of"):
            bn_relu_conv3x3(*_with(forward, 1, size))
    for dilation in (0, -1):
        with pytest.raises(ValueError, match="a dilation of"):
            bn_relu_conv3x3(*_with(forward, 2, dilation))


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(4, 6, 3, 3).bfloat16(),
        torch.randn(4, 6, 1, 1),
        torch.randn(4, 6, 3, 6)[..., ::2],
        torch.randn(4, 6, 3),
        torch.randn(4, 6, 1, 3, 3),
    ],
    ids=["bfloat16", "1x1", "strided", "1d", "flat"],
)
def test_what_it_does_not_take_is_refused_with_what_to_use(weight: Tensor) -> None:
    vectors = torch.ones(4, 6)
    x, out = torch.randn(80, 6), torch.empty(80, 4)
    with pytest.raises(ValueError, match=r"use bn_relu and torch\.nn\.functional\.conv2d or conv3d"):
        bn_relu_conv3x3(x, (8, 10), 1, *vectors, 0.0, weight, out, None, None)
    with pytest.raises(ValueError, match=r"use bn_relu and torch\.nn\.functional\.conv2d or conv3d"):
        bn_relu_conv3x3_backward(out, x, (8, 10), 1, *vectors, 0.0, True, weight, None, True)
    with compiled.using(None), pytest.raises(ValueError, match=r"nothing is compiled here \(switched off\)"):
        bn_relu_conv3x3(x, (8, 10), 1, *vectors, 0.0, torch.randn(4, 6, 3, 3), out, None, None)


def test_what_is_taken() -> None:
    weight, rows = torch.empty(4, 6, 3, 3), torch.empty(80, 6)
    assert library(weight, rows, None) is not None
    assert library(weight.contiguous(memory_format=torch.channels_last), rows) is not None
    assert library(torch.empty(4, 6, 3, 3, 3).to(memory_format=torch.channels_last_3d), rows) is not None
    assert library(weight.to("meta"), rows) is None
    for other in (rows.bfloat16(), rows.double(), rows.t(), rows[:0]):
        assert library(weight, other) is None
    with compiled.using(None):
        assert library(weight, rows) is None


DILATED = {"stem": "imagenet", "output_stride": 8, "block_config": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    ("options", "dtype", "forward", "backward"),
    [
        ({}, torch.float32, 4, 4),
        ({}, torch.float64, 4, 4),
        ({}, torch.bfloat16, 0, 0),
        ({"bn_size": None}, torch.float32, 4, 0),  # what its norms read, others read, too
        ({"drop_rate": 0.1}, torch.float32, 0, 4),  # statistics are of what is left after dropout
        ({"spatial_dims": 3}, torch.float32, 4, 4),
        (DILATED, torch.float32, 4, 4),  # by 2 and by 4 in the last blocks, ...
        ({**DILATED, "spatial_dims": 3}, torch.float32, 3, 3),  # ... which is too far in volumes
    ],
)
def test_where_the_fused_network_uses_them(
    options: dict[str, Any], dtype: torch.dtype, forward: int, backward: int
) -> None:
    network = densebench.set_strategy(small(**{"block_config": (1, 1, 2), **options}).to(dtype), "fused")
    with torch.profiler.profile() as profile:
        network(images(2, 16, dtype=dtype, dims=options.get("spatial_dims", 2))).float().sum().backward()
    calls = Counter({event.key.removeprefix("densebench::"): event.count for event in profile.key_averages()})
    assert [calls[name] for name in CONVOLUTIONS] == [forward, backward]


@pytest.mark.parametrize(("kind", "forward"), [("cpu", 16), ("cuda", 0)])
def test_predictions_know_where_they_are(kind: str, forward: int) -> None:
    """For CUDA a step is traced on a CPU, too, but as CUDA runs it: with the operand of each convolution."""
    trace = trace_network("densenet_d2l", (2, 1, 32, 32), "fused", "train", device=kind)
    assert trace.device == kind
    names = [operation.name for operation in trace.operations]
    assert sum("bn_relu_conv3x3" in name for name in names) == forward
