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
VOLUME = (1, 64, 64, 64)
CAPACITIES_GIB = (8, 16, 24, 40, 80)
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
        limits=largest_batches(checked=False),
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
        limits=largest_batches(checked=False),
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
            compiled_group(4, "cpu"),
        ),
        (*full_size(), *timelines(), *depth_predicted(), *cifar_depths()),
        minutes=55,
        limits=(*largest_batches(checked=True), *deepest_networks()),
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
        limits=largest_batches(checked=False),
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
        limits=largest_batches(checked=False),
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


def largest_batches(checked: bool) -> tuple[Limit, ...]:
    """The largest batch of DenseNet-121 at 224 in float32, under every strategy."""
    case = Case("fit", "densenet121", "naive", "train", 64, IMAGE, device="cuda", source="predicted")
    case = replace(case, memory_format="channels_last")
    return tuple(Limit(replace(case, strategy=name), CAPACITIES_GIB, checked) for name in list_strategies())


def deepest_networks() -> tuple[Limit, ...]:
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


def _quick_contenders() -> list[str]:
    return [*list_strategies(), "torchvision", "torchvision_checkpointed", "eager"]


def _without_compilers() -> list[str]:
    return [name for name in list_contenders() if not get_contender(name).compiles]


def _has(contender: str, case: Case) -> bool:
    """Whether a contender has the case's network, or is the yardstick to show beside it."""
    if get_contender(contender).family == "yardstick":  # once, beside the network of its size
        return case.input_shape == IMAGE and case.model == "densenet121"
    if contender == "offloaded" and (case.mode == "infer" or case.device == "cpu"):
        return False  # nothing to offload, or nowhere
    if contender == "checkpointed_blocks" and case.mode == "infer":
        return False  # naive
    return get_contender(contender).has(case.model) and (
        len(case.input_shape) == 3 or get_contender(contender).volumes
    )


def _with(case: Case, contender: str) -> Case:
    model = "resnet50" if get_contender(contender).family == "yardstick" else case.model
    return replace(case, strategy=contender, model=model)
