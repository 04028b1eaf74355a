"""Peak memory is what the allocator saw: all of it, once, and nothing that was there before."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densebench.measure import memory
from densebench.measure.memory import Measurable, Peak, measure_peak
from densebench.prediction import trace_case
from densebench.workload import Workload, build_workload
from tests.measure.cases import small_case

CPU = torch.device("cpu")
MIB = 2**20


class Pattern:
    """A step that allocates as a function says; nothing else exists."""

    def __init__(self, allocate: Any) -> None:
        self.allocate = allocate
        self.kept: list[Tensor] = []

    def step(self) -> None:
        self.allocate(self.kept)

    def clear_gradients(self) -> None:
        pass

    def constant_bytes(self) -> int:
        return 0


def mebibytes(count: int) -> Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def peak_of(allocate: Any) -> Peak:
    return measure_peak(lambda: Pattern(allocate), CPU)


def test_a_known_pattern_gives_its_exact_peak() -> None:
    def allocate(_: list[Tensor]) -> None:
        a, b = mebibytes(1), mebibytes(2)
        del a
        c = mebibytes(4)  # b and c: 6
        del b, c
        d = mebibytes(5)
        del d

    peak = peak_of(allocate)
    assert peak.peak_delta_bytes == 6 * MIB
    assert peak.plain_peak_bytes == 6 * MIB
    assert peak.repeats == (6 * MIB,) * 3
    assert peak.steady


def test_memory_of_earlier_is_not_charged() -> None:
    held = mebibytes(64)
    assert peak_of(lambda _: mebibytes(3)).peak_delta_bytes == 3 * MIB
    assert held.numel()


def test_scratch_kept_between_steps_is_charged() -> None:
    def allocate(kept: list[Tensor]) -> None:
        if not kept:
            kept.append(mebibytes(7))
        del [mebibytes(1)][0]

    assert peak_of(allocate).peak_delta_bytes == 8 * MIB


def test_a_temporary_inside_an_operator_raises_the_figure() -> None:
    """A convolution in double precision unfolds its input; no dispatch-level tracker sees that."""
    image, weight = torch.randn(1, 8, 64, 64).double(), torch.randn(8, 8, 3, 3).double()
    output_bytes = image.numel() * 8

    peak = peak_of(lambda _: F.conv2d(image, weight, padding=1))

    assert peak.peak_delta_bytes >= output_bytes + 9 * image.numel() * 8


def test_a_growing_step_is_not_steady() -> None:
    peak = peak_of(lambda kept: kept.append(mebibytes(1)))
    assert not peak.steady
    assert peak.peak_delta_bytes == 5 * MIB  # after the warm-up, the plain step and three repeats


@pytest.mark.parametrize(("repeats", "steady"), [((100, 100, 101), True), ((100, 100, 102), False)])
def test_repeats_may_differ_by_a_hundredth(repeats: tuple[int, ...], steady: bool) -> None:
    assert Peak(0, max(repeats), 0, 0, repeats, None, None).steady is steady


def test_repeats_of_a_network_are_steady(every_strategy: str) -> None:
    assert measure_peak(lambda: build_workload(small_case(every_strategy)), CPU).steady


def test_a_cpu_needs_no_warm_up(every_strategy: str) -> None:
    cold, warm = (
        measure_peak(lambda: build_workload(small_case(every_strategy)), CPU, warm_up=warm_up)
        for warm_up in (False, True)
    )
    assert cold.repeats == warm.repeats
    assert cold.plain_peak_bytes == pytest.approx(warm.plain_peak_bytes, rel=0.01)


class Hoarder(Workload):
    """A workload that makes the mistake of holding the last step's output, and so its graph."""

    held: Tensor | None = None

    def step(self) -> Tensor:
        self.held, last = self.forward(), self.held
        self.backward(self.held)
        del last
        return self.held.detach()


def test_no_second_graph_is_held() -> None:
    """The figure is that of one graph: what the prediction, which has only one, says."""
    case = small_case(batch=32)

    def hoarder() -> Measurable:
        work = build_workload(case)
        hoarder = Hoarder(work.model, work.input)
        hoarder.backward = lambda output: None  # type: ignore[method-assign]
        return hoarder

    honest = measure_peak(lambda: build_workload(case), CPU).peak_delta_bytes
    assert honest == pytest.approx(trace_case(case).activation_bytes, rel=0.02)
    assert measure_peak(hoarder, CPU).peak_delta_bytes > 1.5 * honest


