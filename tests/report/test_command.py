"""The command line: exit codes, where records come from, and one line for what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from densebench.records import Record
from densebench.report.__main__ import main
from densebench.report.report import make_report, notice
from densebench.report.sources import Loaded, load
from tests.report.records import CODE, GIB, make_case, timed, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _two(run: str = "synthetic") -> list[Record]:
    pair = [timed(make_case(name), GIB, [0.1] * 20) for name in ("naive", "fused")]
    return [dataclasses.replace(record, run=run) for record in pair]


def _status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom densebench.report.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'matplotlib', 'numpy', 'pandas', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "exit status: 0 fine, 1 regression, 2 usage, 3 no results" in done.stdout


def test_no_results_is_3_with_the_command_that_makes_some(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 3
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "pytest benchmarks/ --benchmark-only" in output.err
    (folder / "run").mkdir()
    assert main(["run"]) == 3
    write([], folder / "run" / "cases.jsonl")
    assert main(["run"]) == 3
    assert not list(folder.rglob("index.html"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["missing"],
        ["--compare", "missing", "missing"],
        ["--fail-on", "mem:2%"],
        ["--no-such-option"],
        ["--compare", "one"],
    ],
)
def test_usage_is_2_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert _status(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("python -m densebench.report: ")


def test_unwritable_output_is_found_before_any_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "taken").write_text("a file, not a folder")
    assert main(["--out", "taken"]) == 2, "before it looks for records, of which there are none"
    error = capsys.readouterr().err
    assert "cannot write to taken" in error
    assert "--out" in error


def test_newest_run_is_shown_and_output_goes_where_it_belongs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(_two("old"), folder / "reports/data/20250101-000000-cpu-quick/cases.jsonl")
    write(_two("new"), folder / "reports/data/20260101-000000-cpu-quick/cases.jsonl")
    write([], folder / "reports/data/20270101-000000-cpu-quick/cases.jsonl")
    assert main([]) == 0
    output = capsys.readouterr()
    assert "reports/index.html" in output.out
    assert "x naive's time" in output.out
    assert max(map(len, output.out.splitlines()[1:5])) <= 80
    assert "drawing" in output.err
    assert "\x1b" not in output.out + output.err
    page = (folder / "reports/index.html").read_text(encoding="utf-8")
    assert '<th scope="col">new</th>' in page
    assert "old</th>" not in page
    assert 'class="notice"' not in page


def test_samples_are_called_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(_two("sampled"), folder / "reports/samples/one/cases.jsonl")
    assert main([]) == 0
    words = "These are sample records, not yours: measured on Synthetic GPU on 2000-01-01 at commit 0000000000"
    page = (folder / "reports/index.html").read_text(encoding="utf-8")
    assert page.index(words) < page.index('id="answer"')
    assert words in capsys.readouterr().out
    assert words in (folder / "reports/summary.md").read_text(encoding="utf-8")


def test_several_samples_are_counted_and_told_apart_further_down(folder: Path) -> None:
    for run in ("20250101-a", "20260101-b"):
        write(_two(run), folder / "reports/samples" / run / "cases.jsonl")
    assert main([]) == 0
    page = (folder / "reports/index.html").read_text(encoding="utf-8")
    words = "These are sample records, not yours: 2 runs on 1 machine, 2000-01-01, each told under Environment. "
    assert page.index(words) < page.index('id="answer"')
    runs = page[page.index('id="environment"') :]
    assert runs.index("20260101-b") < runs.index("20250101-a") < runs.index("Everything known of each run")
    assert "0000000000 with changes not committed" in runs


def test_of_samples_the_newest_is_the_answer(folder: Path) -> None:
    for run in ("20250101-old", "20260101-new", "20240101-older"):
        write(_two(run), folder / "reports/samples" / run / "cases.jsonl")
    runs = [record.run for record in load().records]
    assert list(dict.fromkeys(runs)) == ["20260101-new", "20250101-old", "20240101-older"]


def test_published_runs_are_shown_with_everything_else(folder: Path) -> None:
    write(_two("gpu"), folder / "reports/published/gpu/cases.jsonl")
    published = load()
    assert "These are published records" in (notice(published) or "")
    write(_two("mine"), folder / "reports/data/1/cases.jsonl")
    both = load()
    assert {record.run for record in both.records} == {"gpu", "mine"}
    assert notice(both) is None


def test_machine_code_comes_from_beside_the_records_or_the_samples(folder: Path) -> None:
    write(_two(), folder / "reports/data/1/cases.jsonl")
    assert load().code == []
    (folder / "reports/samples").mkdir()
    (folder / "reports/samples/kernels.json").write_text(json.dumps(CODE))
    assert load().code == CODE
    (folder / "reports/data/1/kernels.json").write_text("{}")
    assert load().code == CODE, "what is damaged is left out"


def test_damaged_lines_are_left_out_and_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    naive, fused = _two()
    older = json.loads(naive.to_json())
    for field in ("energy_j", "unavailable", "shared_gpu"):
        del older[field]
    newer = json.loads(fused.to_json()) | {"schema": 99}
    torn = fused.to_json()[:200]
    lines = [json.dumps(older), "not json", json.dumps(newer), fused.to_json(), torn]
    path = folder / "run" / "cases.jsonl"
    path.parent.mkdir()
    path.write_text("\n".join(lines), encoding="utf-8")
    assert main(["run", "--out", "out"]) == 0
    errors = capsys.readouterr().err
    assert "line 2" in errors
    assert "2 more lines" in errors
    assert len((folder / "out/summary.csv").read_text().splitlines()) == 3


def test_a_case_measured_again_replaces_its_older_self(folder: Path) -> None:
    naive, fused = _two()
    path = write([naive, dataclasses.replace(naive, peak_delta_bytes=7), fused], folder / "cases.jsonl")
    records = load([path]).records
    assert sorted(record.peak_delta_bytes or 0 for record in records) == [7, GIB]


def test_records_of_another_environment_are_left_out_aloud(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same cases; how to see them is said, and works. The same environment again is no other."""
    naive, fused = _two()
    other = {**naive.environment, "device": "Synthetic GPU 2", "commit": "1" * 40}
    older = [dataclasses.replace(naive, environment=other, peak_delta_bytes=size) for size in (3 * GIB, 5 * GIB)]
    again = dataclasses.replace(naive, environment={**naive.environment, "argv": ["again"], "dirty": False})
    write([*older, naive, fused, again], folder / "run" / "cases.jsonl")
    assert main(["run", "--out", "out"]) == 0
    words = (
        "Left out: older records of 1 case (measured on Synthetic GPU 2 on 2000-01-01 at commit 1111111111), in "
        "whose place later ones from another machine or other code are shown; to see them, copy their lines to a "
        "file of their own and give that file to python -m densebench.report"
    )
    page = (folder / "out/index.html").read_text(encoding="utf-8")
    assert page.index(words) < page.index('id="answer"')
    assert words in capsys.readouterr().out.splitlines()
    assert words in (folder / "out/summary.md").read_text(encoding="utf-8")
    shown = load([write(older, folder / "older.jsonl")])
    assert [record.peak_delta_bytes for record in shown.records] == [5 * GIB]
    assert notice(shown) is None
    assert notice(load([write([naive, fused, again], folder / "same.jsonl")])) is None


def test_what_is_left_out_of_samples_is_said_beside_that_they_are_samples(folder: Path) -> None:
    naive, _ = _two("sampled")
    other = dataclasses.replace(naive, environment={**naive.environment, "source": "other"})
    write([other, naive], folder / "reports/samples/one/cases.jsonl")
    assert re.match(r"Left out: .*report\. These are sample records, not yours: ", notice(load()) or "")


def test_records_of_failures_alone_make_a_page() -> None:
    from tests.report.records import make_record

    failed = [make_record(make_case(name), "error", reason="it broke") for name in ("naive", "fused")]
    report = make_report(Loaded(failed))
    assert report.picture is None
    assert "No" in report.answer.sentence


def test_a_closed_pipe_is_no_traceback(folder: Path) -> None:
    write(_two(), folder / "cases.jsonl")
    command = f"{sys.executable} -m densebench.report --compare cases.jsonl cases.jsonl | true"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, env=environment)
    assert "Traceback" not in done.stderr
