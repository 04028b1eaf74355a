"""What the compiler makes of the kernels for GPUs that are not here.

Compiled in a process of its own: in this one the kernels belong to the interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from densebench.kernels.compile_report import TARGETS

pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")
TENSOR_CORE_KERNELS = ("bn_relu_conv1x1", "bn_relu_conv1x1_backward")
SHARED_LIMIT = {name: target.shared_limit for name, target in TARGETS.items()}  # bytes a program


def compiled(folder: Path, targets: str, dtypes: str, rates: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    table = folder / "kernels.json"
    command = [sys.executable, "-m", "densebench.kernels.compile_report", "--json", str(table)]
    options = ["--targets", targets, "--dtypes", dtypes, "--growth-rates", rates]
    done = subprocess.run(command + options, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(table.read_text())


def assert_sound(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"].split(".")[0] for row in rows} >= {*TENSOR_CORE_KERNELS, "bn_relu", "deferred"}
    for row in rows:
        assert row["shared_bytes"] <= SHARED_LIMIT[row["target"]], row
        assert not row["narrow_offsets"], f"row offsets in 32 bits: {row}"
        assert row["loads"] > 0, row
        if row["kernel"] in TENSOR_CORE_KERNELS and not row["dtype"].endswith("-ieee"):
            assert row["tensor_core_instructions"] > 0, row
            assert row["wide_loads"] > 0, row


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("hopper"), "sm_90", "bfloat16", "12,32,48")


def test_hopper(hopper: list[dict[str, Any]]) -> None:
    """The configurations that an H100 runs: nothing spills, for k = 12, 32 and 48."""
    assert_sound(hopper)
    assert [row for row in hopper if row["spill_bytes"]] == []


def test_float32_on_hopper(tmp_path: Path) -> None:
    """In TF32 and, which takes no tensor core but many registers, exactly."""
    rows = compiled(tmp_path, "sm_90", "float32,float32-ieee", "32")
    assert_sound(rows)
    assert [row for row in rows if row["spill_bytes"]] == []


def test_prefixes_are_read_16_bytes_at_a_time(hopper: list[dict[str, Any]]) -> None:
    """With k = 12 most prefixes are no multiple of 16 channels wide; padded rows keep their loads wide."""
    rows = [row for row in hopper if row["kernel"] == "bn_relu_conv1x1_backward" and row["growth_rates"] == [12]]
    assert rows
    assert all(row["wide_loads"] >= 8 for row in rows)


def test_the_gradient_buffer_is_loaded_ahead_too(hopper: list[dict[str, Any]]) -> None:
    """All three tiles wait in shared memory; one that is asked for when it is needed has the program wait."""
    rows = [row for row in hopper if row["kernel"] == "bn_relu_conv1x1_backward" and row["growth_rates"] == [32]]
    assert rows
    for row in rows:
        size = {name: int(value) for name, value in re.findall(r"(\w+) (\d+),", row["configuration"])}
        stages = int(row["configuration"].split(", ")[-1].split()[0])
        tiles = 2 * size["rows"] * (size["outputs"] + size["columns"] + size["columns"])  # grad, x, the buffer
        assert row["shared_bytes"] >= tiles * stages, row


@pytest.mark.nightly
def test_every_target_and_dtype(tmp_path: Path) -> None:
    assert_sound(compiled(tmp_path, ",".join(TARGETS), "bfloat16,float16,float32,float64", "12,32,48"))


def test_unknown_target_is_refused() -> None:
    command = [sys.executable, "-m", "densebench.kernels.compile_report", "--targets", "sm_13"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sm_13" in done.stderr
    assert "sm_90" in done.stderr
