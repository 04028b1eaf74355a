"""What others have published about memory and speed of DenseNet training, each with its source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from densebench.report.answer import best
from densebench.report.blocks import Prose, Section, Sheet
from densebench.report.selection import Comparison, Row
from densebench.report.tables import Column, Link, Table, build
from densebench.report.units import duration, memory, number, precision, times

_GITHUB = "https://github.com"
LUA = Link("liuzhuang13/DenseNet", f"{_GITHUB}/liuzhuang13/DenseNet/blob/master/models/README.md")
GPLEISS = Link("gpleiss/efficient_densenet_pytorch", f"{_GITHUB}/gpleiss/efficient_densenet_pytorch")
PLEISS_2017 = Link("arXiv 1707.06990", "https://arxiv.org/abs/1707.06990")
WANDERING = Link("wandering007/efficient-densenet-pytorch", f"{_GITHUB}/wandering007/efficient-densenet-pytorch")
TORCHVISION = Link("pytorch/vision PR 797", f"{_GITHUB}/pytorch/vision/pull/797")
DTR = Link("uwsampl/dtr-prototype", f"{_GITHUB}/uwsampl/dtr-prototype")
MONET = Link("utsaslab/MONeT", f"{_GITHUB}/utsaslab/MONeT")
INPLACE_ABN = Link("arXiv 1712.02616", "https://arxiv.org/abs/1712.02616")
BNFF = Link("arXiv 1807.01702", "https://arxiv.org/abs/1807.01702")
TIMM = Link("timm benchmark tables", f"{_GITHUB}/huggingface/pytorch-image-models/tree/main/results")
KERNELBENCH = Link("KernelBench", f"{_GITHUB}/ScalingIntelligence/KernelBench/tree/main/results/timing")
D2L = Link("d2l.ai, section on DenseNet", "https://d2l.ai/chapter_convolutional-modern/densenet.html")


@dataclass(frozen=True)
class Conditions:
    """Of a published result: in words, and as the fields of our cases; a batch of None is any batch."""

    text: str
    model: str | None = None
    batch: int | None = None
    side: int = 224
    mode: str = "train"
    precision: str = "float32"

    def match(self, comparison: Comparison) -> bool:
        """Whether a comparison has the same network, batch, image, mode and precision; its device is another."""
        case = comparison.case
        same_batch = self.batch is None or case.batch == self.batch
        same_precision = (case.autocast or case.dtype) == self.precision
        return self.alike(comparison) and same_batch and same_precision

    def alike(self, comparison: Comparison) -> bool:
        """The same but for batch and precision."""
        case = comparison.case
        size = (self.side, self.side)
        return case.model == self.model and case.mode == self.mode and tuple(case.input_shape[1:]) == size


@dataclass(frozen=True)
class Published:
    """One result as it was published; memory and time are over those of the plain network in the same source."""

    method: str
    conditions: Conditions
    figure: str
    source: Link
    memory: float | None = None
    time: float | None = None


_BC = Conditions("DenseNet-BC L=100 k=12, CIFAR, batch 64, TITAN X", "densenet_bc", 64, 32)
_BC_PYTORCH = Conditions("DenseNet-BC L=100 k=12, CIFAR, batch 64", "densenet_bc", 64, 32)
_BATCH_8 = Conditions("DenseNet-121, batch 8", "densenet121", 8)
_TITAN_V = Conditions("DenseNet-121, batch 84 at 224, Titan V", "densenet121", 84)
_AMP = Conditions(
    "DenseNet-121 at 224, AMP, channels-last, RTX 3090", "densenet121", None, 224, precision="float16"
)
_FORWARD_121 = Conditions("DenseNet-121, float32 forward, batch 10, H100", "densenet121", 10, mode="infer")
_FORWARD_201 = Conditions("DenseNet-201, float32 forward, batch 10, H100", "densenet201", 10, mode="infer")
_D2L = Conditions("DenseNet of d2l.ai, Fashion-MNIST at 96, batch 256", "densenet_d2l", 256, 96)

PUBLISHED = (
    Published("optMemory=1 (Lua)", _BC, "5453 → 3746 MB, 0.153 → 0.153 s", LUA, 3746 / 5453, 1.0),
    Published("optMemory=2 (Lua)", _BC, "5453 → 2969 MB, 0.153 → 0.152 s", LUA, 2969 / 5453, 152 / 153),
    Published("optMemory=3 (Lua)", _BC, "5453 → 2188 MB, 0.153 → 0.155 s", LUA, 2188 / 5453, 155 / 153),
    Published("optMemory=4 (Lua)", _BC, "5453 → 1655 MB, 0.153 → 0.175 s", LUA, 1655 / 5453, 175 / 153),
    Published("checkpointing", _BC_PYTORCH, "2.863 → 1.605 GB, 0.165 → 0.207 s", GPLEISS, 1605 / 2863, 207 / 165),
    Published(
        "shared storage, recomputation",
        Conditions("report on memory-efficient DenseNets"),
        "feature maps linear in depth, not quadratic; 14M parameters on one GPU, up from 4M; 15 to 20 % slower",
        PLEISS_2017,
    ),
    Published("checkpointing", Conditions("see source"), "largest batch 350 → 1450", WANDERING, None, 1.22),
    Published("memory_efficient=True", _BATCH_8, "1668 → 1115 MB", TORCHVISION, 1115 / 1668, 1.41),
    Published("DTR", _TITAN_V, "11028 → 6103 MB", DTR, 6103 / 11028, 1.29),
    Published("DTR, tighter budget", _TITAN_V, "11028 → 4265 MB", DTR, 4265 / 11028, 1.51),
    Published("MONeT", Conditions("ResNet-50, batch 184"), "15.06 → 4.99 GB", MONET, 4.99 / 15.06, 1.1195),
    Published(
        "In-place ABN", Conditions("see source"), "up to 50 % less memory at 0.8 to 2 % more time", INPLACE_ABN
    ),
    Published(
        "restructured batch norm (BNFF)",
        Conditions("DenseNet-121, training on a CPU"),
        "training speed +25.7 %",
        BNFF,
        None,
        1 / 1.257,
    ),
    Published("timm, plain", _AMP, "913.65 img/s (ResNet-50: 1218.01 img/s)", TIMM),
    Published("eager → inductor", _FORWARD_121, "6.68 → 8.93 ms", KERNELBENCH, None, 8.93 / 6.68),
    Published("eager → inductor", _FORWARD_201, "10.4 → 21.8 ms", KERNELBENCH, None, 21.8 / 10.4),
    Published("d2l.ai, plain", _D2L, "5551.9 examples/s", D2L),
)


def published_section(comparisons: Sequence[Comparison]) -> Section:
    """Published figures, and ours where we have any that may be put beside them."""
    text = (
        "Ours are figures only where the same network, batch, image size and precision were measured; the device "
        "is always another, so compare ratios. Where only the network and image size agree, ours is given as "
        "ratios. Published memory is what a whole process or device used; our ratio is of a step's whole peak, "
        "parameters and gradients included, without the process's own; our figures are activations. MB and GB are "
        "as the sources print them."
    )
    return Section(
        "published", "Published figures beside ours", (Prose(text), Sheet(published_table(comparisons)))
    )


def published_table(comparisons: Sequence[Comparison]) -> Table:
    """One row a published figure."""

    found = {row.conditions: ours(row.conditions, comparisons) for row in PUBLISHED}

    def ratio(value: Callable[[Published], float | None]) -> Callable[[Published], str | None]:
        return lambda row: None if (known := value(row)) is None else times(known)

    columns = [
        Column[Published]("method", lambda row: f"{row.method}: {row.conditions.text}", numeric=False),
        Column[Published]("published", lambda row: row.figure, numeric=False),
        Column[Published]("its memory ratio", ratio(lambda row: row.memory)),
        Column[Published]("its time ratio", ratio(lambda row: row.time)),
        Column[Published]("our memory ratio", ratio(lambda row: found[row.conditions].memory)),
        Column[Published]("our time ratio", ratio(lambda row: found[row.conditions].time)),
        Column[Published]("ours", lambda row: found[row.conditions].text, numeric=False),
        Column[Published]("source", lambda row: row.source, numeric=False),
    ]
    return build("Published figures beside ours", columns, PUBLISHED)


@dataclass(frozen=True)
class Ours:
    """Our best strategy beside a published figure: what and where, and its ratios to naive."""

    text: str
    memory: float | None = None
    time: float | None = None


def ours(conditions: Conditions, comparisons: Sequence[Comparison]) -> Ours:
    """Our best strategy under the same conditions, else its ratios on the same network, else "not run"."""
    if conditions.model is None:
        return Ours("not comparable")
    for exact in (True, False):
        for comparison in comparisons:
            fits = conditions.match(comparison) if exact else conditions.alike(comparison)
            row = best(comparison) if fits else None
            if row is not None:
                text = _figures(row, comparison) if exact else _setting(row, comparison)
                time = None if row.time_ratio is None else row.time_ratio.median
                return Ours(text, _peak_ratio(row, comparison), time)
    return Ours("not run")


def _peak_ratio(row: Row, comparison: Comparison) -> float | None:
    """Of whole peaks, parameters and gradients included: what others publish includes them, and more."""
    naive = None if comparison.naive is None else comparison.naive.record.peak_allocated_bytes
    own = row.record.peak_allocated_bytes
    return own / naive if own is not None and naive else None


def _figures(row: Row, comparison: Comparison) -> str:
    """Our own figures, before and after, for what was run under the published conditions."""
    naive, after = comparison.naive, row.record
    words = []
    if naive is not None and naive.record.peak_delta_bytes and after.peak_delta_bytes:
        unit = comparison.unit
        words.append(f"{unit.of(naive.record.peak_delta_bytes)} → {memory(after.peak_delta_bytes, unit)}")
    if naive is not None and naive.record.time_s is not None and after.time_s is not None:
        words.append(f"{duration(naive.record.time_s.median)} → {duration(after.time_s.median)}")
    if after.throughput_img_s is not None:
        words.append(f"{number(after.throughput_img_s)} img/s")
    return f"{row.name} on {comparison.device}: {', '.join(words)}"


def _setting(row: Row, comparison: Comparison) -> str:
    case = comparison.case
    return f"{row.name} on {comparison.device}, but batch {case.batch} in {precision(case)}"
