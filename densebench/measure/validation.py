"""Validate, then time: a contender is right on its own input, or it gets no time.

Its error against naive in higher precision may be twice that of naive in the same precision (the rule of
FlashAttention's tests), over four quantities: output, input gradient, all parameter gradients, all buffers.
Each is the norm of the difference over the norm of the reference. This is a check before timing; the proof of
equality is `densebench.equivalence` in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from densebench.contenders import get_contender
from densebench.records import Case
from densebench.workload import build_workload, plain

IMAGES = 8  # enough to see any error; the reference in double precision is eight times a half-precision step
FLOORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Quantities = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """The largest error of a contender over all quantities (None if no number), and what is wrong, if anything."""

    error: float | None
    wrong: str | None


class Reference:
    """Naive, or another strategy, on one case's first images, in the case's precision and in a higher one.

    Args:
        case: any case of the network; its strategy does not matter.
        strategy: what is taken to be right.
    """

    def __init__(self, case: Case, strategy: str = "naive") -> None:
        self.case = dataclasses.replace(case, batch=min(case.batch, IMAGES), strategy=strategy, cuda_graph=False)
        work = build_workload(self.case)
        self.state = {name: tensor.cpu() for name, tensor in work.model.state_dict().items()}
        self.input = work.input
        self.upstream: Tensor | None = None  # from the first run, as rounded for the case
        del work
        low_precision = case.autocast is not None or case.dtype in ("float16", "bfloat16")
        high = "float32" if low_precision else "float64"
        own = self._run(self.case)
        self.exact = self._run(dataclasses.replace(self.case, dtype=high, autocast=None))
        self.own_error = _errors(own, self.exact)

    def check(self, case: Case) -> Verdict:
        """Run a contender of the same network on the same weights and images and judge it."""
        errors = _errors(self._run(dataclasses.replace(case, batch=self.case.batch)), self.exact)
        for name, error in errors.items():
            gate = max(2 * self.own_error[name], _floor(case))
            if not error <= gate:  # a NaN is wrong, too
                known = error if math.isfinite(error) else None
                own = f"{self.case.strategy}: {self.own_error[name]:.1e}"
                return Verdict(known, f"{name} off by {error:.1e} ({own})")
        return Verdict(max(errors.values()), None)

    def _run(self, case: Case) -> Quantities:
        work = build_workload(case, self.state)
        work.input.copy_(self.input)
        if self.upstream is not None:
            work.upstream = self.upstream.to(getattr(torch, case.autocast or case.dtype))
        if case.mode == "train":
            work.input.requires_grad_()
        with first_algorithms():
            output = work.step()
        self.upstream = work.upstream if self.upstream is None else self.upstream
        network = plain(work.model)
        gradients = [p.grad for _, p in sorted(network.named_parameters()) if p.grad is not None]
        buffers = [b for _, b in sorted(network.named_buffers()) if b.is_floating_point()]
        input_gradient = [] if work.input.grad is None else [work.input.grad]
        quantities = {
            "output": [output],
            "input gradient": input_gradient,
            "parameter gradients": gradients,
            "buffers": buffers,
        }
        return {name: [t.detach().double().cpu() for t in values] for name, values in quantities.items() if values}


@contextlib.contextmanager
def first_algorithms() -> Iterator[None]:
    """Within the block cuDNN takes the algorithm that it would, and tries none (see `device.tune`).

    Trying all on a few images in two precisions takes longer than the check. So a timed step may run algorithms
    of cuDNN that the check has not run; what is checked is the contender, not cuDNN. Deterministic ones: PyTorch
    keeps the algorithms of those apart from the others, so that what was not tried here is not what is timed when
    the timed batch is as small.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


class NoReferenceError(RuntimeError):
    """There is nothing to check a contender against: the reference itself failed."""


class Checks:
    """Verdicts on the contenders of a group; each network's reference is made once.

    Args:
        one_network: check a contender on the first network that comes up only (a group of one network in
            many depths, whose time is not taken).
    """

    def __init__(self, one_network: bool = False) -> None:
        self.one_network = one_network
        self._references: dict[tuple[str, str], Reference | str] = {}
        self._verdicts: dict[str, Verdict] = {}

    def check(self, case: Case) -> Verdict | None:
        """Judge a contender by its reference; None where it has none.

        Raises:
            NoReferenceError: if the reference fails on this network.
        """
        strategy = get_contender(case.strategy).reference
        if case.mode == "forward" or strategy is None:
            return None
        reference = self._reference(case, strategy)
        if self.one_network:
            case = dataclasses.replace(reference.case, strategy=case.strategy)
        key = case.key()
        if key not in self._verdicts:
            self._verdicts[key] = reference.check(case)
        return self._verdicts[key]

    def _reference(self, case: Case, strategy: str) -> Reference:
        key = strategy, "" if self.one_network else _network(case)
        if key not in self._references:
            try:
                self._references[key] = Reference(case, strategy)
            except Exception as error:  # the next contender gets the same answer, without a second attempt
                self._references[key] = f"{type(error).__name__}: {str(error)[:200]}"
        found = self._references[key]
        if isinstance(found, str):
            raise NoReferenceError(f"{strategy} failed as the reference ({found})")
        return found


def changed(first: Tensor, last: Tensor, case: Case) -> str | None:
    """What to say if a contender's output is no longer what it was before many steps; None if it is.

    The loop trains nothing, so only dropout or a fault changes it.
    """
    if case.options.get("drop_rate"):
        return None
    distance = _distance([last.double()], [first.double()])
    return None if distance <= _floor(case) else f"the output moved by {distance:.1e} while the step was repeated"


def _network(case: Case) -> str:
    same = dataclasses.replace(case, strategy="", batch=0, memory_format="", cuda_graph=False)
    return same.key()


def _floor(case: Case) -> float:
    return FLOORS[getattr(torch, case.autocast or case.dtype)]


def _errors(values: Quantities, exact: Quantities) -> dict[str, float]:
    return {name: _distance(values[name], exact[name]) for name in exact}


def _distance(values: list[Tensor], exact: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(values, exact, strict=True))
    size = sum(float(b.square().sum()) for b in exact)
    return float((difference / size) ** 0.5) if size else float(difference > 0)