def test_the_trace_file_gives_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case()
    direct = measure_peak(lambda: build_workload(case), CPU)
    monkeypatch.setattr(memory, "_events", memory._events_of_trace)
    by_file = measure_peak(lambda: build_workload(case), CPU)
    assert dataclasses.replace(by_file, host_peak_rss_bytes=None) == dataclasses.replace(
        direct, host_peak_rss_bytes=None
    )


def test_without_kinetos_events_the_trace_file_is_read() -> None:
    class Results:
        @property
        def kineto_results(self) -> Any:
            raise AttributeError("kineto_results")

    class Profiler:
        profiler = Results()

        def export_chrome_trace(self, path: str) -> None:
            with open(path, "w") as file:
                file.write('{"traceEvents": [{"name": "[memory]", "ts": 2.5, "args": {"Bytes": -8}}]}')

    assert memory._events(Profiler()) == [("[memory]", 2500, -8)]  # type: ignore[arg-type]


def test_the_baseline_is_the_sum_of_the_tensors() -> None:
    work = build_workload(small_case())
    work.step()
    tensors = [*work.model.parameters(), *(p.grad for p in work.model.parameters()), *work.model.buffers()]
    assert work.upstream is not None
    tensors += [work.input, work.upstream]
    total = sum(tensor.nbytes for tensor in tensors if tensor is not None)

    peak = measure_peak(lambda: build_workload(small_case()), CPU)

    assert peak.baseline_allocated_bytes == total
    assert peak.peak_allocated_bytes == total + peak.peak_delta_bytes


def test_inference_has_no_gradients_in_its_baseline() -> None:
    train, infer = (measure_peak(lambda m=m: build_workload(small_case(mode=m)), CPU) for m in ("train", "infer"))  # type: ignore[misc]
    assert infer.baseline_allocated_bytes < train.baseline_allocated_bytes
    assert infer.peak_delta_bytes < train.peak_delta_bytes


def test_every_mark_gets_its_own_peak() -> None:
    events = [
        ("[memory]", 1, 10),
        (memory._MARK, 2, 10),
        ("[memory]", 3, 5),
        ("[memory]", 4, -5),
        ("[memory]", 15, 100),
        ("[memory]", 16, -100),
        (memory._MARK, 20, 10),
        ("[memory]", 21, 1),
    ]
    assert memory._peaks_within_marks(events[5:] + events[:5]) == [15, 11]


class FakeAllocator:
    """CUDA's statistics for a step that asks for 100 bytes; the first one also tries something larger."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = self.peak = 5000  # of others
        self.steps = 0
        self.reserved = self.current
        fakes = {
            "synchronize": lambda: None,
            "empty_cache": self.empty,
            "memory_stats": lambda: {
                "requested_bytes.all.current": self.current,
                "requested_bytes.all.peak": self.peak,
            },
            "max_memory_reserved": lambda: self.reserved,
            "get_allocator_backend": lambda: "native",
            "reset_peak_memory_stats": self.reset,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)

    def empty(self) -> None:
        self.reserved = self.current

    def reset(self) -> None:
        self.peak = self.current

    def step(self) -> None:
        size = 100 if self.steps else 9000
        self.steps += 1
        self.peak = max(self.peak, self.current + size)
        self.reserved = max(self.reserved, self.current + 2 * size)

    def clear_gradients(self) -> None:
        pass

    def constant_bytes(self) -> int:
        return 40

    def built(self) -> FakeAllocator:
        self.current += 40  # ten tensors of four bytes; rounded up they would be 5,120
        return self


def test_an_allocator_that_does_not_count_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = {"requested_bytes.all.peak": 0, "allocated_bytes.all.peak": 512}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "cudaMallocAsync")
    assert memory._requested("peak") == 512


def test_on_cuda_neither_rounding_nor_trials_are_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator = FakeAllocator(monkeypatch)
    peak = measure_peak(allocator.built, torch.device("cuda"))
    assert peak.peak_delta_bytes == peak.plain_peak_bytes - 40 == 100
    assert peak.peak_reserved_bytes == 5040 + 200  # cuDNN's trials in the first step are given back
    assert allocator.steps == 5


@pytest.mark.gpu
def test_peaks_on_a_gpu_are_identical(every_strategy: str) -> None:
    case = small_case(every_strategy, device="cuda", memory_format="channels_last")
    peak = measure_peak(lambda: build_workload(case), torch.device("cuda"))
    assert len(set(peak.repeats)) == 1
