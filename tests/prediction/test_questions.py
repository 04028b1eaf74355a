"""Bad questions get one sentence with the remedy; sizes are read as written; answers are kept."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densebench
from densebench import predict
from densebench.prediction import Prediction, PredictionError, cache, command, networks
from densebench.prediction.gpus import get_gpu, list_gpus
from densebench.prediction.sizes import parse_size, size_note
from densebench.records import Case, Record
from densebench.source_code import hash_of
from tests.report.records import timing_of

SMALL = ["densenet_d2l", "--size", "64", "--strategy", "naive"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("24 gib", 24 * 2**30),
        ("0.5GiB", 2**29),
        ("512MiB", 2**29),
        ("1000", 1000),
        (4096, 4096),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


def test_size_note_shows_the_difference() -> None:
    assert size_note("24GB") == "24GB = 22.35 GiB"
    assert size_note("24GiB") is None


@pytest.mark.parametrize("text", ["24Gx", "", "lots", "-3GiB", "GiB", "0GiB", 0])
def test_sizes_that_are_none(text: str | int) -> None:
    with pytest.raises(ValueError, match="24GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("densenet12", (1, 3, 224, 224)), "known: densenet121"),
        (("densenet121", (0, 3, 224, 224)), "batch of 0"),
        (("densenet121", (2, 3, 0, 224)), "every size must be 1 or more"),
        (("densenet121", (4, 3, 10**9, 10**9)), "more values than any memory"),
        (("densenet121", (10**20, 3, 224, 224)), "more values than any memory"),
        (("densenet121", (2, 3, 64, 64), "foo"), "known: naive"),
        (("densenet121", (2, 3, 64, 64), "naive", "sleep"), "known: train, forward, infer"),
    ],
)
def test_values_that_are_none(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        densebench.predict_memory(*arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (((2, 3, 64, 64), "densenet121"), r"model=\(2, 3, 64, 64\) is no network; .* module, then input_shape"),
        (((2, 3, 8, 8), nn.Conv2d(3, 4, 3)), r"model=\(2, 3, 8, 8\) is no network"),
        ((nn.Conv2d, (2, 3, 8, 8)), "model=<class .*> is no network"),
        (("densenet121", "naive", (2, 3, 64, 64)), r"input_shape='naive' is no shape; .*\[N, C, H, W\]"),
        (("densenet121", 64, (3, 64, 64)), "input_shape=64 is no shape; give batch and image in one"),
        (("densenet121", torch.ones(2, 3, 64, 64)), r"input_shape=Tensor\(\.\.\.\) is no shape"),
        ((nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)), r"input_shape=Conv2d\(\.\.\.\) is no shape"),
        (("densenet121", [[0] * 99, 1]), r"input_shape=\[\[0, 0, .*\.\.\. is no shape"),
        (("densenet121", (3, 64, 64), 64), r"strategy=64 is no name of .*\(\); the batch is the first"),
    ],
)
def test_arguments_in_another_order_are_named(arguments: tuple[Any, ...], said: str) -> None:
    """The one that is wrong, in one line, and what it should be."""
    with pytest.raises(ValueError, match=f"^{said}") as caught:
        densebench.predict_memory(*arguments)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"optimizer": "magic"}, "known: sgd"),
        ({"dtype": "int8"}, "known: fp32"),
        ({"gpu": "Voodoo2"}, "known: H200"),
        ({"device": "tpu"}, "known: cuda, cpu"),
        ({"device_memory": "24"}, None),
        ({"memory_format": "diagonal"}, "known: channels_last"),
    ],
)
def test_options_that_are_none(option: dict[str, Any], named: str | None) -> None:
    if named is None:
        assert densebench.predict_memory("densenet_d2l", (2, 1, 64, 64), **option).largest_batch == 0
        return
    with pytest.raises(ValueError, match=named):
        densebench.predict_memory("densenet_d2l", (2, 1, 64, 64), **option)


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ((2, 3, 16, 16), "too small"),
        ((1, 3, 32, 32), "more than 1 value per channel"),
        ((2, 1, 32, 32, 32, 32), "must be"),
    ],
)
def test_a_network_that_cannot_run_that_input(shape: tuple[int, ...], named: str) -> None:
    """Its own error, with the shape."""
    with pytest.raises(PredictionError, match=named) as caught:
        densebench.predict_memory("densenet121", shape)
    assert str(list(shape)) in str(caught.value)


def test_a_name_is_built_for_the_shape() -> None:
    """Of any channels, and for volumes."""
    volumes = densebench.densenet121(spatial_dims=3, in_channels=1)
    of_module = densebench.predict_memory(volumes, (2, 1, 32, 32, 32), "naive", memory_format="channels_last")
    of_name = densebench.predict_memory("densenet121", (2, 1, 32, 32, 32))
    assert of_name.peak_bytes == of_module.peak_bytes
    assert densebench.predict_memory("densenet121", (2, 4, 64, 64)).peak_bytes > 0


@pytest.mark.parametrize("name", ["naive", "fused"])
def test_autocast_of_volumes_is_the_devices(name: str) -> None:
    """On a CPU it pools in float32, on a GPU in 16 bits: half of the maps' bytes."""
    shape = (2, 1, 64, 64, 64)
    half, whole = (
        densebench.predict_memory("densenet121", shape, name, autocast=autocast).activation_bytes
        for autocast in ("bfloat16", None)
    )
    assert half < 0.65 * whole
    on_cpu = densebench.predict_memory("densenet121", shape, name, autocast="bfloat16", device="cpu")
    assert on_cpu.activation_bytes > 1.1 * half


