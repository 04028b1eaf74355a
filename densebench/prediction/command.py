"""The answer of `python -m densebench.predict`: a table of strategies, and one line of advice."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import densebench
from densebench.capacities import GIB
from densebench.counting import counted
from densebench.models import list_models
from densebench.models.config import DenseNetConfig
from densebench.prediction.gpus import get_gpu
from densebench.prediction.prediction import Prediction
from densebench.prediction.predictor import as_dtype, predict_memory
from densebench.prediction.sizes import parse_size, size_note
from densebench.records import Record
from densebench.registry import UnsupportedError, list_strategies
from densebench.store import read_records

WIDTH = 80
_SMALL_IMAGES = ("densenet_bc", "densenet_cifar")


def answer(options: argparse.Namespace, progress: Callable[[str], None]) -> str:
    """The text for stdout; the options are those of `densebench.predict.parser`.

    Raises:
        ValueError, PredictionError, UnsupportedError: see `predict_memory`.
    """
    _check(options)
    names = list_strategies() if options.strategy == "all" else [options.strategy]
    if options.strategy == "all" and not options.model.startswith("densenet"):
        names = ["naive"]  # a ResNet has no dense block to run in another way
    found: dict[str, Prediction] = {}
    refused: dict[str, str] = {}
    for name in names:
        try:
            found[name] = _predict(options, name, progress)
        except UnsupportedError as error:
            if len(names) == 1:
                raise
            refused[name] = str(error)
    times, source = relative_times(found, _records())
    if options.json:
        data = {name: prediction.to_dict() for name, prediction in found.items()}
        facts = {"relative_times": times, "relative_times_source": source, "unsupported": refused}
        return json.dumps({"predictions": data, **facts}, indent=2)
    note = None if options.memory is None else size_note(options.memory)
    return "\n".join(table(found, refused, times, source, note))


def _check(options: argparse.Namespace) -> None:
    """What can be said at once, before a trace of seconds."""
    if options.model not in list_models():
        raise ValueError(f"unknown model {options.model!r}; known: {', '.join(list_models())}")
    if options.strategy not in ("all", *list_strategies()):
        raise ValueError(f"unknown strategy {options.strategy!r}; known: all, {', '.join(list_strategies())}")
    if options.batch < 1:
        raise ValueError(f"a batch of {options.batch} has nothing to predict; give --batch 1 or more")
    if options.size is not None and options.size < 1:
        raise ValueError(f"an image of {options.size} pixels a side; give --size 1 or more")
    if options.channels is not None and options.channels < 1:
        raise ValueError(f"an image of {options.channels} channels; give --channels 1 or more")
    if options.memory is not None:
        parse_size(options.memory)
    get_gpu(options.gpu)
    as_dtype(options.dtype)
    as_dtype(options.autocast)


def _predict(options: argparse.Namespace, strategy: str, progress: Callable[[str], None]) -> Prediction:
    return predict_memory(
        options.model,
        (options.batch, *_image(options)),
        strategy,
        options.mode,
        dtype=options.dtype,
        autocast=options.autocast,
        optimizer=options.optimizer,
        device_memory=options.memory,
        device=options.device,
        gpu=options.gpu,
        progress=progress,
    )


def _image(options: argparse.Namespace) -> tuple[int, ...]:
    """The shape of one image, [C, H, W], or of a volume, [C, D, H, W]."""
    volume = options.spatial_dims == 3
    size = options.size or (32 if options.model in _SMALL_IMAGES else 96 if volume else 224)
    gray = volume or options.model == "densenet_d2l"
    channels = options.channels or (1 if gray else DenseNetConfig.in_channels)
    return (channels, *(size,) * options.spatial_dims)


def table(
    found: Mapping[str, Prediction],
    refused: Mapping[str, str],
    times: Mapping[str, float],
    source: str,
    note: str | None,
) -> list[str]:
    """The lines of the table, at most 80 columns wide.

    Args:
        found, refused: by strategy, what is predicted, or why it cannot run this network.
        times: relative to naive; `source` says where they come from.
        note: on the size as it was written.
    """
    first = next(iter(found.values()))
    memory = first.device_memory
    asked = replace(first, strategy=None, dtype=first.dtype or "float32")
    lines = [*_wrapped(f"{asked.question}: predicted"), ""]
    columns = "{:<18}{:>12}{:>12}{:>10}{:>14}{:>12}"
    head = ("fits", "largest batch") if memory else ("", "")
    lines.append(columns.format("strategy", "peak GiB", "activations", *head, "time"))
    for name, p in found.items():
        fits = "" if p.fits is None else ("yes" if p.fits else "no")
        largest = "" if p.largest_batch is None else f"{p.largest_batch:,}"
        time = f"{times[name]:.2f} x" if name in times else ""
        peak, activations = f"{p.peak_bytes / GIB:.2f}", f"{p.activation_bytes / GIB:.2f}"
        lines.append(columns.format(name, peak, activations, fits, largest, time).rstrip())
    lines += [_short(f"{name}: {reason}") for name, reason in refused.items()]
    lines += ["", *_notes(first, source, note)]
    lines += [] if memory is None else _wrapped(advice(found, times))
    return lines


def advice(found: Mapping[str, Prediction], times: Mapping[str, float]) -> str:
    """Which strategy to take: the fastest that fits, or the one that fits most where none does."""
    first = next(iter(found.values()))
    batch = first.input_shape[0]
    fitting = [name for name, p in found.items() if p.fits]
    most = max(found, key=lambda name: found[name].largest_batch or 0)
    if not fitting:
        largest = found[most].largest_batch
        if not largest:
            return "Nothing fits, not even one image: take a smaller image or network, or a larger card."
        return f"A batch of {batch} does not fit; {most} fits {largest:,}, the most of all."
    best = min(fitting, key=lambda name: (times.get(name, float("inf")), -(found[name].largest_batch or 0)))
    if len(found) == 1:
        return f"{best} fits, and up to {counted(found[best].largest_batch or 0, 'image')} would."
    naive = found.get("naive")
    if best == "naive" or naive is None:
        more = "" if most == best else f" ({most} would fit {counted(found[most].largest_batch or 0, 'image')})"
        return f"{best} fits and is the fastest: take it{more}."
    if not naive.largest_batch:
        return f"{best} fits where naive fits not one image; take it."
    ratio = (found[best].largest_batch or 0) / naive.largest_batch
    return f"{best} fits {ratio:.1f} x the batch of naive; take it."


def relative_times(found: Mapping[str, Prediction], records: Sequence[Record]) -> tuple[dict[str, float], str]:
    """Times over naive's, measured where there are records of the network, else of rooflines; and which."""
    first = next(iter(found.values()), None)
    if first is None:
        return {}, ""
    measured = _measured(first, records)
    if measured is not None:
        return {name: ratio for name, ratio in measured[0].items() if name in found}, measured[1]
    naive = found.get("naive")
    if naive is None or naive.roofline_s == 0:
        return {}, "naive is not among the strategies, so there is nothing to relate times to"
    times = {name: p.roofline_s / naive.roofline_s for name, p in found.items()}
    return times, f"not measured: rooflines of bytes and FLOPs on {first.gpu}, {naive.roofline_s:.3g} s for naive"


