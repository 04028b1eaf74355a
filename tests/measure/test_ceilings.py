"""The machine's copy bandwidth and matrix rate, as a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from densebench.measure import ceilings


def test_ceilings_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(ceilings, "_CPU_COPY_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "_CPU_MATMUL_SIDE", 64)
    ceilings.measure_ceilings.cache_clear()
    out = tmp_path / "new" / "ceilings.json"
    assert ceilings.main(["--device", "cpu", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written == json.loads(capsys.readouterr().out)
    assert written["environment"]["cpu"]
    assert set(written["ceilings"]) == {"float32"}
    assert all(0 < rate < 1e6 for rate in written["ceilings"]["float32"].values())
    ceilings.measure_ceilings.cache_clear()