class _Calls(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.function = [function]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function[0](self.conv(x))
        return result


def test_an_operator_without_fake_implementation() -> None:
    library = torch.library.Library("densebench_test_prediction", "DEF")
    library.define("odd(Tensor x) -> Tensor")
    library.impl("odd", lambda x: x.clone(), "CPU")
    model = _Calls(torch.ops.densebench_test_prediction.odd)
    with pytest.raises(PredictionError, match=r"densebench_test_prediction\W+odd.*register_fake"):
        densebench.predict_memory(model, (2, 3, 8, 8), mode="infer")


def test_a_network_that_branches_on_values() -> None:
    model = _Calls(lambda x: x if x.sum() > 0 else -x)
    with pytest.raises(PredictionError, match="branches on values"):
        densebench.predict_memory(model, (2, 3, 8, 8))


class UnsupportedError(RuntimeError):
    """Somebody else's of that name."""


@pytest.mark.parametrize("ours", [False, True])
def test_only_a_refusal_of_ours_is_passed_on(ours: bool) -> None:
    """It names the remedy itself; what a network raises is explained."""

    def refuse(x: Tensor) -> Tensor:
        raise (densebench.UnsupportedError if ours else UnsupportedError)("no")

    with pytest.raises(densebench.UnsupportedError if ours else PredictionError, match="no"):
        densebench.predict_memory(_Calls(refuse), (2, 3, 8, 8))


def test_neither_predictions_nor_reports_reach_into_what_measures() -> None:
    """Data flows one way: what measures uses predictions, and a report reads records."""
    code = (
        "import importlib, pkgutil, sys\n"
        "for room in ('densebench.prediction', 'densebench.report'):\n"
        "    for module in pkgutil.iter_modules(importlib.import_module(room).__path__):\n"
        "        importlib.import_module(f'{room}.{module.name}')\n"
        "print([name for name in sys.modules if name.startswith('densebench.measure')])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("name", list_gpus())
def test_rates_of_gpus_are_in_the_ratio_of_their_tensor_cores(name: str) -> None:
    """TF32 takes two passes of 16 bits (data sheets round); before Ampere there is none, and float32 counts."""
    gpu = get_gpu(name)
    if gpu.capability >= (8, 0):
        assert gpu.half == pytest.approx(2 * gpu.tf32, rel=0.02)
    else:
        assert gpu.tf32 == gpu.single
    assert gpu.half > gpu.tf32 >= gpu.single >= gpu.double


def test_nothing_to_train() -> None:
    with pytest.raises(PredictionError, match="mode='infer'"):
        densebench.predict_memory(_Calls(lambda x: x.detach()), (2, 3, 8, 8))


def test_a_module_is_not_run_by_a_strategy_it_cannot_have() -> None:
    with pytest.raises(ValueError, match="contains no dense block of densebench"):
        densebench.predict_memory(nn.Conv2d(3, 4, 3), (2, 3, 8, 8), "fused")


def test_answers_are_kept(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    first = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "checkpointed")
    assert len(list(own_cache.iterdir())) == 1

    def no_trace(*arguments: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr("densebench.prediction.predictor.trace_network", no_trace)
    assert densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "checkpointed") == first
    monkeypatch.setattr(cache, "versions", lambda: {"sources": "another"})
    with pytest.raises(AssertionError, match="traced again"):
        densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "checkpointed")


def test_an_answer_depends_on_the_sources_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.versions()["sources"]
    monkeypatch.setattr(cache, "package_files", lambda: {Path(__file__)})
    assert cache.versions.__wrapped__()["sources"] == hash_of([Path(__file__)]) != before


def test_a_damaged_or_forbidden_cache_costs_time_only(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64))
    for path in own_cache.iterdir():
        path.write_text("{torn")
    assert densebench.predict_memory("densenet_d2l", (4, 1, 64, 64)) == first
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert densebench.predict_memory("densenet_d2l", (4, 1, 64, 64)) == first


