"""What can be measured: groups of cases by network, shape and contenders.

A group is timed in turns, so its members' times can be compared. Which groups a run measures: `profiles.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from densebench.capacities import CAPACITIES_GIB
from densebench.contenders import get_contender, list_contenders
from densebench.records import Case
from densebench.registry import list_strategies

DEPTHS = (48, 68, 96, 136, 192)  # log-spaced
IMAGE = (3, 224, 224)
VOLUME = (1, 64, 64, 64)
CIFAR_DEPTHS = (100, 196, 292, 508, 700, 1000)  # 6n + 4, log-spaced


@dataclass(frozen=True)
class Group:
    """Cases that are measured together; without `timed` only their memory is.

    `left_out`: cases that a larger profile would measure; this one records that they were not run.
    """

    name: str
    cases: tuple[Case, ...]
    timed: bool = True
    left_out: tuple[Case, ...] = ()


@dataclass(frozen=True)
class Limit:
    """How much of a case's network fits into cards of several sizes; `checked` traces every answer.

    Kind "fit" asks for the largest batch, "deepest" for the most layers.
    """

    case: Case
    capacities_gib: tuple[int, ...]
    checked: bool

    def covers(self, case: Case) -> bool:
        """Whether a record's case is one of its answers."""
        same = (case.kind, case.model, case.strategy) == (self.case.kind, self.case.model, self.case.strategy)
        return same and case.options.get("capacity_gib") in self.capacities_gib


def network_group(
    model: str,
    mode: str,
    batch: int,
    device: str,
    image: tuple[int, ...] = IMAGE,
    autocast: str | None = None,
    contenders: list[str] | None = None,
    both_formats: bool = False,
) -> Group:
    """One network and shape under every contender that has it, and ResNet-50 beside ImageNet networks.

    `image` is [C, H, W], or [C, D, H, W] for the network of volumes.

    `both_formats` adds naive in the contiguous format: ratios are against the faster of the two. On a GPU that is
    done for all but the smallest batches. What compiles has a group of its own (`compiled_group`).
    """
    names = contenders if contenders is not None else _without_compilers()
    both_formats = both_formats or (device == "cuda" and batch >= 64)
    case = Case("step", model, "naive", mode, batch, image, "float32", autocast, "channels_last", device=device)
    if len(image) == 4:
        case = replace(case, options={"spatial_dims": 3, "in_channels": image[0]})
    cases = [_with(case, name) for name in names if _has(name, case)]
    if both_formats:
        cases.insert(1, replace(case, memory_format="contiguous"))
    precision = autocast or "float32"
    size = "x".join(map(str, (batch, *image[1:])))
    return Group(f"{mode} {model} {size} {precision} {device}", tuple(cases))


def graph_group(model: str, batch: int, autocast: str | None) -> Group:
    """A training step recorded as a CUDA graph under every strategy, naive included.

    A graph saves the host's time of launching kernels; what is left is what the kernels take.
    """
    case = Case("step", model, "naive", "train", batch, IMAGE, "float32", autocast, "channels_last", device="cuda")
    cases = tuple(replace(case, strategy=name, cuda_graph=True) for name in list_strategies())
    return Group(f"train {model} {batch}x{IMAGE[1]}x{IMAGE[2]} {autocast or 'float32'} cuda, CUDA graph", cases)


def compiled_group(batch: int, device: str, autocast: str | None = None) -> Group:
    """A training step of DenseNet-121 under what compiles, beside naive and fused: compiling takes minutes."""
    case = Case("step", "densenet121", "naive", "train", batch, IMAGE, "float32", autocast, "channels_last")
    case = replace(case, device=device, options={"beside": "compiled"})
    names = ["naive", "fused", *(name for name in list_contenders() if get_contender(name).compiles)]
    cases = tuple(replace(case, strategy=name) for name in names)
    return Group(f"train densenet121 {batch}x224x224 {autocast or 'float32'} {device}, compiled", cases)


def depth_group(depths: tuple[int, ...], device: str) -> Group:
    """Memory of one block of growing depth under every strategy."""
    cases = tuple(depth_case(name, depth, device) for name in list_strategies() for depth in depths)
    return Group(f"memory against depth {device}", cases, timed=False)


def depth_case(strategy: str, depth: int, device: str, source: str = "measured") -> Case:
    """A DenseNet of one block: k = 12 on 24 stem channels, one image of 16x16."""
    options = {"block_config": [depth], "growth_rate": 12, "stem": "cifar", "num_classes": 10}
    return Case(
        "depth",
        "densenet_x",
        strategy,
        "train",
        1,
        (3, 16, 16),
        memory_format="channels_last",
        device=device,
        source=source,
        options=options,
    )


def depth_predicted() -> list[Case]:
    return [depth_case(name, depth, "cpu", "predicted") for name in list_strategies() for depth in DEPTHS]


def cifar_depths() -> list[Case]:
    """DenseNet-BC (k = 12) at 32x32, batch 64, up to 1,000 layers: more than would run on most machines."""
    return [
        replace(_cifar(name), kind="depth", device="cpu", options={"depth": depth, "growth_rate": 12})
        for name in list_strategies()
        for depth in CIFAR_DEPTHS
    ]


def limits_of_batch(checked: bool) -> tuple[Limit, ...]:
    """The largest batch of DenseNet-121 at 224 in float32, under every strategy."""
    case = Case("fit", "densenet121", "naive", "train", 64, IMAGE, device="cuda", source="predicted")
    case = replace(case, memory_format="channels_last")
    return tuple(Limit(replace(case, strategy=name), CAPACITIES_GIB, checked) for name in list_strategies())


def limits_of_depth() -> tuple[Limit, ...]:
    """The deepest DenseNet-BC (k = 40, batch 64) that trains in 12, 24 and 80 GiB, up to 1,000 layers."""
    case = replace(_cifar("naive"), options={"growth_rate": 40})
    return tuple(Limit(replace(case, strategy=name), (12, 24, 80), True) for name in list_strategies())


def _cifar(strategy: str) -> Case:
    case = Case("deepest", "densenet_bc", strategy, "train", 64, (3, 32, 32), device="cuda", source="predicted")
    return replace(case, memory_format="channels_last")


def full_size() -> list[Case]:
    """The memory of DenseNet-121 at 224, 8 images in float32, also where running that takes too long."""
    case = Case("step", "densenet121", "naive", "train", 8, IMAGE, source="predicted")
    case = replace(case, memory_format="channels_last")
    names = [*list_strategies(), "torchvision", "torchvision_checkpointed", "eager"]
    return [_with(case, name) for name in names if _has(name, case)]


def timelines() -> list[Case]:
    """Memory over one training step of DenseNet-121, by category."""
    case = Case(
        "timeline",
        "densenet121",
        "naive",
        "train",
        8,
        IMAGE,
        memory_format="channels_last",
        source="predicted",
    )
    return [replace(case, strategy=name) for name in list_strategies()]


def _without_compilers() -> list[str]:
    return [name for name in list_contenders() if not get_contender(name).compiles]


def _has(name: str, case: Case) -> bool:
    """Whether a contender is worth measuring in a case: its network, or a yardstick to show beside it."""
    contender = get_contender(name)
    if contender.network is not None:  # once, beside the network of its size
        return case.input_shape == IMAGE and case.model == "densenet121"
    if case.mode not in contender.modes or case.device not in contender.devices:
        return False
    return contender.has(case.model) and (contender.volumes or len(case.input_shape) == 3)


def _with(case: Case, contender: str) -> Case:
    return replace(case, strategy=contender, model=get_contender(contender).network or case.model)
