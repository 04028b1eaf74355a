"""A step as a CUDA graph: recorded once, then replayed without the host's work of launching it."""

from __future__ import annotations

import torch
from torch import Tensor

from densebench.records import Case
from densebench.workload import Workload

WARM_UPS = 3  # on a stream of their own, as PyTorch's notes on CUDA graphs ask for


def why_no_graph(case: Case) -> str | None:
    """Why a case that asks for a CUDA graph cannot have one; None if it can."""
    if case.cuda_graph and case.device != "cuda":
        return f"CUDA graphs need a CUDA device; this case is for {case.device!r}"
    return None


class Graphed:
    """A workload whose step records a graph anew; `replay` then runs the last one recorded.

    Recording allocates what the step would, from a pool that the graph keeps, so the peak of a recording is
    the peak of the step; what other work cannot use afterwards shows in the reserved bytes.
    """

    def __init__(self, work: Workload) -> None:
        self.work = work
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: Tensor | None = None
        self._warm_up()

    def step(self) -> None:
        """Record a step; gradients that exist are accumulated into, others become the graph's own."""
        self._graph = self._output = None  # gives its pool back first
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self.work.step()
        self._graph = graph

    def replay(self) -> Tensor:
        """Run the recorded step; the output's memory is the graph's and changes with the next replay."""
        if self._graph is None or self._output is None:
            raise RuntimeError("nothing is recorded yet: call step() first")
        self._graph.replay()
        return self._output

    def clear_gradients(self) -> None:
        self.work.clear_gradients()

    def constant_bytes(self) -> int:
        return self.work.constant_bytes()

    def _warm_up(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.work.clear_gradients()
                self.work.step()
        torch.cuda.current_stream().wait_stream(stream)
