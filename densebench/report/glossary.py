"""What each column of the report's tables means."""

from __future__ import annotations

import re

_UNIT = r"(, (MiB|GiB))?"

# Pattern of column names -> (name to show, meaning).
_ENTRIES: tuple[tuple[str, str, str], ...] = (
    ("contender", "contender", "A strategy, a way people use instead of one, or another network for scale."),
    (
        f"activation memory{_UNIT}",
        "activation memory",
        "Peak of live memory in one step, less what is constant: parameters, gradients, buffers, input. Library "
        "workspaces are not in it. MiB and GiB are powers of 1024.",
    ),
    ("memory against naive", "memory against naive", "Activation memory over that of naive. Below 1 is less."),
    ("time, ms", "time", "Median of one step, from device events or a synchronized clock; warm-up apart."),
    ("q1 to q3, ms", "q1 to q3", "The middle half of all timed steps."),
    ("img/s", "img/s", "Images a second: the batch over the median time."),
    (
        "time against naive",
        "time against naive",
        "Median of the ratios of paired steps, timed in turns; in brackets its 95 % interval, by bootstrap.",
    ),
    (
        "verdict",
        "verdict",
        "Faster or slower: the whole interval lies beyond 3 % of equal. Same: within 3 %. Undecided: it crosses "
        "that "
        "line. Also how the case ended, where it did not end well.",
    ),
    (f"peak{_UNIT}", "peak", "The highest the allocator went in a step whose gradients exist already."),
    (f"constant{_UNIT}", "constant", "Parameters, gradients, buffers and input, computed from their shapes."),
    (
        f"peak without gradients{_UNIT}",
        "peak without gradients",
        "Peak of a step that starts with gradients set to None.",
    ),
    (f"workspace{_UNIT}", "workspace", "What cuBLAS and cuDNN keep for themselves, as far as it can be told."),
    (f"reserved{_UNIT}", "reserved", "What the caching allocator took from the device."),
    (f"process{_UNIT}", "process", "What the driver says the process uses, context included."),
    (f"host peak{_UNIT}", "host peak", "Peak resident memory of the process on the host."),
    ("repetitions", "repetitions", "Steps timed."),
    ("least time, ms", "least time", "The fastest of the timed steps."),
    ("host time, ms", "host time", "Time the host needs to issue one step."),
    ("compile, s", "compile", "First step of a contender that compiles."),
    ("GFLOP, model", "GFLOP, model", "Twice the multiply-adds of one step, without recomputation."),
    ("GFLOP, executed", "GFLOP, executed", "The same with everything that is computed again."),
    ("TFLOP/s", "TFLOP/s", "Floating-point operations a second: of the model for steps, executed for kernels."),
    ("energy, J", "energy", "Of one step, from the device's own counter."),
    ("clock, MHz", "clock", "Of the multiprocessors while steps repeat."),
    (
        "error against reference",
        "error against reference",
        "Largest difference from the reference, as a share of it.",
    ),
    ("notes", "notes", "Throttling, other processes on the GPU, or times that are noisy."),
    ("reason", "reason", "Why a case has no figure, or is not to be relied on."),
    ("setting", "setting", "What was run: mode, network, batch, image size, precision."),
    ("device", "device", "What it ran on: a GPU, or a CPU and the threads used."),
    ("case", "case", "What was run: mode, network, batch, image size, precision, device."),
    (f"predicted peak{_UNIT}", "predicted peak", "Peak of the same step on shapes without data."),
    (f"measured peak{_UNIT}", "measured peak", "Peak by the allocator, library workspaces taken off."),
    ("error", "error", "Predicted over measured peak, less one."),
    ("source", "source", "Where a figure comes from: measured, predicted, or published there."),
    (
        rf"[\d,]+ layers?{_UNIT}",
        "N layers",
        "Activation memory of a network of so many dense layers.",
    ),
    ("exponent", "exponent", "The p of memory ~ depth^p, by least squares through the logarithms."),
    (
        f"parameters, gradients, buffers, input{_UNIT}",
        "parameters, gradients, buffers, input",
        "What is there at every moment of a step.",
    ),
    (
        f"activations kept for backward{_UNIT}",
        "activations kept for backward",
        "Made in forward and still alive when it ends.",
    ),
    (f"temporaries{_UNIT}", "temporaries", "Released again within forward, or made by backward."),
    ("peak in", "peak in", "The half of the step in which the peak lies."),
    (
        r"\d+ GiB",
        "8 to 80 GiB",
        "The largest batch, or the most layers, that a card with so much memory holds; ≈: estimated.",
    ),
    ("known from", "known from", "The batches or cards that the largest batch was found with."),
    (r"img/s at batch \d+", "img/s at batch N", "Images a second at that batch."),
    (f"activation memory of naive{_UNIT}", "activation memory of naive", "As activation memory, of naive."),
    ("time of naive, ms", "time of naive", "As time, of naive."),
    (
        "strategy",
        "strategy",
        "The one with the least memory of those that are no slower than naive, if there is one.",
    ),
    ("quickest strategy", "quickest strategy", "The strategy with the least time in that case."),
    ("operator", "operator", "What the kernel computes."),
    ("shapes", "shapes", "How many shapes were timed."),
    ("block", "block", "Dense block of the network that the shape comes from."),
    ("layer", "layer", "Dense layer within the block."),
    ("rows", "rows", "Rows of the operand as a matrix: images, height and width together."),
    ("columns", "columns", "Its columns: input channels."),
    ("outputs", "outputs", "Output channels."),
    ("time, µs", "time, µs", "Median of one call, caches flushed or inputs rotated."),
    ("GB/s", "GB/s", "Bytes that the operator must move, over its time; powers of 1000."),
    ("of copy rate", "of copy rate", "GB/s over what PyTorch's own copy reached there."),
    ("of matmul rate", "of matmul rate", "TFLOP/s over what PyTorch's own matmul reached there."),
    ("of copy or matmul rate", "of copy or matmul rate", "The larger of these two shares."),
    ("time against eager", "time against eager", "Time over that of plain PyTorch on the same shape."),
    ("method", "method", "What was published, and for which network, batch, images, precision and device."),
    ("published", "published", "As the source prints it, plain network first."),
    (
        "its memory ratio",
        "its memory ratio",
        "Published memory over that of the plain network in the same source.",
    ),
    ("its time ratio", "its time ratio", "Published time over that of the plain network in the same source."),
    ("our memory ratio", "our memory ratio", "Whole peak of our best strategy over that of naive."),
    ("our time ratio", "our time ratio", "Time of our best strategy over that of naive."),
    ("ours", "ours", "The best strategy of this project in these records, and where it ran."),
)
_CODE = "Of the compiled kernel, as the compiler's output has it."


