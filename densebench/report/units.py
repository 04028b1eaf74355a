"""Numbers and cases in words: the one place that decides on units, digits and spelling."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from densebench.capacities import GIB, MIB
from densebench.records import Case

CROSS = "\N{MULTIPLICATION SIGN}"
GIB_FROM = 8 * GIB  # where MiB would need five digits, or nearly

MODES = {
    "train": "Training step",
    "forward": "Forward pass with graph",
    "infer": "Inference",
}
STATUS_WORDS = {
    "oom": "did not fit in memory",
    "incorrect": "incorrect",
    "noisy": "noisy",
    "error": "failed",
    "timeout": "took too long",
    "crash": "crashed",
    "skipped": "skipped",
    "unsupported": "not supported here",
}
_MODEL_NAMES = {
    "densenet_bc": "DenseNet-BC",
    "densenet_cifar": "DenseNet (CIFAR)",
    "densenet_plain": "DenseNet without bottleneck",
    "densenet_d2l": "DenseNet of d2l.ai",
    "densenet_x": "DenseNet",
}


@dataclass(frozen=True)
class Unit:
    """A unit of memory: its name and its bytes."""

    name: str
    bytes: int

    def of(self, value: float) -> str:
        """So many bytes in this unit, without its name."""
        return number(value / self.bytes)


def memory_unit(values: Iterable[float]) -> Unit:
    """MiB or GiB (powers of 1024), whichever suits the largest of some byte counts."""
    return Unit("GiB", GIB) if max(values, default=0) >= GIB_FROM else Unit("MiB", MIB)


def memory(value: float, unit: Unit | None = None) -> str:
    """Bytes with a unit, by default the one that suits them: 86.6 MiB, 12.3 GiB."""
    unit = unit or memory_unit([value])
    return f"{unit.of(value)} {unit.name}"


def number(value: float, digits: int = 3) -> str:
    """At least so many significant digits, never an exponent, thousands set apart.

    Raises:
        ValueError: for NaN or infinity.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number to print")
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def times(ratio: float) -> str:
    """A ratio: 0.34×."""
    return f"{ratio:.2f}{CROSS}"


def duration(seconds: float) -> str:
    """Seconds with the unit that suits them."""
    for name, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{number(seconds / size)} {name}"
    return f"{number(seconds / 1e-9)} ns"


def percent(share: float, decimals: int = 1) -> str:
    """A signed share: +1.2 %; what rounds to zero has no sign."""
    text = f"{100 * share:+.{decimals}f}"
    return f"{text if float(text) else text[1:]} %"


def model_name(model: str) -> str:
    """The network as papers write it: DenseNet-121, ResNet-50."""
    numbered = re.fullmatch(r"(densenet|resnet)(\d+)", model)
    if numbered:
        return f"{'DenseNet' if numbered[1] == 'densenet' else 'ResNet'}-{numbered[2]}"
    return _MODEL_NAMES.get(model, model)


def precision(case: Case) -> str:
    return f"{case.autocast} autocast" if case.autocast else case.dtype


def image_size(case: Case) -> str:
    return CROSS.join(map(str, case.input_shape[1:]))


def setting_words(case: Case, device: str, with_batch: bool = True) -> str:
    """What stays fixed in a comparison, for titles: network, batch and image, precision, device."""
    where = "predicted, not run" if case.source == "predicted" else device
    return f"{condition_words(case, with_batch)}, {where}"


def condition_words(case: Case, with_batch: bool = True) -> str:
    """The same without the device."""
    size = f"batch {case.batch} at {image_size(case)}" if with_batch else image_size(case)
    return f"{model_name(case.model)}{_option_words(case)}, {size}, {precision(case)}"


def device_words(name: str) -> str:
    """A device as one speaks of it: no trademarks, nor what every processor's name says."""
    name = re.sub(r"\((?:R|TM)\)", "", name, flags=re.IGNORECASE)
    name = re.sub(r"(?: CPU| Processor)? @ ([\d.]+)GHz", r" \1 GHz", name)
    return re.sub(r" Processor\b", "", name).strip()


def _option_words(case: Case) -> str:
    """What a network was asked for beyond its name: its dimensions and channels in words, the rest as it is."""
    words, others = [], dict(sorted(case.options.items()))
    if dimensions := others.pop("spatial_dims", None):
        words.append(f"{dimensions}-D")
    if channels := others.pop("in_channels", None):
        words.append("1 channel" if channels == 1 else f"{channels} channels")
    words += [f"{key}={value}" for key, value in others.items()]
    return f" ({', '.join(words)})" if words else ""
