"""What a reader is told of the kernels: what was found, who was timed, and what the shares are of."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from densebench.counting import counted
from densebench.report.kernel_tables import share
from densebench.report.kernels import BASELINE, Machine, Operator, Run, rates
from densebench.report.units import CROSS, number, times

GIVEN = "given_statistics"
_BACKWARD = "_backward"
_COMPUTES = {
    "bn_relu": "batch norm and ReLU",
    "bn_relu_conv1x1": f"batch norm, ReLU and 1{CROSS}1 convolution",
    "bn_relu_conv3x3": f"batch norm, ReLU and 3{CROSS}3 convolution",
    "bn_relu_max_pool": "batch norm, ReLU and max pooling",
    "bn_relu_avg_pool": "batch norm, ReLU and average pooling",
}
_CONTENDERS = {
    "ours": "the operator of this project, which is given mean and variance of its operand.",
    BASELINE: "plain PyTorch, one layer after the other; it computes mean and variance itself.",
    GIVEN: "eager with batch norm in evaluation mode, which is given mean and variance as ours is. It computes no "
    "statistics of its result, and no gradient through them: it does less than ours.",
    "compiled": "eager through torch.compile, for each shape by itself.",
    "cudnn": "the fused operation of cuDNN.",
}


def finding(machine: Machine) -> str | None:
    """The first operator's time over that of eager, its backward's, and on how many shapes ours is quicker."""
    first = _first(machine)
    if first is None:
        return None
    what = f" ({_COMPUTES[first.name]})" if first.name in _COMPUTES else ""
    sentences = [
        f"The fused {first.name}{what} takes {_median(first)} the time of plain PyTorch on {machine.name} "
        f"({_spread(first)}){_of_backward(machine, first)}.",
        _overall(machine),
    ]
    if given := first.ratios("ours", GIVEN):
        sentences.append(
            f"Eager also computes the statistics of its operand, which ours is given; against {GIVEN}, which is "
            f"given them too, {first.name} takes {times(statistics.median(given))} the time."
        )
    return " ".join(sentences)


def gist(machine: Machine) -> str:
    """The first operator of a machine in a few words, for a folded line."""
    first = _first(machine)
    return "" if first is None else f" — {first.name}: {_median(first)} the time of eager"


def clauses(machines: Iterable[Machine]) -> tuple[str, ...]:
    """Who was timed: one clause a contender that occurs and is known."""
    names = dict.fromkeys(name for machine in machines for name in machine.contenders)
    return tuple(f"{name}: {_CONTENDERS[name]}" for name in _CONTENDERS if name in names)


def probe(machine: Machine) -> str:
    """What PyTorch's copy and matmul reached, as far as it is known: the rates that shares are of."""
    known = [rates(run.record) for run in machine.runs]
    copy, matmul = ({pair[at] for pair in known} - {None} for at in (0, 1))
    said = [f"copy {_range(copy, 'GB/s')}"] if copy else []
    said += [f"matmul {_range(matmul, 'TFLOP/s')}"] if matmul else []
    return " and ".join(said)


def beyond(machine: Machine) -> str | None:
    """Where shares of the probed rates exceed 100 %: how many, up to what, and why that can be."""
    said = [
        _exceeding(machine, lambda run: run.copy_share, "copy"),
        _exceeding(machine, lambda run: run.matmul_share, "matmul"),
    ]
    if not any(said):
        return None
    return (
        f"{'; '.join(part for part in said if part)}. The probe is one copy and one matrix product, each of one "
        "size, by the library that PyTorch calls: other sizes and other code can be quicker, so its rates are no "
        "bound of the machine."
    )


def code_words(code: Sequence[dict[str, Any]], timed: bool) -> str:
    """One sentence on the compiled kernels; `timed` says whether any ran on a GPU."""
    kernels = counted(len({kernel.get("kernel") for kernel in code}), "GPU kernel")
    targets = ", ".join(dict.fromkeys(str(kernel["target"]) for kernel in code if kernel.get("target")))
    text = f"What the compiler makes of {kernels} in {counted(len(code), 'configuration')}"
    text += f" for {targets}" if targets else ""
    text += ": registers, shared memory and instructions"
    spills = [kernel["spill_bytes"] for kernel in code if isinstance(kernel.get("spill_bytes"), int)]
    if spills:
        spilling = sum(value > 0 for value in spills)
        verb = "spill" if spilling > 1 else "spills"
        text += f"; {spilling or 'none'} of {len(spills)} {verb} registers to memory"
    return text + ("." if timed else ". None of them was timed on a GPU in these records.")


def _first(machine: Machine) -> Operator | None:
    """The operator to tell of: the first in the records that ours and eager both ran."""
    return next((operator for operator in machine.operators if operator.ratios("ours")), None)


def _of_backward(machine: Machine, first: Operator) -> str:
    found = [one for one in machine.operators if one.name == first.name + _BACKWARD and one.ratios("ours")]
    return "".join(f"; its backward {_median(one)} ({_spread(one)})" for one in found)


def _overall(machine: Machine) -> str:
    """On how many shapes ours takes less time than eager, and the worst of the others."""
    found = [(ratio, operator) for operator in machine.operators for ratio in operator.ratios("ours")]
    less = sum(ratio < 1 for ratio, _ in found)
    operators = counted(len({machine.title(operator) for _, operator in found}), "operator")
    text = f"Over {operators}, ours takes less time than eager on {less} of {counted(len(found), 'shape')}"
    if less == len(found):
        return f"{text}."
    ratio, worst = max(found, key=lambda pair: pair[0])
    return f"{text}, and on the others up to {times(ratio)} ({machine.title(worst)})."


def _exceeding(machine: Machine, of: Callable[[Run], float | None], what: str) -> str | None:
    shares = [value for run in machine.runs if (value := of(run)) is not None]
    over = [value for value in shares if value > 1]
    if not over:
        return None
    verb = "exceeds" if len(over) == 1 else "exceed"
    return (
        f"{len(over)} of {counted(len(shares), 'record')} {verb} the rate of PyTorch's {what} at the probe, "
        f"up to {share(max(over))}"
    )


def _median(operator: Operator) -> str:
    return times(statistics.median(operator.ratios("ours")))


def _spread(operator: Operator) -> str:
    """Of how many shapes a median is, and from where to where they lie."""
    ratios = operator.ratios("ours")
    if len(ratios) == 1:
        return "one shape"
    return f"median of {len(ratios)} shapes, {times(min(ratios))} to {times(max(ratios))}"


def _range(values: Iterable[float | None], unit: str) -> str:
    known = sorted(value for value in values if value is not None)
    words = dict.fromkeys(number(value) for value in (known[0], known[-1]))
    return f"{' to '.join(words)} {unit}"
