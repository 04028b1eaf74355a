"""The table of `python -m densebench.train`: what each strategy learned, and in how much memory."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from densebench.capacities import MIB
from densebench.training.records import EpochRecord, by_strategy

WIDTH = 80
CROSS = "\N{MULTIPLICATION SIGN}"
_MOST_EPOCHS = 6  # whose losses are compared one by one
_COLUMNS = "{:<18}{:>12}{:>10}{:>12}{:>9}{:>11}{:>8}"


def table(records: Sequence[EpochRecord], failed: Mapping[str, str]) -> list[str]:
    """The lines for stdout, at most 80 columns wide.

    Args:
        records: of one run; at least one.
        failed: by strategy, why it was not trained.
    """
    runs = by_strategy(records)
    lines = [*(line for words in conditions(records[0]) for line in _wrapped(words)), ""]
    heads = ("strategy", "activations", "images/s", "train loss", "accuracy", "test loss", "acc.")
    lines.append(_COLUMNS.format(*heads))
    lines += [_row(run[-1]) for run in runs.values()]
    for name, reason in failed.items():
        lines += _wrapped(f"{name}: {reason}")
    lines += ["", *_notes(records)]
    return lines + (_wrapped(_apart(runs)) if len(runs) > 1 else [])


def spread(runs: Mapping[str, Sequence[EpochRecord]], epoch: int, step: int) -> float | None:
    """How far the losses of some runs lie apart at a step of an epoch; None if fewer than two got there."""
    losses = [r.step_losses[step] for run in runs.values() for r in run if r.epoch == epoch]
    return max(losses) - min(losses) if len(losses) > 1 else None


def conditions(first: EpochRecord) -> tuple[str, str]:
    """What was trained on what, and how: all that a learning curve depends on, in words."""
    options, images = first.options, first.images
    shape = CROSS.join(map(str, images["shape"]))
    counts = (
        f"{images['train']:,} to train and {images['test']:,} to test on, {images['classes']} classes, {shape}"
    )
    optimizer = f"{options['optimizer']} lr {options['lr']:g}"
    optimizer += f" momentum {options['momentum']:g}" if options["momentum"] else ""
    optimizer += f" weight decay {options['weight_decay']:g}" if options["weight_decay"] is not None else ""
    start = options["weights"] or f"seed {options['seed']}"
    setting = f"batch {options['batch']}, {optimizer}, {_precision(first)}, from {start}"
    return f"{options['model']} on {images['source']}: {counts}", f"{setting}, on {first.environment['device']}"


def _row(last: EpochRecord) -> str:
    test_loss = "-" if last.test_loss is None else f"{last.test_loss:.4f}"
    return _COLUMNS.format(
        last.strategy,
        f"{last.peak_delta_bytes / MIB:,.1f} MiB",
        f"{last.images_per_s:,.1f}",
        f"{last.train_loss:.4f}",
        f"{100 * last.train_accuracy:.1f} %",
        test_loss,
        f"{100 * last.test_accuracy:.1f} %",
    )


def _notes(records: Sequence[EpochRecord]) -> list[str]:
    epochs = {run[-1].epoch for run in by_strategy(records).values()}
    after = " or ".join(map(str, sorted(epochs)))
    notes = (
        f"after epoch {after}; train: over that epoch's steps; test: after it",
        "activations: peak of a step beyond parameters, gradients, buffers and images",
        "images/s: of that epoch alone, loading included; no benchmark, which is pytest benchmarks/",
    )
    return [line for note in notes for line in _wrapped(note)]


def _apart(runs: Mapping[str, Sequence[EpochRecord]]) -> str:
    last = max(record.epoch for run in runs.values() for record in run)
    epochs = list(range(1, last + 1))
    if last > _MOST_EPOCHS:
        epochs = [*epochs[: _MOST_EPOCHS - 1], last]
    found = [("at the first step", spread(runs, 1, 0))]
    found += [(f"at the end of epoch {epoch}", spread(runs, epoch, -1)) for epoch in epochs]
    words = ", ".join(f"{value:.1e} {where}" for where, value in found if value is not None)
    words = words.replace("0.0e+00 ", "0 ")
    precision = _precision(next(iter(runs.values()))[0])
    return (
        f"The losses lie apart by {words}. The strategies compute the same in another order, and {precision} "
        "rounds: training drifts apart by that, as two runs of naive on two machines do."
    )


def _precision(record: EpochRecord) -> str:
    return record.options["autocast"] or "float32"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
