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
import torch

from densebench.kernels.bn_relu_conv1x1 import _waits
from densebench.kernels.language import VERSION
from densebench.kernels.launch import compiling_for
from densebench.kernels.offline import TARGETS
from densebench.kernels.tiling import Tile

pytest.importorskip("triton.backends.nvidia", reason="Triton for NVIDIA is not installed")
TENSOR_CORE_KERNELS = ("bn_relu_conv1x1", "bn_relu_conv1x1_backward")
NO_FLOAT64 = ("sm_86", "sm_89", "sm_120")  # tensor cores of what is sold for graphics multiply no float64
SHARED_LIMIT = {name: target.shared_limit for name, target in TARGETS.items()}  # bytes a program


def compiled(folder: Path, targets: str, dtypes: str, rates: str) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    table = folder / "kernels.json"
    command = [sys.executable, "-m", "densebench.kernels.compile_report", "--json", str(table)]
    command += ["--jobs", str(os.cpu_count())]
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
            multiplies = row["dtype"] != "float64" or row["target"] not in NO_FLOAT64
            assert (row["tensor_core_instructions"] > 0) is multiplies, row
            # On AMD what is read of prefixes that grow by 12 channels comes in pieces.
            narrow = row["target"].startswith("gfx") and row["growth_rates"] == [12]
            assert row["wide_loads"] > 0 or narrow, row


@pytest.fixture(scope="module")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return compiled(tmp_path_factory.mktemp("hopper"), "sm_90", "bfloat16", "12,32,48")


def test_hopper(hopper: list[dict[str, Any]]) -> None:
    """The configurations that an H100 runs: nothing spills, for k = 12, 32 and 48."""
    assert_sound(hopper)
    assert [row for row in hopper if row["spill_bytes"]] == []


SPILLED_IN_FLOAT32 = {(3, 7): 160, (3, 8): 160}  # bytes a thread; none with 3.6, nor from 3.9 on


def test_float32_on_hopper(tmp_path: Path) -> None:
    """In TF32 and, which takes no tensor core but many registers, exactly."""
    rows = compiled(tmp_path, "sm_90", "float32,float32-ieee", "32")
    assert_sound(rows)
    assert [row for row in rows if row["spill_bytes"] > SPILLED_IN_FLOAT32.get(VERSION, 0)] == []


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


_PRODUCTS = """
import importlib, json, re, torch
from densebench.kernels import compile_report, offline
forward = importlib.import_module("densebench.kernels.bn_relu_conv1x1")
forward._waits = lambda *_: True
for launch in offline.recorded_launches(32, torch.bfloat16):
    if launch.name == "bn_relu_conv1x1" and dict(launch.constants)["BLOCK_ROWS"] >= 64:
        built = offline.compiled_kernel(launch, "sm_90")
        code, cubin = built.asm["ttgir"], built.asm["cubin"]
        loop = code[code.index("ttng.warp_group_dot ") : code.rindex("scf.yield")]
        listed = re.findall(r"^\\s+/[*][0-9a-f]{4,}[*]/", compile_report._of_cubin(cubin, "-sass"), re.MULTILINE)
        counted = compile_report.compile_launch(launch, "sm_90", "bfloat16", (32,)).instructions
        waits = re.findall(r"warp_group_dot_wait .*pendings = (\\d+)", loop)
        print(json.dumps({"waits for all but": waits, "instructions": [counted, len(listed)]}))
"""


@pytest.fixture(scope="module")
def products() -> list[dict[str, Any]]:
    """The forward product's tiles of 64 rows and more, compiled to wait for each product."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _PRODUCTS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_product_can_be_waited_for_before_its_operand_is_overwritten(products: list[dict[str, Any]]) -> None:
    """What older Triton needs; this one is asked to do it, too (see `_waits`)."""
    assert len(products) >= 2
    assert all(set(product["waits for all but"]) == {"0"} for product in products), products


def test_instructions_are_counted_without_disassembling(products: list[dict[str, Any]]) -> None:
    for product in products:
        counted, listed = product["instructions"]
        assert counted == listed > 500


def test_products_are_waited_for_where_the_compiler_does_not_order_them() -> None:
    x = torch.empty(0, 64, dtype=torch.bfloat16, device="meta")
    large, small = Tile(64, 32, 128), Tile(32, 32, 128)
    for version, waits in (((3, 6), True), ((3, 8), True), ((3, 9), False), ((4, 0), False)):
        assert _waits(x, large, version) is waits
    assert not _waits(x, small, (3, 6))
    assert _waits(x.float(), large, (3, 6))  # as TF32
    assert not _waits(x.double(), large, (3, 6))
    with compiling_for(TARGETS["sm_100"].device):
        assert not _waits(x, large, (3, 6))


@pytest.mark.nightly
def test_every_target_and_dtype(tmp_path: Path) -> None:
    assert_sound(compiled(tmp_path, ",".join(TARGETS), "bfloat16,float16,float32,float64", "12,32,48"))


def test_unknown_target_is_refused() -> None:
    command = [sys.executable, "-m", "densebench.kernels.compile_report", "--targets", "sm_13"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "sm_13" in done.stderr
    assert "sm_90" in done.stderr


def test_no_jobs_are_refused() -> None:
    command = [sys.executable, "-m", "densebench.kernels.compile_report", "--jobs", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("Traceback")) == (2, 0)
    assert "--jobs 0: give 1 or more" in done.stderr