def explain(column: str, of_code: bool = False) -> tuple[str, str]:
    """The name to show for a column, and its meaning.

    Args:
        of_code: whether it is of the table of compiled kernels, which has what its file has, known here or not.

    Raises:
        KeyError: with the column's name, if no entry explains it.
    """
    for pattern, name, meaning in _ENTRIES:
        if re.fullmatch(pattern, column):
            return name, meaning
    if not of_code:
        raise KeyError(column)
    return column, _CODE_COLUMNS.get(column, _CODE)


_CODE_COLUMNS = {
    "kernel": "The kernel's name.",
    "target": "The architecture it was compiled for.",
    "triton": "The version of the compiler.",
    "registers": "Registers a thread.",
    "spill bytes": "Bytes of registers that went to memory for want of room; 0 is good.",
    "shared bytes": "Shared memory a program.",
    "instructions": "Machine instructions in all.",
    "dtype": "The precision it was compiled for.",
    "growth rates": "Growth rates of networks that launch it like this.",
    "tensor core instructions": "Instructions that multiply matrices: wgmma, mma and the like.",
    "loads": "Load instructions from global memory.",
    "wide loads": "Those of them that fetch 16 bytes a thread.",
    "narrow offsets": "Whether any address is computed in 32 bits, which wraps beyond 2 GiB.",
    "configuration": "Block sizes, warps and stages.",
}
