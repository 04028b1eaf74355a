"""What a run appends is on the disk, damage costs what is damaged, and the latest of a case counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from densebench.records import Timeline
from densebench.store import RunStore, StoreError, latest, read_records, to_frame
from tests.measure.cases import small_case, small_record, small_timing


def test_a_damaged_file_gives_one_line_and_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(tmp_path)
    store.append(small_record(seed=1))
    with store.path.open("ab") as file:
        file.write(b'{"case": \n\xff\xfe\x00\n\n')
    store.append(small_record(seed=2))
    assert [record.seed for record in store.read()] == [1, 2]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "line 2: not JSON" in told[0]
    assert "(and 1 more line)" in told[0]


def test_a_torn_last_line_costs_itself_alone(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.append(small_record(seed=1))
    whole = store.path.read_bytes()
    for cut in range(1, len(whole), 97):
        store.path.write_bytes(whole + whole[:-cut])
        again = RunStore(tmp_path)
        again.append(small_record(seed=3))
        assert [record.seed for record in again.read()] in ([1, 3], [1, 1, 3]), cut


def test_append_stamps_run_and_time(tmp_path: Path) -> None:
    record = RunStore(tmp_path / "some-run").append(small_record())
    assert record.run == "some-run"
    assert record.created.endswith("+00:00")


def test_a_full_disk_is_told_and_leaves_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RunStore(tmp_path)
    store.append(small_record(seed=1))
    before = store.path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device.*densebench-resume"):
        store.append(small_record(seed=2))
    assert store.path.read_bytes() == before  # the part that was written is taken back


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full(tmp_path: Path) -> None:
    (tmp_path / "cases.jsonl").symlink_to("/dev/full")
    with pytest.raises(StoreError, match="No space left"):
        RunStore(tmp_path).append(small_record())


def test_a_folder_that_cannot_be_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(StoreError, match=r"cannot write results to .*file.*--densebench-out"):
            RunStore(folder)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(StoreError, match="Permission denied"):
        RunStore(tmp_path / "run")


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = RunStore(tmp_path), RunStore(tmp_path)
    first.claim()
    with pytest.raises(StoreError, match="another run is writing"):
        second.claim()
    first.release()
    second.claim()
    second.release()


def test_the_latest_of_a_case_counts() -> None:
    other = small_case("checkpointed")
    records = [small_record(seed=1), small_record(case=other, seed=2), small_record(seed=3)]
    assert [record.seed for record in latest(records)] == [3, 2]


def test_a_time_outlives_an_attempt_that_came_to_none() -> None:
    here, elsewhere = {"source": "a"}, {"source": "b"}
    timed = small_record(seed=1, time_s=small_timing(), environment=here)
    for status in ("ok", "noisy", "oom", "crash", "skipped"):
        cut_short = small_record(seed=2, status=status, environment=here)
        assert latest([timed, cut_short]) == [timed]
        assert latest([cut_short, timed]) == [timed]
    for later in (
        small_record(seed=2, environment=elsewhere),  # other code
        small_record(seed=2, status="incorrect", environment=here),
        small_record(seed=2, time_s=small_timing(), environment=here),
    ):
        assert latest([timed, later]) == [later]


@pytest.mark.parametrize("fact", ["cpu_kernels", "python", "compilers", "assembler", "source", "flags"])
def test_a_time_of_other_code_does_not_outlive_what_was_measured_later(fact: str) -> None:
    """As of compiled C beside PyTorch's operators: a report would show one as the other."""
    timed = small_record(seed=1, time_s=small_timing(), environment={"device": "here", fact: "one"})
    later = small_record(seed=2, status="oom", environment={"device": "here", fact: "another"})
    assert latest([timed, later]) == [later]


def test_a_frame_has_a_column_for_every_field() -> None:
    timeline = Timeline((0, 1), {"activations": (1, 2)}, 1)
    frame = to_frame([small_record(time_s=small_timing(), timeline=timeline)])
    assert len(frame) == 1
    assert {"case.model", "time_s.median", "peak_delta_bytes", "timeline.forward_end"} <= set(frame.columns)


def test_reading_does_not_change_a_file(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(small_record().to_json().encode() + b"\n{torn")
    before = path.read_bytes()
    assert len(read_records([path])) == 1
    assert path.read_bytes() == before
