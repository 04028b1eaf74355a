"""The script that runs everything on a GPU: what it starts, in which order, for how long, and what it keeps.

Here it starts a stand-in for Python that notes its arguments, and one for `timeout` that notes the seconds.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.tile_search import DEAD

PYTHON = """#!/usr/bin/env bash
case "$*" in
    *device_name*) echo "$FAKE_DEVICE" ;;
    *environment*) echo '{}' ;;
    *get_device_capability*) echo 90 ;;
    *pytest* | *tile_search* | *compile_report*)
        echo "$*" >>"$FAKE_NOTES"
        while [ $# -gt 0 ]; do
            case $1 in
                --junitxml) echo '<xml/>' >"$2" ;;
                --densebench-out) echo '{}' >>"$2/cases.jsonl" ;;
            esac
            shift
        done
        head -c "${FAKE_LOG:-10}" /dev/zero
        echo "${FAKE_SAYS:-}"
        [ -n "${FAKE_KILL:-}" ] && kill -TERM "$PPID"
        exit "${FAKE_EXIT:-0}" ;;
esac
"""
TIMEOUT = """#!/usr/bin/env bash
echo "$3" >>"$FAKE_NOTES.seconds"
exec "${@:4}"
"""


OPTIONS = ("PYTHON", "LIMIT", "TOTAL", "WORKERS", "EVIDENCE", "CAP")  # which the script reads


class Campaign:
    """Runs the script with stand-ins; LIMIT is 900 seconds a stage."""

    def __init__(self, repository: Path, folder: Path) -> None:
        self.script = repository / "benchmarks" / "gpu_campaign.sh"
        self.out, self.notes = folder / "out", folder / "notes"
        for name, text in (("python", PYTHON), ("timeout", TIMEOUT)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        # `make test WORKERS=2` hands its variables on.
        outside = {name: value for name, value in os.environ.items() if name not in OPTIONS}
        self.environment = {
            **outside,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
            "FAKE_NOTES": str(self.notes),
            "LIMIT": "900",
        }

    def run(self, *stages: str, device: str = "cuda", **changes: str) -> tuple[list[str], list[int], str]:
        """What pytest was started with, for how many seconds at most, and what was said."""
        for path in (self.notes, Path(f"{self.notes}.seconds")):
            path.write_text("")
        done = subprocess.run(
            [self.script, "--device", device, self.out, *stages],
            env={**self.environment, "FAKE_DEVICE": "Some GPU", **changes},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        seconds = [int(line) for line in Path(f"{self.notes}.seconds").read_text().splitlines()]
        return self.notes.read_text().splitlines(), seconds, done.stdout

    def kept(self) -> set[str]:
        with tarfile.open(self.out / "evidence.tar.gz") as archive:
            return {name.removeprefix("./") for name in archive.getnames()}


@pytest.fixture
def campaign(repository: Path, tmp_path: Path) -> Campaign:
    return Campaign(repository, tmp_path)


def test_correctness_comes_file_by_file(campaign: Campaign) -> None:
    started, seconds, _ = campaign.run("correctness")
    files = ["processes", "operators", "operators", "memory", "graphs", "replays", "replays", "networks"]
    assert [line.split()[2] for line in started[:-1]] == [f"tests/gpu/test_{name}.py" for name in files]
    assert started[-1].split()[2:4] == ["tests", "--ignore=tests/gpu"]
    assert all("-m gpu and not nightly --require-gpu" in line for line in started)
    assert [" -n " in line for line in started] == [True, True, False, False, True, True, False, True, True]
    assert "-k not 2_31" in started[1]
    assert "-k 2_31 or large_buffers" in started[2]
    assert ("-k not host_time" in started[5], "-k host_time" in started[6]) == (True, True)
    assert all(100 < limit < 900 for limit in seconds[:-1])  # none has the time of all
    assert seconds[-1] > 880


def test_every_file_of_gpu_tests_has_its_turn(campaign: Campaign, repository: Path) -> None:
    named = {Path(line.split()[2]).name for line in campaign.run("correctness")[0]}
    there = {file.name for file in (repository / "tests/gpu").glob("test_*.py")}
    assert there - named == {"test_requirements.py"}  # which needs none


def test_what_is_left_has_all_the_time(campaign: Campaign) -> None:
    campaign.run("correctness")
    (campaign.out / "correctness" / "networks.done").unlink()
    started, seconds, said = campaign.run("correctness")
    assert len(started) == 1
    assert seconds[0] > 880
    assert said.count("done before") == 8


def test_what_was_done_on_another_device_is_done_again(campaign: Campaign) -> None:
    assert len(campaign.run("kernels", "compiled")[0]) == 2
    assert campaign.run("kernels", "compiled")[0] == []
    assert len(campaign.run("kernels", "compiled", FAKE_DEVICE="Another GPU")[0]) == 2
    assert (campaign.out / "kernels" / "kernels.done").read_text().strip().endswith("on Another GPU")


@pytest.mark.parametrize(("cores", "workers"), [(2, 2), (8, 4), (16, 12), (64, 12)])
def test_a_process_for_every_core_but_a_few(campaign: Campaign, tmp_path: Path, cores: int, workers: int) -> None:
    (tmp_path / "nproc").write_text(f"#!/usr/bin/env bash\necho {cores}\n")
    (tmp_path / "nproc").chmod(0o755)
    assert f" -n {workers} " in campaign.run("correctness")[0][0]


def test_kernels_of_all_shapes_come_before_those_compiled_for_all(campaign: Campaign) -> None:
    few, every = campaign.run("kernels", "compiled")[0]
    # Into the same folder: what is known is not measured again.
    assert few.split("--densebench-out ")[1] == every.split("--densebench-out ")[1]
    assert "--densebench-profile default" in few
    assert " -k " not in few
    assert "--densebench-profile full" in every
    assert "-k compiled --benchmark-only" in every
    (quick,) = campaign.run("kernels", "compiled", device="cpu", FAKE_DEVICE="a CPU")[0]
    assert "--densebench-profile quick" in quick


def test_tiles_are_searched_for_on_a_gpu(campaign: Campaign) -> None:
    """And on without one that took the device with it."""
    (started,) = campaign.run("tiles")[0]
    assert started == f"-m benchmarks.tile_search {campaign.out}/tiles"
    assert campaign.run("tiles")[0] == []
    assert "tiles: not run" in campaign.run("tiles", device="cpu", FAKE_DEVICE="a CPU")[2]
    again = {"FAKE_DEVICE": "Another GPU", "FAKE_EXIT": "1"}
    assert len(campaign.run("tiles", **again)[0]) == 1
    assert len(campaign.run("tiles", **again, FAKE_SAYS=f"hangs; {DEAD}")[0]) == 3


def test_the_sanitizer_runs_values_alone(campaign: Campaign, tmp_path: Path) -> None:
    (tmp_path / "compute-sanitizer").write_text('#!/usr/bin/env bash\nexec "${@:7}"\n')
    (tmp_path / "compute-sanitizer").chmod(0o755)
    ahead, *started = campaign.run("sanitizer")[0]
    seconds = campaign.run("sanitizer", FAKE_DEVICE="Another GPU")[1]
    assert len(set(started)) == 1
    assert len(started) == 3
    assert started[0].split()[2] == "tests/gpu/test_operators.py"
    assert ahead.split(" -k ")[1].split(" -n ")[0] == started[0].split(" -k ")[1]  # the same, to compile
    assert all(limit <= 300 for limit in seconds)


def test_another_machine_compiles_anew(campaign: Campaign) -> None:
    """What is done says nothing of its caches; nor does a target that is unknown fail the stage."""
    campaign.run("networks")
    assert "networks/compiling.log" in campaign.kept()
    assert "networks/compiling.done" not in campaign.kept()
    (started,) = campaign.run("networks")[0]
    assert "compile_report" in started
    assert "networks: ok" in campaign.run("networks", FAKE_EXIT="1")[2]


def test_no_predictions_are_made_on_the_gpu(campaign: Campaign) -> None:
    (ahead, *started), seconds, _ = campaign.run("networks")
    assert ahead.split()[1:4] == ["densebench.kernels.compile_report", "--targets", "sm_90"]
    selections = [line.split(" -k ")[1].split(" --benchmark-only")[0] for line in started]
    assert selections[-1] == "(test_step or test_memory) and not test_predicted"
    assert selections[-2] == "test_step and compiled"
    assert all(selection.startswith("test_step") for selection in selections[:-1])
    assert "and not (compiled or graph)" in selections[0]
    assert all(limit <= 600 for limit in seconds)  # one that hangs leaves time for others


def test_after_a_lost_device_the_others_have_their_turn(campaign: Campaign) -> None:
    """Three processes at most: a case that ends one is not tried again in the next."""
    words = "nothing more can run on it"
    assert words in (campaign.script.parent / "conftest.py").read_text()  # who says them when a device is lost
    campaign.environment["FAKE_SAYS"] = f"crash: no more CUDA; {words}"
    started, _, said = campaign.run("kernels", FAKE_EXIT="1")
    assert len(started) == 3
    assert len(set(started)) == 1
    assert "kernels: FAILED" in said
    assert {"kernels/kernels.1.log", "kernels/kernels.2.log", "kernels/kernels.3.log"} <= campaign.kept()
    campaign.environment["FAKE_SAYS"] = "another error"
    assert len(campaign.run("kernels", FAKE_EXIT="1")[0]) == 1


def test_all_stages_together_end_in_time(campaign: Campaign) -> None:
    _, seconds, said = campaign.run("correctness", "kernels", TOTAL="100")
    assert seconds
    assert all(limit <= 100 for limit in seconds)
    started, _, said = campaign.run("networks", "kernels", TOTAL="10", FAKE_DEVICE="Another GPU")
    assert started == []
    assert said.count("unfinished, run it again") == 2


def test_evidence_goes_where_it_is_wanted(campaign: Campaign, tmp_path: Path) -> None:
    campaign.run("kernels", EVIDENCE=str(tmp_path / "new" / "kept.tar.gz"))
    assert not (campaign.out / "evidence.tar.gz").exists()
    with tarfile.open(tmp_path / "new" / "kept.tar.gz") as archive:
        assert "./kernels/cases.jsonl" in archive.getnames()


def test_one_archive_holds_what_is_worth_keeping(campaign: Campaign) -> None:
    campaign.run("correctness", "kernels")
    assert {
        "summary.txt",
        "kernels/cases.jsonl",
        "kernels/kernels.log",
        "correctness/large-buffers.xml",
    } < campaign.kept()
    assert {"correctness/environment.json", "correctness/large-buffers.done"} < campaign.kept()
    campaign.run("networks", FAKE_LOG="2000000", FAKE_EXIT="1")
    kept = campaign.kept()
    assert "networks/cases.jsonl" in kept  # also when the stage failed
    assert not any(name.startswith("networks/") and name.endswith(".log") for name in kept)


def test_what_was_done_is_not_repeated_where_the_archive_is_unpacked(campaign: Campaign, tmp_path: Path) -> None:
    campaign.run("correctness", "kernels")
    first, campaign.out = campaign.out, tmp_path / "fresh"
    campaign.out.mkdir()
    subprocess.run(["tar", "-xzf", first / "evidence.tar.gz", "-C", campaign.out], check=True)
    started, _, said = campaign.run("correctness", "kernels")
    assert started == []
    assert said.count("done before") == 10


def test_an_interrupted_campaign_leaves_its_archive(campaign: Campaign) -> None:
    started, _, said = campaign.run("kernels", "networks", FAKE_KILL="1")
    assert len(started) == 1
    assert "page:" not in said  # it ended there
    assert "kernels/cases.jsonl" in campaign.kept()
