"""The step of a case that is timed: warmed up, and built as training loops take it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from densebench.contenders import get_contender
from densebench.measure.graph import Graphed
from densebench.measure.memory import Measurable
from densebench.measure.outcome import Outcome
from densebench.measure.timing import Step
from densebench.records import Case
from densebench.workload import Workload, build_workload


def measurable(case: Case) -> Measurable:
    """A workload whose memory can be measured."""
    work = build_workload(case)
    return Graphed(work) if case.cuda_graph else work


def warm_up(one: Outcome) -> None:
    """Give an outcome the step to time, once it has run; its first output is the first of `outputs`."""
    work = build_workload(one.case)
    one.outputs.append(work.step().clone())
    _wait_for(one.case)
    one.step = _fresh_step(work, one.outputs) if not one.case.cuda_graph else _replayed(work, one.outputs)


def compile_seconds(case: Case) -> float:
    """Seconds that the first step of a compiling contender takes, with nothing compiled in this process before."""
    forget_compiled([case])
    work = build_workload(case)
    start = time.perf_counter()
    work.step()
    _wait_for(case)
    return time.perf_counter() - start


def compiles(case: Case) -> bool:
    return get_contender(case.strategy).compiles


def forget_compiled(cases: Sequence[Case]) -> None:
    """Before something compiles, forget what was compiled earlier in this process.

    Code for other shapes counts towards the limit of recompilations, and makes the compiler generalize over
    shapes. Call it once for cases that are then to run side by side: it would take the code of the first away.
    """
    if any(compiles(case) for case in cases):
        torch._dynamo.reset()


def _wait_for(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def _replayed(work: Workload, outputs: list[Tensor]) -> Step:
    """A step that replays a graph; its gradients are the graph's own and overwritten each time."""
    graph = Graphed(work)
    work.clear_gradients()
    graph.step()

    def step() -> None:
        outputs[1:] = [graph.replay()]

    return step


def _fresh_step(work: Workload, outputs: list[Tensor]) -> Step:
    """A step as training loops take it: gradients are released first."""

    def step() -> None:
        work.clear_gradients()
        outputs[1:] = [work.step()]

    return step
