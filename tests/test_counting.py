"""One is one thing, wherever something is counted in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from densebench.counting import counted
from densebench.measure.environment import device_name
from densebench.prediction import predict_memory
from densebench.prediction.command import advice
from densebench.report.__main__ import main
from tests.report.records import GIB, make_case, power_law, timed, write

PLURAL_OF_ONE = re.compile(r"(?<![\d.,])1 (?:\w+ )?(?:case|image|layer|record|setting|stage|thread|warp)s\b")


def test_counts() -> None:
    numbers = [0, 1, 2, 1024]
    assert [counted(n, "image") for n in numbers] == ["0 images", "1 image", "2 images", "1,024 images"]


@pytest.mark.parametrize(("threads", "words"), [(1, "(1 thread)"), (2, "(2 threads)")])
def test_threads(threads: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert device_name(torch.device("cpu")).endswith(words)


def test_a_report_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One setting, one case that was predicted, too, one layer; then a report of a single record."""
    naive = timed(make_case(), GIB, [0.1] * 20, predicted_peak_bytes=GIB)
    records = [naive, timed(make_case("fused"), GIB // 2, [0.2] * 20)]
    records += [power_law("naive", depth) for depth in (1, 1000)]
    for name, shown in (("several", records), ("one", [naive])):
        write(shown, tmp_path / name / "cases.jsonl")
        assert main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 0
        page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
        assert PLURAL_OF_ONE.findall(page) == []
        assert "Both predicted and measured: 1 case on 1 GPU" in page
        if name == "several":
            assert "In 1 of 1 compared setting naive fits" in page
            assert "1 layer, " in page
            assert "1,000 layers, " in page
            assert "N layers" in page, "the glossary knows both"
    assert "Made by DenseBench from 1 record." in page
    assert "densebench: 1 record, drawing" in capsys.readouterr().err


def test_one_image_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # kept answers of the tests are nobody's
    naive = predict_memory("densenet_d2l", (1, 1, 64, 64), mode="infer", device="cpu")
    memory = naive.peak_bytes + 1
    fitting = predict_memory("densenet_d2l", (1, 1, 64, 64), mode="infer", device="cpu", device_memory=memory)
    assert advice({"naive": fitting}, {}) == "naive fits, and up to 1 image would."


def test_samples_have_no_plural_of_one() -> None:
    samples = Path(__file__).resolve().parents[1] / "reports" / "samples" / "kernels.json"
    assert PLURAL_OF_ONE.findall(samples.read_text(encoding="utf-8")) == []
