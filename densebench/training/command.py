"""All of a training command in turn: images, network, each strategy's epochs, and what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from densebench.counting import counted
from densebench.measure.device import release_memory, tune
from densebench.measure.outcome import is_out_of_memory
from densebench.models import DenseNet, DenseNetConfig, build_model
from densebench.registry import UnsupportedError
from densebench.training.checkpoints import load_checkpoint, save_checkpoint, save_weights
from densebench.training.data import Images, count, load_images
from densebench.training.errors import TrainingError
from densebench.training.loop import Training
from densebench.training.records import EpochRecord, RunFolder, by_strategy, ordered, read_epochs
from densebench.training.settings import Settings, check
from densebench.training.summary import table
from densebench.training.weights import load_weights

Say = Callable[[str], None]


def train(settings: Settings, say: Say) -> str:
    """Train by every strategy asked for; the text for stdout.

    Args:
        settings: as they come from the command line.
        say: takes lines on how far it is.

    Raises:
        TrainingError: for what cannot be done.
        DivergedError: if a loss is no number any more.
        UnsupportedError: if the only strategy cannot run the network here.
    """
    check(settings)
    preset = _preset(settings.model)
    settings = settings.completed(32 if preset.stem == "cifar" else 224)
    assert settings.size is not None
    assert settings.device is not None
    _check_size(settings, preset)
    images = load_images(settings.data, settings.size, preset.in_channels, settings.limit)
    _check_batch(settings, images)
    network = _network(settings, images, preset, say)
    folder = None
    if settings.out is not None:
        folder = RunFolder(Path(settings.out), settings.strategies(), settings.of_the_curve(), settings.resume)
    tune(settings.device)
    records: list[EpochRecord] = []
    failed: dict[str, str] = {}
    names = settings.strategies()
    for name in names:
        try:
            records += _train_by(name, network, images, settings, folder, say)
        except (RuntimeError, MemoryError) as error:
            failed[name] = _reason(error, settings, alone=len(names) == 1)
            say(f"{name}: {failed[name]}")
        if name in failed:  # out of the handler: its traceback holds the network and a step's graph
            release_memory(settings.device)
    if not records:
        raise TrainingError("no strategy could be trained: " + "; ".join(failed.values()))
    return "\n".join([*table(records, failed), *_written(settings.out, by_strategy(records))])


def _preset(model: str) -> DenseNetConfig:
    """What a network is by default, without the time to make its weights."""
    with torch.device("meta"):
        network = build_model(model)
    assert isinstance(network, DenseNet)
    return network.config


def _check_size(settings: Settings, preset: DenseNetConfig) -> None:
    smallest = preset.smallest_input()
    if settings.size is not None and settings.size < smallest:
        raise TrainingError(f"--size {settings.size} is too small for {settings.model}; give {smallest} or more")


def _check_batch(settings: Settings, images: Images) -> None:
    there = count(images.train)
    if settings.batch > there:
        raise TrainingError(f"--batch {settings.batch} is more than all images to train on; give {there} or less")


def _network(settings: Settings, images: Images, preset: DenseNetConfig, say: Say) -> DenseNet:
    """The network that every strategy starts from."""
    if images.channels != preset.in_channels:
        say(f"{settings.model} is built with in_channels={images.channels}, as the images have")
    torch.manual_seed(settings.seed)
    network = build_model(settings.model, num_classes=images.classes, in_channels=images.channels)
    assert isinstance(network, DenseNet)
    if settings.weights is not None:
        note = load_weights(network, settings.weights)
        if note:
            say(note)
    if settings.batch == 1 and _last_map_is_one_pixel(network, images):
        raise TrainingError(
            f"--batch 1 at --size {images.size} leaves batch norms one value a channel; give 2 or more images"
        )
    return network


@torch.no_grad()
def _last_map_is_one_pixel(network: DenseNet, images: Images) -> bool:
    features = network.eval().features(torch.zeros(1, images.channels, images.size, images.size))
    return features.shape[2:].numel() == 1


def _train_by(
    name: str, network: DenseNet, images: Images, settings: Settings, folder: RunFolder | None, say: Say
) -> list[EpochRecord]:
    """The records of one strategy, those of an earlier run among them."""
    training = Training(network, name, images, settings)
    records: list[EpochRecord] = []
    if folder is not None and settings.resume:
        records = _go_on(training, folder.folder, name)
    if training.epochs_done >= settings.epochs:
        say(f"{name}: nothing left to do after {counted(training.epochs_done, 'epoch')}")
        return records
    peak = training.activation_bytes()
    while training.epochs_done < settings.epochs:
        record = training.run_epoch(peak, say)
        records.append(record)
        if folder is not None:
            # The checkpoint last: an epoch that is recorded but not saved is run and recorded again.
            folder.append(record)
            save_weights(training.network, folder.folder, name)
            save_checkpoint(training.state(), folder.folder, name)
        say(
            f"{name}: epoch {record.epoch} of {settings.epochs}, loss {record.train_loss:.4f}, "
            f"test accuracy {100 * record.test_accuracy:.1f} %, {record.seconds:.1f} s"
        )
    return ordered(records)


def _go_on(training: Training, folder: Path, name: str) -> list[EpochRecord]:
    """Bring a training to where an earlier run saved it; the records of the epochs until there."""
    state = load_checkpoint(folder, name)
    if state is None:
        return []
    if state.get("run") != training.run():
        raise TrainingError(
            f"the checkpoint of {name} in {folder} is another run's, or its images have changed; "
            "choose another --out"
        )
    training.load_state(state)
    earlier = by_strategy(read_epochs(folder)).get(name, [])
    return [record for record in earlier if record.epoch <= training.epochs_done]


def _reason(error: Exception, settings: Settings, alone: bool) -> str:
    """Why a strategy is left out where others follow; what is no reason for that is raised again."""
    if isinstance(error, UnsupportedError) and not alone:
        return str(error)
    if isinstance(error, UnsupportedError) or not is_out_of_memory(error):
        raise error
    return f"did not fit in memory; lower --batch (it is {settings.batch}) or --size, or try fused_recompute"


def _written(out: str | None, runs: dict[str, list[EpochRecord]]) -> list[str]:
    if out is None:
        return ["", "nothing is kept; --out FOLDER keeps records, weights and learning curves"]
    folder = Path(out)
    return ["", str(folder / "training.jsonl"), *(str(folder / f"{name}.pt") for name in runs)]
