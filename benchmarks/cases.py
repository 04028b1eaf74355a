"""The cases of each profile: which networks, shapes and contenders, sized for the device.

A group is timed in turns, so its members' times can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from densebench.contenders import get_contender, list_contenders
from densebench.measure.timing import Effort
from densebench.registry import list_strategies
from densebench.results import Case

DEPTHS = (48, 68, 96, 136, 192)  # log-spaced
IMAGE = (3, 224, 224)


@dataclass(frozen=True)
class Group:
    """Cases that are measured together; without `timed` only their memory is."""

    name: str
    cases: tuple[Case, ...]
    timed: bool = True


@dataclass(frozen=True)
class Profile:
    """All that one run measures.

    Attributes:
        effort: how long each contender of a group is timed.
        groups: measured on the device.
        predicted: traced without running.
        minutes: about how long it takes.
    """

    effort: Effort
    groups: tuple[Group, ...]
    predicted: tuple[Case, ...]
    minutes: float


def profile(name: str, device: str) -> Profile:
    """The profile "quick", "default" or "full" on a device "cpu" or "cuda"."""
    builders: dict[tuple[str, str], Callable[[], Profile]] = {
        ("quick", "cpu"): _quick_cpu,
        ("default", "cpu"): _default_cpu,
        ("full", "cpu"): _full_cpu,
        ("quick", "cuda"): _quick_cuda,
        ("default", "cuda"): _default_cuda,
        ("full", "cuda"): _full_cuda,
    }
    return builders[name, device]()


def _quick_cpu() -> Profile:
    return Profile(
        Effort(rounds=8, seconds=4.0, least=5),
        (
            network_group("densenet121", "train", 2, "cpu", contenders=_quick_contenders()),
            network_group("densenet121", "infer", 2, "cpu", contenders=_quick_contenders()),
            depth_group(DEPTHS[::2], "cpu"),
        ),
        (*full_size(), *timelines()),
        minutes=2,
    )


def _default_cpu() -> Profile:
    return Profile(
        Effort(rounds=20, seconds=10.0, least=8),
        (
            network_group("densenet121", "train", 4, "cpu"),
            network_group("densenet121", "infer", 4, "cpu"),
            network_group("densenet_bc", "train", 16, "cpu", image=(3, 32, 32)),
            depth_group(DEPTHS, "cpu"),
        ),
        (*full_size(), *timelines(), *depth_predicted()),
        minutes=8,
    )


def _full_cpu() -> Profile:
    return Profile(
        Effort(rounds=20, seconds=60.0, least=20),
        (
            network_group("densenet121", "train", 8, "cpu", both_formats=True),
            network_group("densenet121", "infer", 8, "cpu", both_formats=True),
            network_group("densenet_bc", "train", 64, "cpu", image=(3, 32, 32), both_formats=True),
            depth_group(DEPTHS, "cpu"),
        ),
        (*full_size(), *timelines(), *depth_predicted()),
        minutes=25,
    )


def _quick_cuda() -> Profile:
    return Profile(
        Effort(rounds=20, seconds=2.0, least=20),
        (
            network_group("densenet121", "train", 64, "cuda", autocast="bfloat16", contenders=_quick_contenders()),
            network_group("densenet121", "infer", 64, "cuda", autocast="bfloat16", contenders=_quick_contenders()),
            depth_group(DEPTHS, "cuda"),
        ),
        (*timelines(), *depth_predicted()),
        minutes=3,
    )


def _default_cuda() -> Profile:
    batches = tuple(
        network_group("densenet121", "train", batch, "cuda", autocast="bfloat16") for batch in (8, 64, 256)
    )
    return Profile(
        Effort(rounds=40, seconds=2.0, least=20),
        (
            *batches,
            network_group("densenet121", "infer", 64, "cuda", autocast="bfloat16"),
            network_group("densenet_bc", "train", 64, "cuda", image=(3, 32, 32)),
            depth_group(DEPTHS, "cuda"),
        ),
        (*timelines(), *depth_predicted()),
        minutes=10,
    )


def _full_cuda() -> Profile:
    default = _default_cuda()
    return replace(
        default,
        groups=(
            *default.groups,
            network_group("densenet121", "train", 64, "cuda"),
            network_group("densenet121", "train", 1, "cuda", autocast="bfloat16"),
            network_group("densenet121", "infer", 1, "cuda", autocast="bfloat16"),
            network_group("densenet201", "train", 64, "cuda", autocast="bfloat16"),
            network_group("densenet161", "train", 64, "cuda", autocast="bfloat16"),
            network_group("densenet264", "train", 64, "cuda", autocast="bfloat16"),
        ),
        minutes=25,
    )


def network_group(
    model: str,
    mode: str,
    batch: int,
    device: str,
    image: tuple[int, int, int] = IMAGE,
    autocast: str | None = None,
    contenders: list[str] | None = None,
    both_formats: bool = False,
) -> Group:
    """One network and shape under every contender that has it, and ResNet-50 beside ImageNet networks.

    `both_formats` adds naive in the contiguous format: ratios are against the faster of the two.
    """
    names = contenders if contenders is not None else list_contenders()
    case = Case("step", model, "naive", mode, batch, image, "float32", autocast, "channels_last", device=device)
    cases = [_with(case, name) for name in names if _has(name, case)]
    if both_formats:
        cases.insert(1, replace(case, memory_format="contiguous"))
    precision = autocast or "float32"
    return Group(f"{mode} {model} {batch}x{image[1]}x{image[2]} {precision} {device}", tuple(cases))


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


def full_size() -> list[Case]:
    """DenseNet-121 at 224, 64 images in float32: more than most machines would run as a test."""
    case = Case("step", "densenet121", "naive", "train", 64, IMAGE, source="predicted")
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


def _quick_contenders() -> list[str]:
    return [*list_strategies(), "torchvision", "torchvision_checkpointed", "eager"]


def _has(contender: str, case: Case) -> bool:
    """Whether a contender has the case's network, or is the yardstick to show beside it."""
    if get_contender(contender).family == "yardstick":
        return case.input_shape == IMAGE
    if contender in ("torchvision", "torchvision_checkpointed", "timm"):
        return case.model in ("densenet121", "densenet161", "densenet169", "densenet201")
    return not (contender == "offloaded" and (case.mode == "infer" or case.device == "cpu"))


def _with(case: Case, contender: str) -> Case:
    model = "resnet50" if get_contender(contender).family == "yardstick" else case.model
    return replace(case, strategy=contender, model=model)