def test_predictions_survive_json() -> None:
    prediction = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64))
    assert Prediction.from_dict(json.loads(json.dumps(prediction.to_dict()))) == prediction
    with pytest.raises(dataclasses.FrozenInstanceError):
        prediction.peak_bytes = 0  # type: ignore[misc]


def test_printed_it_is_a_few_lines() -> None:
    prediction = densebench.predict_memory("densenet_d2l", (4, 1, 64, 64), "fused", device_memory="24GiB")
    lines = str(prediction).splitlines()
    assert lines[0] == "densenet_d2l with fused, train 4x1x64x64, on cuda: predicted"
    assert lines[1].split()[0] == f"{prediction.peak_bytes / 2**20:,.1f}"
    counts = {line.split()[2]: float(line.split()[0].replace(",", "")) for line in lines[2:-2]}
    assert counts == {name: round(c / 2**20, 1) for name, c in prediction.breakdown.items() if c}
    assert list(counts.values()) == sorted(counts.values(), reverse=True)
    assert lines[-2].endswith(f"on {prediction.gpu} by its roofline")
    left = "of which 0.5 GiB are left to the driver"
    assert lines[-1] == f"fits in 24.00 GiB, {left}; largest batch: {prediction.largest_batch:,}"
    assert "largest batch" not in str(replace(prediction, device_memory=None))


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([*SMALL[:3], "--memory", "2GB", "--optimizer", "adamw"]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    for name in densebench.list_strategies():
        assert sum(line.startswith(name + " ") and "yes" in line for line in lines) == 1
    assert "2GB = 1.86 GiB" in shown.out
    assert "tracing" in shown.err
    assert "tracing" not in shown.out


def _timed(strategy: str, seconds: float, **changes: Any) -> Record:
    case = Case("step", "densenet121", strategy, "train", 8, (3, 224, 224), memory_format="channels_last")
    timing = timing_of([seconds] * 3)
    return Record(replace(case, **changes), "ok", run="one", group="g", time_s=timing)


def test_times_are_measured_ones_of_the_network() -> None:
    """Over naive in its faster format; volumes are another network, whose times images do not tell."""
    records = [_timed("naive", 1.0), _timed("naive", 2.0, memory_format="contiguous"), _timed("fused", 0.7)]
    images, volumes = (
        {name: densebench.predict_memory("densenet121", shape, name) for name in ("naive", "fused")}
        for shape in ((2, 3, 64, 64), (2, 1, 32, 32, 32))
    )
    times, source = command.relative_times(images, records)
    assert (times, source) == ({"naive": 1.0, "fused": 0.7}, "measured on cpu at batch 8, float32")
    assert command.relative_times(images, records[::-1])[0] == times
    times, source = command.relative_times(volumes, records)
    assert source.startswith("not measured: rooflines")
    of_volumes = [replace(record, case=replace(record.case, input_shape=(1, 64, 64, 64))) for record in records]
    assert command.relative_times(volumes, of_volumes)[0] == {"naive": 1.0, "fused": 0.7}


def test_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["densenet121", "--spatial-dims", "3", "--size", "32", "--batch", "2", "--strategy", "fused"]
    assert predict.main(arguments) == 0
    assert "train 2x1x32x32x32" in capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict.main([*SMALL, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["predictions"]["naive"]["peak_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["densenet12"], "unknown model"),
        ([*SMALL, "--memory", "24Gx"], "24GiB"),
        (["densenet_d2l", "--batch", "0"], "--batch 1"),
        (["densenet121", "--strategy", "foo"], "known: all, naive"),
        (["densenet121", "--size", "20", "--strategy", "naive"], "too small"),
        ([*SMALL, "--autocast", "int8"], "unknown dtype"),
        ([*SMALL, "--channels", "0"], "give --channels 1 or more"),
        (["resnet50", "--spatial-dims", "3", "--strategy", "naive"], "resnet50 cannot run an input of [64, 1, 96"),
    ],
)
def test_bad_questions_end_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    errors = [line for line in shown.err.splitlines() if not line.startswith("  tracing")]
    assert len(errors) == 1
    assert named in errors[0]


def test_help_does_not_import_torch() -> None:
    """Importing torch takes seconds; help is to come at once."""
    code = "import sys, densebench.predict as p; p.parser().format_help(); sys.exit('torch' in sys.modules)"
    start = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert time.perf_counter() - start < 5  # a tenth of a second on a quiet machine


def test_models_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    networks._named.cache_clear()
    built: list[str] = []
    build = networks.build_model

    def counted(name: str, **options: Any) -> nn.Module:
        built.append(name)
        return build(name, **options)

    monkeypatch.setattr(networks, "build_model", counted)
    for strategy in densebench.list_strategies():
        densebench.predict_memory("densenet_d2l", (2, 1, 64, 64), strategy)
    assert built == ["densenet_d2l"]
