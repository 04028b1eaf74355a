"""What the documents say works: their code runs, their paths exist, their commands are known."""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import densebench
from densebench import registry
from densebench.execution.computation import StageComputation
from tests.networks import images, small, temporary_strategy

HOW_TO = "densebench/strategies/README.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@contextlib.contextmanager
def whole_block(document: Path) -> Iterator[str]:
    """The strategy that a document shows first, registered."""
    code = next(block for block in blocks(document, "python") if "@strategy" in block)
    registry.list_strategies()
    try:
        exec(compile(code, document.name, "exec"), {"__name__": "densebench.strategies.whole_block"})
        yield "whole_block"
    finally:
        registry._strategies.pop("whole_block", None)


@pytest.mark.parametrize("document", ["README.md", HOW_TO])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"bn_size": None}, {"drop_rate": 0.4}, {"spatial_dims": 3}], ids=str)
def test_the_strategy_in_the_documents_is_right(
    document: str, training: bool, options: dict, repository: Path
) -> None:
    with whole_block(repository / document) as name:
        network = small(**options).train(training)
        x = images(dims=network.config.spatial_dims)
        assert densebench.assert_equivalent(network, name, x, learning_rate=0.1)


def test_what_the_how_to_says_of_plain_checkpointing_is_true() -> None:
    """Equal in evaluation; in training refused by the first buffer that differs."""

    def shorter(stage: Any, x: torch.Tensor) -> torch.Tensor:
        return stage.run_tail(checkpoint(stage.run_block, stage.run_head(x), use_reentrant=False))

    with temporary_strategy("shorter", shorter) as name:
        network = small()
        densebench.assert_equivalent(network.eval(), name, images())
        with pytest.raises(AssertionError, match=r"num_batches_tracked|running"):
            densebench.assert_equivalent(network.train(), name, images())


def test_the_outline_of_a_computation_has_its_methods(repository: Path) -> None:
    """The names of all that are to be written, and of their parameters."""
    (code,) = [block for block in blocks(repository / HOW_TO, "python") if "StageComputation)" in block]
    (outline,) = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    methods = [node for node in outline.body if isinstance(node, ast.FunctionDef)]
    shown = {method.name: [argument.arg for argument in method.args.args] for method in methods}
    expected = {
        name: list(inspect.signature(getattr(StageComputation, name)).parameters)
        for name in StageComputation.__abstractmethods__
    }
    assert shown == expected


def test_the_commands_of_make_exist(repository: Path) -> None:
    targets = re.findall(r"^(\w+):", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for document in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(
            r"^make ([a-z]+)|`make ([a-z]+)", (repository / document).read_text("utf-8"), re.MULTILINE
        )
        assert named
        assert {first or second for first, second in named} <= set(targets)


def test_the_example_of_use_runs(repository: Path) -> None:
    (code,) = [block for block in blocks(repository / "README.md", "python") if "@strategy" not in block]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_every_strategy_is_in_the_readme(repository: Path) -> None:
    """Each has a row in the table, and no row is left of one that has gone."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    table = text.partition("| strategy | what it does |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    missing = [
        f"| `{name}` | {densebench.get_strategy(name).summary} | (what is kept for backward, a block) |"
        for name in densebench.list_strategies()
        if name not in rows
    ]
    assert not missing, "add to the table of strategies in README.md:\n" + "\n".join(missing)
    gone = [name for name in rows if name not in densebench.list_strategies()]
    assert not gone, f"take out of the table of strategies in README.md: {', '.join(gone)}"


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", HOW_TO])
def test_named_paths_exist(document: str, repository: Path) -> None:
    text = (repository / document).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:densebench|kernels|benchmarks|tests)/[\w/.]*)`", text))
    assert paths
    assert [path for path in paths if not (repository / path).exists()] == []


@pytest.mark.parametrize("module", ["report", "predict", "train", "kernels.compile_report"])
def test_commands_in_the_readme_answer(module: str, repository: Path) -> None:
    assert f"python -m densebench.{module}" in (repository / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", f"densebench.{module}", "--help"]
    assert "usage" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
