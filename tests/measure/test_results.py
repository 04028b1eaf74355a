"""A record survives the trip to the disk, and a damaged file costs what is damaged."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import typing
from pathlib import Path
from typing import Any

import pytest

from densebench.results import (
    SCHEMA,
    STATUSES,
    Case,
    Record,
    RecordError,
    RunStore,
    StoreError,
    Timeline,
    Timing,
    latest,
    read_records,
    to_frame,
)
from tests.measure.cases import small_case, small_record, small_timing
from tests.properties import given, settings, st

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
BY_FIELD = {"status": st.sampled_from(STATUSES), "schema": st.just(SCHEMA)}


def values_of(kind: Any, name: str = "") -> st.SearchStrategy[Any]:
    """Any value of a field of the schema, found by its type: a new field is tested with no test edited."""
    if name in BY_FIELD:
        return BY_FIELD[name]
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return st.builds(kind, **{f.name: values_of(hints[f.name], f.name) for f in dataclasses.fields(kind)})
    arguments = typing.get_args(kind)
    if type(None) in arguments:
        return st.none() | values_of(arguments[0], name)
    if typing.get_origin(kind) is tuple:
        return st.lists(values_of(arguments[0]), max_size=4).map(tuple)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(TEXTS, JSON if arguments[1] is Any else values_of(arguments[1]), max_size=3)
    return {int: st.integers(), float: NUMBERS, str: TEXTS, bool: st.booleans()}[kind]


@settings(max_examples=150, deadline=None)
@given(values_of(Record))
def test_every_field_survives(record: Record) -> None:
    assert Record.from_json(record.to_json()) == record
    assert "\n" not in record.to_json()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_of_a_line_is_told_or_read_whole(data: st.DataObject) -> None:
    line = small_record(time_s=small_timing()).to_json()
    cut = data.draw(st.integers(0, len(line) - 1))
    with pytest.raises(RecordError):
        Record.from_json(line[:cut])


@settings(max_examples=150, deadline=None)
@given(field=st.sampled_from([f.name for f in dataclasses.fields(Record)]), value=JSON)
def test_a_wrong_value_is_told_or_harmless(field: str, value: Any) -> None:
    """Whatever stands in a field, reading it gives a record that can be written again, or a RecordError."""
    data = {**json.loads(small_record(time_s=small_timing()).to_json()), field: value}
    try:
        record = Record.from_json(json.dumps(data))
    except RecordError:
        return
    assert Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_record_holds_nan(value: float, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        store.append(small_record(compile_s=value))
    assert store.path.read_bytes() == b""
    line = json.dumps({**json.loads(small_record().to_json()), "compile_s": value})
    with pytest.raises(RecordError, match="which is no JSON"):
        Record.from_json(line)


DAMAGED = {
    "empty object": ("{}", "has no case"),
    "a list": ("[1]", "has no case"),
    "no JSON": ("not json", "not JSON"),
    "binary": ("\x00\x01\x02", "not JSON"),
    "newer": (json.dumps({"case": {}, "schema": SCHEMA + 1}), "newer than"),
    "no schema": (json.dumps({"case": {}}), "schema is None"),
    "case is text": (json.dumps({"case": "x", "status": "ok", "schema": 1}), "not an object"),
    "case lacks fields": (json.dumps({"case": {"kind": "step"}, "status": "ok", "schema": 1}), "lacks model"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_told_by_name(name: str) -> None:
    line, message = DAMAGED[name]
    with pytest.raises(RecordError, match=message):
        Record.from_json(line)


def test_an_unknown_status_is_told() -> None:
    line = small_record().to_json().replace('"status": "ok"', '"status": "splendid"')
    with pytest.raises(RecordError, match="unknown status 'splendid'"):
        Record.from_json(line)


def test_wrong_types_are_told() -> None:
    data = json.loads(small_record().to_json())
    for field, value, wanted in [
        ("peak_allocated_bytes", "12", "an integer"),
        ("peak_allocated_bytes", True, "an integer"),
        ("compile_s", "1.5", "a number"),
        ("throttled", 1, "true or false"),
        ("reason", 5, "a text"),
        ("clock_event_reasons", "SwPowerCap", "a list"),
        ("environment", [], "an object"),
    ]:
        with pytest.raises(RecordError, match=f"{field} is .*not {wanted}"):
            Record.from_json(json.dumps({**data, field: value}))


@pytest.mark.parametrize("schema", [0, 1])
def test_older_records_are_read(schema: int) -> None:
    """Fields that they lack are unknown; fields that no longer exist are left out."""
    data = json.loads(small_record(peak_delta_bytes=5).to_json())
    old = {key: data[key] for key in ("case", "status", "peak_delta_bytes")}
    record = Record.from_json(json.dumps({**old, "schema": schema, "long_gone": 7}))
    assert (record.peak_delta_bytes, record.time_s, record.environment) == (5, None, {})


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


def test_a_key_is_that_of_the_case_alone() -> None:
    case = small_case()
    assert case.key() == small_case().key() == Record.from_json(small_record().to_json()).case.key()
    for field in dataclasses.fields(Case):
        changed = dataclasses.replace(case, **{field.name: {"x": 1} if field.name == "options" else "other"})
        assert changed.key() != case.key(), field.name


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


def test_timing_keeps_what_it_was_given() -> None:
    timing = small_timing()
    assert isinstance(timing, Timing)
    assert timing.samples == (0.1, 0.2, 0.3)
