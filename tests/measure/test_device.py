"""A device that was lost, one that is not there, and how one is set up."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from densebench.measure import runner as runner_module
from densebench.measure.device import DeviceLostError, release_memory, tune
from densebench.measure.outcome import is_out_of_memory
from densebench.measure.runner import Runner
from densebench.measure.timing import Effort
from densebench.store import latest
from tests.measure.cases import fault_case, small_case


@pytest.mark.parametrize("when", ["memory", "turns", "driver"])
def test_a_lost_device_ends_the_run_with_records(
    when: str, faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    """Who lost it crashed; who had no turn is skipped and measured when the run is resumed."""
    lost = False
    calls = 0

    def lose() -> None:
        nonlocal lost, calls
        calls += 1
        if calls > {"memory": 0, "turns": 7, "driver": 10**9}[when]:
            lost = True
            raise RuntimeError("an illegal memory access was encountered")

    def driver(*_: Any) -> dict[str, Any]:
        nonlocal lost
        lost = when == "driver"
        return {"unavailable": {}}

    monkeypatch.setitem(faults.ACTS, "fails", lose)
    monkeypatch.setattr(runner_module, "facts_while_repeating", driver)
    monkeypatch.setattr(runner_module, "release_memory", lambda _: "illegal memory access" if lost else None)
    cases = [fault_case(name) for name in ("fails", "fine")]
    with pytest.raises(DeviceLostError, match="context was lost: illegal memory access") as told:
        runner(effort=Effort(10, 60, 10)).measure(cases, "a group")
    assert told.value.case == cases[0]
    culprit, other = latest(runner().store.read())
    if when == "driver":  # both times were there already
        assert culprit.time_s is not None
        assert (other.status in ("ok", "noisy"), other.time_s is not None) == (True, True)
        return
    assert (culprit.status, culprit.reason) == ("crash", "the CUDA context was lost: illegal memory access")
    assert (other.status, other.reason) == (
        "skipped",
        "the CUDA context was lost by fails before its turn was over",
    )
    lost = False
    monkeypatch.setattr(runner_module, "facts_while_repeating", lambda *_: {"unavailable": {}})
    again, fine = runner(resume=True).measure(cases, "a group")
    assert again.status == "crash"
    assert fine.time_s is not None


@pytest.mark.parametrize(("failures", "said"), [(0, None), (1, None), (2, "sticky")])
def test_the_device_is_asked_whether_it_answers(
    failures: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a case did may come to light once; what comes twice stays."""
    answers = iter([RuntimeError("sticky\nmore")] * failures)

    def synchronize() -> None:
        error = next(answers, None)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert release_memory("cuda") == said
    assert release_memory("cpu") is None


def test_cudnn_tries_its_algorithms_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    tune("cpu")
    assert not torch.backends.cudnn.benchmark
    tune("cuda")
    assert torch.backends.cudnn.benchmark


def test_a_graph_on_a_cpu_is_unsupported_with_a_reason(runner: Callable[..., Runner]) -> None:
    (record,) = runner().measure([small_case(cuda_graph=True)], "a group")
    assert (record.status, record.reason) == (
        "unsupported",
        "CUDA graphs need a CUDA device; this case is for 'cpu'",
    )


def test_a_gpu_that_is_not_there_is_unsupported(runner: Callable[..., Runner]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    for graph in (False, True):
        (record,) = runner().measure([small_case(device="cuda", cuda_graph=graph)], "a group")
        assert record.status == "unsupported"
        assert "torch sees no CUDA device" in str(record.reason)


def test_words_for_a_lack_of_memory() -> None:
    host = (
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    )
    assert is_out_of_memory(RuntimeError(host))
    assert is_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_a_host_that_has_not_the_memory_is_oom(
    faults: ModuleType, monkeypatch: pytest.MonkeyPatch, runner: Callable[..., Runner]
) -> None:
    monkeypatch.setitem(faults.ACTS, "fails", lambda: torch.empty(2**60, dtype=torch.uint8))
    (record,) = runner().measure([fault_case("fails")], None)
    assert record.status == "oom"
