"""Validate, then time: a contender is right on its own input, or it gets no time.

Its error against naive in higher precision may be twice that of naive in the same precision (the rule of
FlashAttention's tests), over four quantities: output, input gradient, all parameter gradients, all buffers.
Each is the norm of the difference over the norm of the reference. This is a check before timing; the proof of
equality is `densebench.equivalence` in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from densebench.contenders import get_contender
from densebench.results import Case
from densebench.workload import build_workload, plain

IMAGES = 8  # enough to see any error; the reference in double precision is eight times a half-precision step
FLOORS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Quantities = dict[str, list[Tensor]]


@dataclass(frozen=True)
class Verdict:
    """The largest error of a contender over all quantities, and what is wrong with it, if anything."""

    error: float
    wrong: str | None


class Reference:
    """Naive on one case's first images, in the case's precision and in a higher one.

    Args:
        case: any case of the network; its strategy does not matter.
    """

    def __init__(self, case: Case) -> None:
        self.case = dataclasses.replace(case, batch=min(case.batch, IMAGES), strategy="naive")
        self.state = {name: t.cpu() for name, t in build_workload(self.case).model.state_dict().items()}
        low_precision = case.autocast is not None or case.dtype in ("float16", "bfloat16")
        high = "float32" if low_precision else "float64"
        self.exact = self._run(dataclasses.replace(self.case, dtype=high, autocast=None))
        self.own_error = _errors(self._run(self.case), self.exact)

    def check(self, contender: str) -> Verdict:
        """Run a contender on the same weights and images and judge it."""
        errors = _errors(self._run(dataclasses.replace(self.case, strategy=contender)), self.exact)
        floor = FLOORS[getattr(torch, self.case.autocast or self.case.dtype)]
        for name, error in errors.items():
            gate = max(2 * self.own_error[name], floor)
            if not error <= gate:  # a NaN is wrong, too
                return Verdict(error, f"{name} is off by {error:.1e} (naive: {self.own_error[name]:.1e})")
        return Verdict(max(errors.values()), None)

    def _run(self, case: Case) -> Quantities:
        work = build_workload(case, self.state)
        work.input = work.input.float().to(work.input.dtype)
        if case.mode == "train":
            work.input.requires_grad_()
        output = work.step()
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


def can_be_checked(case: Case) -> bool:
    """Whether the case runs a DenseNet of ours by other means, so that naive is its reference."""
    return get_contender(case.strategy).models == "densenet"


def _errors(values: Quantities, exact: Quantities) -> dict[str, float]:
    return {name: _distance(values[name], exact[name]) for name in exact}


def _distance(values: list[Tensor], exact: list[Tensor]) -> float:
    difference = sum(float((a - b).square().sum()) for a, b in zip(values, exact, strict=True))
    size = sum(float(b.square().sum()) for b in exact)
    return float((difference / size) ** 0.5) if size else float(difference > 0)
