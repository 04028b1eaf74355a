"""Which failure mode is held by which tests, and that none of them goes missing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from densebench.registry import list_strategies

# The failure modes that a test in this folder, or in one below it, must be named after: `test_NN_...`.
FAILURE_MODES = {
    1: "second forward before the first backward",
    2: "right alone, wrong in the network",
    3: "gradient through shared statistics lost",
    4: "statistics cached by address",
    5: "running statistics moved twice by recomputation",
    6: "failed or retried forward changes state",
    7: "second backward; saved tensors or incoming gradient written",
    8: "expanded or strided gradient",
    9: "flipped ReLU masks taken for errors",
    10: "variance as a difference of squares",
    13: "a test that compares a buffer with itself",
    14: "uncomputed output passes",
    15: "32-bit offsets",
    16: "odd channels and tails",
    17: "smaller batch after a larger one",
    18: "threads and networks that share scratch",
    19: "backward in another thread",
    20: "dropout mask drawn again",
    21: "negative and zero norm weights",
    22: "NaN and infinity swallowed",
    23: "half precision statistics",
    24: "options of batch norm",
    25: "norms in the other mode",
    26: "frozen parameters, input without gradient",
    27: "smallest shapes",
    28: "ReLU in place on shared features",
    29: "hooks, pruning and parametrizations run around",
    30: "SyncBatchNorm",
    31: "distributed data parallel",
    32: "state_dict, copies, pickles",
    33: "memory formats",
    34: "second derivative",
    35: "autocast",
    36: "compilation",
}
# Those that need a GPU, a compiler or another process to show: tests beside the kernels and the measurements.
ELSEWHERE = {
    11: "TF32 on one side only",
    12: "autotuning that runs a kernel many times",
    37: "CUDA graphs",
    38: "nondeterminism",
    39: "compiler upgrades",
    40: "configurations too large for a smaller GPU",
    41: "writes out of bounds",
    42: "running out of memory",
    43: "green without having run",
    44: "the interpreter's false green",
}
# Those that one strategy's run must be compared in: their tests run for every registered strategy.
OF_STRATEGIES = set(FAILURE_MODES) - {15}


def _tests(folder: Path) -> dict[int, list[ast.FunctionDef]]:
    """The tests named after a failure mode, by its number."""
    found: dict[int, list[ast.FunctionDef]] = {}
    for file in sorted(folder.rglob("test_*.py")):
        for node in ast.parse(file.read_text()).body:
            match = re.match(r"test_(\d\d)_", node.name) if isinstance(node, ast.FunctionDef) else None
            if match and isinstance(node, ast.FunctionDef):
                found.setdefault(int(match[1]), []).append(node)
    return found


@pytest.mark.parametrize("number", FAILURE_MODES)
def test_every_failure_mode_has_a_test(repository: Path, number: int) -> None:
    tests = _tests(repository / "tests").get(number, [])
    assert tests, f"no test of failure mode {number}, {FAILURE_MODES[number]}"
    if number in OF_STRATEGIES:
        parameters = {argument.arg for test in tests for argument in test.args.args}
        assert parameters & {"strategy", "every_strategy"}, f"no test of mode {number} runs for every strategy"


def test_every_number_is_in_the_table(repository: Path) -> None:
    """A test named after a number that nobody can look up says nothing."""
    assert set(_tests(repository / "tests")) <= set(FAILURE_MODES | ELSEWHERE)


def test_strategy_is_never_the_reference(strategy: str) -> None:
    """A comparison of naive with naive would prove nothing."""
    assert strategy in list_strategies()
    assert strategy != "naive"
