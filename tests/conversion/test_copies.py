"""Classes that are copies of a library's are converted when they are named, and held against what they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densebench import UnsupportedError, assert_equivalent, convert
from densebench.models import Transition
from densebench.models.features import Features
from tests.conversion.networks import COPIES, Copied, CopiedBlock, theirs, torchvision
from tests.networks import images


def test_copies_are_the_same(every_strategy: str) -> None:
    original = theirs(Copied)
    ours = convert(copy.deepcopy(original), every_strategy, **COPIES)
    assert isinstance(ours.features, Features)
    assert isinstance(ours.features.down, Transition)
    assert list(ours.state_dict()) == list(original.state_dict())
    for mode in (True, False):
        differences = assert_equivalent(
            ours.train(mode), every_strategy, [images(3, 8), images(2, 8, seed=1)], reference=original.train(mode)
        )
        assert any("second.2.conv2" in difference.name for difference in differences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_in_low_precision(dtype: torch.dtype) -> None:
    original = theirs(Copied).float()
    ours = convert(copy.deepcopy(original), **COPIES)
    autocast = None if dtype == torch.float32 else dtype
    assert assert_equivalent(ours, "fused", images(4, 8).float(), reference=original, autocast=autocast)


def test_a_transition_that_is_not_named_stays() -> None:
    original = theirs(Copied)
    ours = convert(copy.deepcopy(original), **{**COPIES, "transition": None})
    assert type(ours.features.down) is type(original.features.down)
    assert [stage.tail for stage in ours.features.stages()] == [None, None]
    assert_equivalent(ours, "fused", images(3, 8), reference=original)


def test_dropout_is_theirs() -> None:
    original = theirs(Copied)
    for layer in original.features.second:
        layer.drop_rate = 0.5
    ours = convert(copy.deepcopy(original), "naive", **COPIES)
    assert [layer.drop_rate for layer in ours.features.second.layers] == [0.5] * 3
    assert_equivalent(ours, "naive", images(3, 8), reference=original)


class Doubled(CopiedBlock):
    """Not what it is said to be."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class CountedTwice(CopiedBlock):
    """The same values, and running statistics that move twice: an old checkpointing block's."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            super().forward(x.clone())
        return super().forward(x)


@pytest.mark.parametrize(("kind", "where"), [(Doubled, "output|gradient|buffer"), (CountedTwice, "buffer")])
def test_what_is_no_copy_is_found(kind: type[nn.Module], where: str) -> None:
    original = theirs(Copied)
    original.features.second.__class__ = kind
    with pytest.raises(UnsupportedError, match=rf"features\.second is a .*{kind.__name__}; .* with block="):
        convert(original, **COPIES)
    original.features.first.__class__ = kind
    ours = convert(copy.deepcopy(original), **{**COPIES, "block": kind})
    with pytest.raises(AssertionError, match=rf"'fused' differs from the Copied given in ({where})") as caught:
        assert_equivalent(ours, "fused", images(3, 8), reference=original)
    assert ("switch them off" in str(caught.value)) == (kind is CountedTwice)


@pytest.mark.parametrize("seed", range(4))
def test_contiguous_images_in_float32(seed: int) -> None:
    """PyTorch's norms sum them in float64: what is compared with is the noise of both memory formats."""
    torch.manual_seed(seed)
    original = torchvision()
    ours = convert(copy.deepcopy(original))
    assert assert_equivalent(ours, "fused", torch.randn(4, 3, 64, 64), reference=original)


def test_without_names_they_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no dense blocks that convert knows; .* copies of them by block="):
        convert(theirs(Copied))
    with pytest.raises(UnsupportedError, match=r"features\.first\.0 is a .*CopiedLayer; .* say so with layer="):
        convert(theirs(Copied), block=CopiedBlock)


def test_a_reference_that_was_converted_shows_nothing() -> None:
    network = theirs(Copied)
    convert(network, **COPIES)
    with pytest.raises(ValueError, match=r"convert, which works in place; copy\.deepcopy makes one that stays"):
        assert_equivalent(network, "fused", images(3, 8), reference=network)


@pytest.mark.parametrize("kind", COPIES)
def test_classes_that_are_not_there(kind: str) -> None:
    with pytest.raises(ValueError, match=f"Copied contains no Doubled, given as {kind}="):
        convert(theirs(Copied), **{**COPIES, kind: Doubled})


@pytest.mark.parametrize("given", ["CopiedBlock", int, nn.Identity()])
def test_what_is_no_class_of_modules(given: Any) -> None:
    with pytest.raises(TypeError, match="block= takes a class of modules, not"):
        convert(theirs(Copied), block=given)


def test_parts_of_other_names_are_named() -> None:
    network = theirs(Copied)
    network.features.first[1] = nn.Sequential(*network.features.first[1])
    network.features.first[1].__class__ = COPIES["layer"]
    with pytest.raises(UnsupportedError, match=r"features\.first\.1: norm1 is missing"):
        convert(network, **COPIES)
