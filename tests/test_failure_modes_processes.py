"""What goes wrong with several processes. Numbers are those of the project's list of failure modes."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.comparison import Quantities, assert_same, buffers, everything, upstream
from tests.networks import images, small
from tests.two_processes import LEARNING_RATE, STEPS, batches


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The folder with what each strategy ends with in each of two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-m", "tests.two_processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store"), str(folder)],
            cwd=repository,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return folder


@pytest.fixture(scope="module")
def single_process() -> list[Quantities]:
    """What naive ends with in one process that plays both: the mean of two gradients, statistics apart."""
    networks = [small(), small()]
    for step in range(STEPS):
        for rank, network in enumerate(networks):
            network.zero_grad()
            outputs = [network(images(size, seed=seed)) for size, seed in batches(step, rank)]
            sum((output * upstream(output)).sum() for output in outputs).backward()
        with torch.no_grad():
            for first, second in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
                mean = (first.grad + second.grad) / 2
                for parameter in (first, second):
                    parameter.grad = mean.clone()
                    parameter -= LEARNING_RATE * mean
    return [everything(n, **{f"parameter {m}": p for m, p in n.named_parameters()}) for n in networks]


def test_31_distributed_data_parallel(
    every_strategy: str, two_processes: Path, single_process: list[Quantities]
) -> None:
    """Two forwards, then one backward: a parameter must be marked ready once (pytorch#24005)."""
    for rank in (0, 1):
        assert_same(torch.load(two_processes / f"{every_strategy}.{rank}.pt"), single_process[rank])


def test_31_scratch_is_no_buffer(every_strategy: str) -> None:
    """What is registered on a module is broadcast to every process at every forward."""
    network = small(every_strategy)
    before = copy.deepcopy(network)
    network(images()).sum().backward()
    assert [name for name, _ in network.named_buffers()] == [name for name, _ in before.named_buffers()]
    for (name, module), (_, fresh) in zip(network.named_modules(), before.named_modules(), strict=True):
        assert module.__dict__.keys() == fresh.__dict__.keys(), f"{name} holds something new after a step"
    assert len(buffers(network)) == len(buffers(before))