def _measured(first: Prediction, records: Sequence[Record]) -> tuple[dict[str, float], str] | None:
    """Ratios of the group of records (one run, timed in turns) that is nearest to the question.

    Images say nothing of volumes, whose 3x3x3 convolutions take most of the time. Of naive in both memory formats
    the faster counts, as everywhere.
    """
    asked_for = (first.model, first.mode, len(first.input_shape))
    groups: dict[tuple[str, str | None], dict[str, Record]] = {}
    for record in records:
        case = record.case
        if case.kind != "step" or (case.model, case.mode, 1 + len(case.input_shape)) != asked_for:
            continue
        group = groups.setdefault((record.run, record.group), {})
        if record.time_s is not None and record.time_s.median < _median(group.get(case.strategy)):
            group[case.strategy] = record

    def nearness(group: dict[str, Record]) -> tuple[object, ...]:
        case, asked = group["naive"].case, first.autocast or first.dtype
        lacking = len([name for name in list_strategies() if name not in group])
        return (
            case.device != first.device,
            lacking,
            (case.autocast or case.dtype) != asked,
            abs(case.batch - first.input_shape[0]),
        )

    usable = [group for group in groups.values() if "naive" in group and len(group) > 1]
    if not usable:
        return None
    best = min(usable, key=nearness)
    naive = best["naive"]
    assert naive.time_s is not None
    times = {name: r.time_s.median / naive.time_s.median for name, r in best.items() if r.time_s is not None}
    device = naive.environment.get("device", naive.case.device)
    return times, f"measured on {device} at batch {naive.case.batch}, {naive.case.autocast or naive.case.dtype}"


def _median(record: Record | None) -> float:
    return math.inf if record is None or record.time_s is None else record.time_s.median


def _records() -> list[Record]:
    """All records under reports/data/, of the checkout this package lies in and of the working folder."""
    roots = {Path(densebench.__file__).resolve().parents[1], Path.cwd()}
    return read_records(sorted(p for root in roots for p in (root / "reports" / "data").glob("*/cases.jsonl")))


def _notes(first: Prediction, source: str, note: str | None) -> list[str]:
    lines = _wrapped(f"time: relative to naive's; {source}")
    if first.device_memory is not None:
        text = f"memory: {first.device_memory / GIB:.2f} GiB" + (f" ({note})" if note else "")
        if first.reserved_bytes:
            text += f", of which {first.reserved_bytes / GIB:.1f} GiB are left to the driver"
        lines += _wrapped(text)
    if first.device == "cuda":
        lines += _wrapped(
            f"peak: with cuBLAS's workspaces on {first.gpu}; cuDNN's are not known. Not validated on a GPU."
        )
    return lines


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)


def _short(text: str) -> str:
    return text if len(text) <= WIDTH else text[: WIDTH - 3] + "..."
