"""What the documents say works: their code runs, their paths exist, their commands are known."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import densebench
from densebench import registry
from tests.networks import images, small

HOW_TO = "densebench/strategies/README.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", HOW_TO])
def test_the_strategy_in_the_documents_runs(document: str, repository: Path) -> None:
    """Ten lines make a strategy; it is equal in evaluation and, as the how-to says, refused in training."""
    (code,) = [block for block in blocks(repository / document, "python") if "@strategy" in block]
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith(("#", '"'))]) <= 10
    registry.list_strategies()
    try:
        exec(compile(code, document, "exec"), {"__name__": "densebench.strategies.whole_block"})
        network = small()
        densebench.assert_equivalent(network.eval(), "whole_block", images())
        with pytest.raises(AssertionError, match=r"num_batches_tracked|running"):
            densebench.assert_equivalent(network.train(), "whole_block", images())
    finally:
        registry._strategies.pop("whole_block", None)


def test_the_example_of_use_runs(repository: Path) -> None:
    (code,) = [block for block in blocks(repository / "README.md", "python") if "@strategy" not in block]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"].eval()(torch.randn(1, 3, 32, 32)).shape == (1, 1000)


def test_every_strategy_is_in_the_readme(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert [name for name in densebench.list_strategies() if f"`{name}`" not in text] == []


def test_named_paths_exist(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:densebench|kernels|benchmarks|tests)/[\w/.]*)`", text))
    assert paths
    assert [path for path in paths if not (repository / path).exists()] == []


@pytest.mark.parametrize("module", ["report", "predict", "train", "kernels.compile_report"])
def test_commands_in_the_readme_answer(module: str, repository: Path) -> None:
    assert f"python -m densebench.{module}" in (repository / "README.md").read_text(encoding="utf-8")
    command = [sys.executable, "-m", f"densebench.{module}", "--help"]
    assert "usage" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
