"""A record survives as a line of JSON, and a line that is none is told."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from densebench.records import SCHEMA, STATUSES, Case, Record, RecordError, Timing
from densebench.store import RunStore
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


def test_half_a_character_is_replaced_and_whole_ones_stay() -> None:
    """Python reads bytes of a file's name that are no text as halves of characters, which no file can hold."""
    facts = {"argv": ["caf\udce9.py", "\N{GRINNING FACE}"]}
    record = Record.from_json(dataclasses.replace(small_record(), environment=facts).to_json())
    assert record.environment == {"argv": ["caf?.py", "\N{GRINNING FACE}"]}


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
    old["case"]["compiled"] = None  # as the samples have it
    record = Record.from_json(json.dumps({**old, "schema": schema, "long_gone": 7}))
    assert (record.peak_delta_bytes, record.time_s, record.environment) == (5, None, {})
    assert record.case.key() == small_case().key(), "a resumed run would measure it again"


def test_a_key_is_that_of_the_case_alone() -> None:
    case = small_case()
    assert case.key() == small_case().key() == Record.from_json(small_record().to_json()).case.key()
    for field in dataclasses.fields(Case):
        changed = dataclasses.replace(case, **{field.name: {"x": 1} if field.name == "options" else "other"})
        assert changed.key() != case.key(), field.name


def test_timing_keeps_what_it_was_given() -> None:
    timing = small_timing()
    assert isinstance(timing, Timing)
    assert timing.samples == (0.1, 0.2, 0.3)
