"""What holds only at the beginning of a process, so each test starts one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Autograd runs the backward of CUDA tensors in a thread of its own; nothing has used the device there before.
FIRST_IN_ITS_THREAD = """
import sys, threading, torch
import densebench.strategies.fused
from tests.gpu.operators import arguments_on
from tests.kernels.problems import PROBLEMS, Shape

device, name = torch.device(sys.argv[1]), sys.argv[2]
problem = PROBLEMS[name](Shape(dtype=torch.float32))
arguments = arguments_on(problem, device)
seen = {}


class Late(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, grad):
        seen["thread"] = threading.current_thread()
        seen["outcome"] = getattr(torch.ops.densebench, problem.operator)(*arguments)
        return grad


x = torch.ones(2, device=device, requires_grad=True)
Late.apply(x).backward(torch.ones(2, device=device))
outcome = seen["outcome"]
back = [a.cpu() if torch.is_tensor(a) else a for a in arguments]
produced = problem.produced(back, None if outcome is None else tuple(t.cpu() for t in outcome))
for quantity, truth in problem.expected.items():
    error = float((produced[quantity].double() - truth).norm() / (truth.norm() or 1))
    assert error <= 3e-3, (quantity, error)
assert device.type == "cpu" or seen["thread"] is not threading.main_thread()
print("right")
"""

# The whole of a strategy's first step, against naive on the CPU.
FIRST_STEP = """
import sys, torch
from tests.comparison import assert_same
from tests.gpu.runs import train_step
from tests.networks import images, small

device = torch.device(sys.argv[1])
actual = train_step(small(sys.argv[2]).to(device), images().to(device))
expected = train_step(small(), images())
assert_same({name: value.cpu() for name, value in actual.items()}, expected, 1e-9)
print("right")
"""


def _run(repository: Path, program: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("right")


@pytest.mark.parametrize("name", ["bn_relu_backward", "bn_relu_conv1x1_backward"])
def test_19_first_work_of_a_thread_is_a_backward(repository: Path, device: torch.device, name: str) -> None:
    """Triton needs a context in the thread that launches (pytorch#124565: 'invalid device context')."""
    _run(repository, FIRST_IN_ITS_THREAD, str(device), name)


def test_19_first_step_of_a_process(repository: Path, device: torch.device) -> None:
    _run(repository, FIRST_STEP, str(device), "fused")
