"""Samples and the README's figures from runs' records: nothing between the markers is written by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from densebench.report.publish import BEGIN, END, main
from tests.report.records import GIB, make_case, timed, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs on two machines, and a README with last year's figures."""
    monkeypatch.chdir(tmp_path)
    for run, device, commit, seconds in (("r1", "machine A", "aaa", 0.08), ("r2", "machine B", "bbb", 0.06)):
        facts = {"device": device, "commit": commit, "packages": {"torch": "2.0"}}
        pair = [("naive", 4 * GIB, 0.1), ("fused", GIB, seconds)]
        records = [timed(make_case(name), size, [took] * 20, environment=facts) for name, size, took in pair]
        write([dataclasses.replace(r, run=run, turns=run) for r in records], tmp_path / f"data/{run}/cases.jsonl")
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nlast year's\n{END}\nafter\n")
    (tmp_path / "samples").mkdir()
    return tmp_path


def publish(*runs: str) -> int:
    return main([*runs, "--samples", "samples"])


def test_figures_of_every_run_stand_between_the_markers(folder: Path) -> None:
    assert publish("data/r1", "data/r2") == 0
    text = (folder / "README.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"\n{END}\nafter\n")
    assert "last year's" not in text
    (sentence,) = [line for line in text.splitlines() if line.startswith("**Training")]
    assert "on machine A" in sentence
    assert "0.25\N{MULTIPLICATION SIGN} the activation memory of naive" in sentence
    assert "in 0.80\N{MULTIPLICATION SIGN} its time (faster)" in sentence
    (line,) = [line for line in text.splitlines() if line.startswith("| Training step") and "| machine B |" in line]
    assert "| 0.25\N{MULTIPLICATION SIGN} | 0.60\N{MULTIPLICATION SIGN} (" in line
    for run, device, commit in (("r1", "machine A", "aaa"), ("r2", "machine B", "bbb")):
        conditions = f"* 2000-01-01, {device}, torch 2.0, commit {commit}; records:"
        assert f"{conditions} [`samples/{run}/cases.jsonl`](samples/{run}/cases.jsonl)." in text
        copied, own = (folder / parent / run / "cases.jsonl" for parent in ("samples", "data"))
        assert copied.read_bytes() == own.read_bytes()
    assert "(samples/answer.svg)" in text
    assert (folder / "samples/answer.svg").is_file()


def test_published_again_from_the_samples_the_figures_are_the_same(folder: Path) -> None:
    publish("data/r1")
    first = (folder / "README.md").read_text()
    assert publish("samples/r1") == 0
    assert (folder / "README.md").read_text() == first


def test_a_run_that_is_not_there_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish("data/r1", "data/r3") == 3
    assert "data/r3/cases.jsonl does not exist" in capsys.readouterr().err
    assert "last year's" in (folder / "README.md").read_text()
    assert not list((folder / "samples").iterdir())
