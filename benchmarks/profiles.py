"""The profiles: which groups of cases a run measures, sized for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.cases import (
    DEPTHS,
    VOLUME,
    Group,
    Limit,
    cifar_depths,
    compiled_group,
    depth_group,
    depth_predicted,
    full_size,
    graph_group,
    limits_of_batch,
    limits_of_depth,
    network_group,
    timelines,
)
from densebench.measure.timing import Effort
from densebench.records import Case
from densebench.registry import list_strategies


@dataclass(frozen=True)
class Profile:
    """All that one run measures.

    Attributes:
        effort: how long each contender of a group is timed.
        groups: measured on the device.
        predicted: traced without running.
        minutes: about how long it takes.
        limits: what fits is searched for, without running.
    """

    effort: Effort
    groups: tuple[Group, ...]
    predicted: tuple[Case, ...]
    minutes: float
    limits: tuple[Limit, ...] = ()


def profile(name: str, device: str) -> Profile:
    """The profile "quick", "default" or "full" on a device "cpu" or "cuda" ("tiny" tests the suite itself)."""
    builders: dict[tuple[str, str], Callable[[], Profile]] = {
        ("quick", "cpu"): _quick_cpu,
        ("default", "cpu"): _default_cpu,
        ("full", "cpu"): _full_cpu,
        ("quick", "cuda"): _quick_cuda,
        ("default", "cuda"): _default_cuda,
        ("full", "cuda"): _full_cuda,
    }
    if name == "tiny":
        return _tiny(device)
    return builders[name, device]()


def _quick_cpu() -> Profile:
    return Profile(
        Effort(rounds=10, seconds=2.0, least=6),
        (
            network_group("densenet121", "train", 2, "cpu", contenders=_quick_contenders()),
            network_group("densenet121", "infer", 2, "cpu", contenders=_quick_contenders()),
            depth_group(DEPTHS[:3], "cpu"),
        ),
        (*full_size(), *timelines()),
        minutes=2,
        limits=limits_of_batch(checked=False),
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
        minutes=15,
        limits=limits_of_batch(checked=False),
    )


def _full_cpu() -> Profile:
    return Profile(
        Effort(rounds=15, seconds=20.0, least=10),
        (
            network_group("densenet121", "train", 8, "cpu", both_formats=True),
            network_group("densenet121", "infer", 8, "cpu", both_formats=True),
            network_group("densenet_bc", "train", 64, "cpu", image=(3, 32, 32), both_formats=True),
            depth_group(DEPTHS, "cpu"),
            network_group("densenet121", "train", 2, "cpu", image=VOLUME, both_formats=True),
            network_group(
                "densenet121", "train", 8, "cpu", autocast="bfloat16", contenders=_strategies_and_torchvision()
            ),
            compiled_group(4, "cpu"),
        ),
        (*full_size(), *timelines(), *depth_predicted(), *cifar_depths()),
        minutes=57,
        limits=(*limits_of_batch(checked=True), *limits_of_depth()),
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
        limits=limits_of_batch(checked=False),
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
        limits=limits_of_batch(checked=False),
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
            graph_group("densenet121", 64, "bfloat16"),
            network_group(
                "densenet121", "train", 32, "cuda", image=VOLUME, autocast="bfloat16", both_formats=True
            ),
            compiled_group(64, "cuda", "bfloat16"),
        ),
        minutes=26,
    )


def _tiny(device: str) -> Profile:
    options = {"block_config": [2, 2], "growth_rate": 4, "stem": "cifar", "num_classes": 10}
    case = Case("step", "densenet_x", "naive", "train", 4, (3, 16, 16), device=device, options=options)
    case = replace(case, memory_format="channels_last")
    group = Group(f"train tiny {device}", tuple(replace(case, strategy=name) for name in list_strategies()))
    predicted = replace(case, source="predicted", device="cpu")
    return Profile(
        Effort(rounds=3, seconds=1.0, least=2), (group, depth_group((2, 3), device)), (predicted,), minutes=0.2
    )


def _quick_contenders() -> list[str]:
    return [*_strategies_and_torchvision(), "torchvision_checkpointed", "eager"]


def _strategies_and_torchvision() -> list[str]:
    """Few, where a processor that does not multiply bfloat16 takes seconds for a step."""
    return [*list_strategies(), "torchvision"]
