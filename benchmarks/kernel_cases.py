"""Which operators of the fused path are timed, and on which shapes: those of DenseNet-121's layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.cases import Group
from benchmarks.kernel_facts import (
    CONVOLUTIONS,
    OF_BOTTLENECKS,
    OF_NEW_CHANNELS,
    OPERATORS,
    PRODUCT,
    PRODUCTS,
    STEM_POOLS,
    TRANSITION_POOLS,
    WITH_GIVEN_STATISTICS,
)
from densebench.measure.timing import Effort
from densebench.records import Case

BLOCKS = ((6, 64, 56), (12, 128, 28), (24, 256, 14), (16, 512, 7))  # layers, first channels, side of the map
GROWTH_RATE, BOTTLENECK = 32, 128
STEM_CHANNELS, STEM_SIDE = 64, 112


@dataclass(frozen=True)
class Geometry:
    """The operands of a case: pixels, and which columns of how wide a buffer.

    Attributes:
        images, height, width: M = images x height x width rows.
        columns, outputs: C and, for products and convolutions, N.
        buffer: columns of the buffer that the operand lies in, from `first` on.
    """

    images: int
    height: int
    width: int
    columns: int
    outputs: int
    buffer: int
    first: int

    @property
    def rows(self) -> int:
        return self.images * self.height * self.width

    @property
    def pooled(self) -> tuple[int, int, int]:
        """Images, height and width after either pooling; sides are even."""
        return self.images, self.height // 2, self.width // 2


def _middle(block: int) -> int:
    return BLOCKS[block - 1][0] // 2 + 1


# Where "compiled" runs but for the full profile (block, layer): many rows of few columns, and the reverse.
COMPILED_AT = ((1, _middle(1)), (4, _middle(4)), (1, "transition"), (None, "stem"))


def geometry(case: Case) -> Geometry:
    """What the operands of a case of this file look like; a case of another shape stands alone in its buffer."""
    columns, height, width = case.input_shape
    block = case.options.get("block")
    buffer, first = columns, 0
    if isinstance(block, int) and case.model not in OF_BOTTLENECKS:
        layers, start, _ = BLOCKS[block - 1]
        buffer = start + layers * GROWTH_RATE
        if case.model in OF_NEW_CHANNELS:
            first = start + (case.options["layer"] - 1) * GROWTH_RATE
    return Geometry(case.batch, height, width, columns, case.options.get("outputs", 0), buffer, first)


def kernel_groups(profile: str, device: str) -> tuple[Group, ...]:
    """The groups of a profile on a device; a group is one operator on one shape under all its contenders.

    "default": every operator on every shape; compiling for one takes longer than measuring on it, so "compiled" is
    there on a few (`COMPILED_AT`). "full": on all. "quick": products of block 1; on a CPU of its first and last
    layer, and nothing is compiled. "tiny" measures none: it is for tests of the front end.
    """
    if profile == "tiny":
        return ()
    if profile == "quick" and device == "cpu":
        wanted = [(1, 1), (1, BLOCKS[0][0])]
        return tuple(_group(case, compiled=False) for case in _products(8, "float32", "cpu", wanted))
    batch, dtype = (64, "bfloat16") if device == "cuda" else (8, "float32")
    blocks = (1,) if profile == "quick" else (1, 2, 3, 4)
    wanted = [(block, layer) for block in blocks for layer in layers_of(block)]
    cases = list(_products(batch, dtype, device, wanted))
    if profile != "quick":
        cases += _others(batch, dtype, device)
    return tuple(_group(case, profile == "full" or _where(case) in COMPILED_AT) for case in cases)


def kernel_effort(profile: str, device: str) -> Effort:
    """How long a contender is timed on one shape."""
    if device == "cuda":
        return Effort(rounds=60, seconds=1.0, least=30)
    quick = profile == "quick"
    return Effort(rounds=10, seconds=0.5, least=7) if quick else Effort(rounds=20, seconds=2.0, least=7)


def layers_of(block: int) -> tuple[int, int, int]:
    """The first, middle and last layer of a block, counted from 1."""
    return 1, _middle(block), BLOCKS[block - 1][0]


def _products(batch: int, dtype: str, device: str, wanted: list[tuple[int, int]]) -> Iterator[Case]:
    for operator in PRODUCTS:
        for block, layer in wanted:
            _, start, side = BLOCKS[block - 1]
            columns = start + (layer - 1) * GROWTH_RATE
            where = {"block": block, "layer": layer}
            yield _case(operator, batch, (columns, side, side), dtype, device, where, outputs=BOTTLENECK)


def _others(batch: int, dtype: str, device: str) -> Iterator[Case]:
    """What depends on the block alone, once a block; the stem; the transitions."""
    for operator in (*OF_BOTTLENECKS, *OF_NEW_CHANNELS):
        if operator in CONVOLUTIONS and device != "cpu":
            continue
        for block, (_, _, side) in enumerate(BLOCKS, 1):
            columns = BOTTLENECK if operator in OF_BOTTLENECKS else GROWTH_RATE
            where = {"block": block, "layer": layers_of(block)[1]}
            outputs = GROWTH_RATE if operator in CONVOLUTIONS else None
            yield _case(operator, batch, (columns, side, side), dtype, device, where, outputs)
    for operator in STEM_POOLS:
        shape = (STEM_CHANNELS, STEM_SIDE, STEM_SIDE)
        yield _case(operator, batch, shape, dtype, device, {"layer": "stem"})
    for operator in TRANSITION_POOLS:
        for block, (layers, start, side) in enumerate(BLOCKS[:-1], 1):
            shape = (start + layers * GROWTH_RATE, side, side)
            yield _case(operator, batch, shape, dtype, device, {"block": block, "layer": "transition"})


def _case(
    operator: str,
    batch: int,
    shape: tuple[int, int, int],
    dtype: str,
    device: str,
    where: Mapping[str, int | str],
    outputs: int | None = None,
) -> Case:
    """The case of "ours"; the other contenders' differ in the strategy alone."""
    columns, height, width = shape
    options = {**where, "rows": batch * height * width, "columns": columns}
    if outputs is not None:
        options["outputs"] = outputs
    return Case(
        "kernel",
        operator,
        "ours",
        OPERATORS[operator].mode,
        batch,
        shape,
        dtype,
        memory_format="channels_last",
        device=device,
        options=options,
    )


def _where(case: Case) -> tuple[int | None, int | str]:
    return case.options.get("block"), case.options["layer"]


def _group(case: Case, compiled: bool) -> Group:
    contenders = ["ours", "eager", *(["given_statistics"] if case.model in WITH_GIVEN_STATISTICS else [])]
    if compiled:
        contenders.append("compiled")
    if case.device == "cuda" and case.model == PRODUCT:
        contenders.append("cudnn")
    size = "x".join(map(str, (case.batch, *case.input_shape)))
    where = " ".join(f"{name} {case.options[name]}" for name in ("block", "layer") if name in case.options)
    name = f"{case.model} {where} {size} {case.dtype} {case.device}"
    left_out = () if compiled else (replace(case, strategy="compiled"),)
    return Group(name, tuple(replace(case, strategy=contender) for contender in contenders), left_out=left_out)
