"""What the benchmark has to know of each operator, one entry each; who asks need not read its name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Place = Literal["layer", "bottleneck", "new channels", "stem", "transition"]


@dataclass(frozen=True)
class Facts:
    """What tells an operator from the others.

    Attributes:
        place: whose map it reads: a "layer"'s, which is the prefix of a block's buffer; a "bottleneck"'s output,
            [M, 128]; the "new channels" of a layer, [M, 32] columns of the buffer; that of the "stem" or of a
            "transition", which pools.
        taps: of the filter that it multiplies by; 0 if it multiplies by none.
        part: "forward", the "gradient" of that, or the "settling" of what gradients have left pending.
    """

    place: Place
    taps: int = 0
    part: Literal["forward", "gradient", "settling"] = "forward"

    @property
    def is_gradient(self) -> bool:
        return self.part == "gradient"

    @property
    def mode(self) -> str:
        """The mode of its case."""
        return "forward" if self.part == "forward" else "train"


PRODUCT, PRODUCT_BACKWARD = "bn_relu_conv1x1", "bn_relu_conv1x1_backward"
CONVOLUTION, CONVOLUTION_BACKWARD = "bn_relu_conv3x3", "bn_relu_conv3x3_backward"  # on a CPU only

OPERATORS = {
    PRODUCT: Facts("layer", taps=1),
    PRODUCT_BACKWARD: Facts("layer", taps=1, part="gradient"),
    "bn_relu": Facts("bottleneck"),
    "bn_relu_backward": Facts("bottleneck", part="gradient"),
    CONVOLUTION: Facts("bottleneck", taps=9),
    CONVOLUTION_BACKWARD: Facts("bottleneck", taps=9, part="gradient"),
    "channel_statistics": Facts("new channels"),
    "settled_gradient": Facts("new channels", part="settling"),
    "bn_relu_max_pool": Facts("stem"),
    "bn_relu_max_pool_backward": Facts("stem", part="gradient"),
    "bn_relu_avg_pool": Facts("transition"),
    "bn_relu_avg_pool_backward": Facts("transition", part="gradient"),
}


def _at(*places: Place) -> tuple[str, ...]:
    return tuple(name for name, facts in OPERATORS.items() if facts.place in places)


PRODUCTS = _at("layer")
OF_BOTTLENECKS = _at("bottleneck")
OF_NEW_CHANNELS = _at("new channels")
STEM_POOLS, TRANSITION_POOLS, POOLS = _at("stem"), _at("transition"), _at("stem", "transition")
WITH_GIVEN_STATISTICS = _at("layer", "bottleneck")  # also timed against a norm that is given its statistics
CONVOLUTIONS = tuple(name for name, facts in OPERATORS.items() if facts.taps > 1)
WITH_WEIGHT = tuple(name for name, facts in OPERATORS.items() if facts.taps)
