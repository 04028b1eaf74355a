"""Reports of synthetic runs, made once a session: what the command wrote, and what it was made from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from densebench.records import Record
from densebench.report.__main__ import main
from tests.report import records as synthetic


@dataclass(frozen=True)
class Made:
    """A report on disk and the records in it."""

    folder: Path
    records: list[Record]

    @property
    def page(self) -> str:
        return (self.folder / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Everything a report can hold, and a strategy that nobody has registered."""
    stranger = synthetic.make_case("brand_new", batch=128)
    records = [
        *synthetic.gpu_run(),
        synthetic.timed(stranger, 3 * synthetic.GIB, [0.15] * 20, "train densenet121 128"),
    ]
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "kernels.json").write_text(json.dumps(synthetic.CODE), encoding="utf-8")
    return _make(records, folder)


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return _make(synthetic.cpu_run(), tmp_path_factory.mktemp("cpu"))


@pytest.fixture(params=["gpu", "cpu"])
def made(request: pytest.FixtureRequest) -> Made:
    found: Made = request.getfixturevalue(request.param)
    return found


def _make(records: list[Record], folder: Path) -> Made:
    path = synthetic.write(records, folder / "cases.jsonl")
    assert main([str(path.parent), "--out", str(folder / "out")]) == 0
    return Made(folder / "out", records)
