"""The command: every form of data, the same curve by every strategy, weights, memory, and what is written."""

from __future__ import annotations

import dataclasses
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from densebench.measure.environment import environment
from densebench.measure.memory import measure_peak
from densebench.models import build_model
from densebench.records import Case
from densebench.registry import UnsupportedError, list_strategies
from densebench.training import command as command_module
from densebench.training import loop
from densebench.training.data import Images
from densebench.training.loop import Training
from densebench.training.records import read_epochs
from densebench.training.settings import Settings
from densebench.workload import build_workload
from tests.training.conftest import (
    Command,
    losses,
    needs_torchvision,
    only,
    write_cifar,
    write_class_folders,
    write_idx_folder,
)

pytestmark = needs_torchvision()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("idx", "MNIST-format images"),
        ("folders", "tested on val/"),
        ("cifar", "CIFAR-10"),
        ("random", "synthetic: their accuracy means nothing"),
    ],
)
def test_every_form_of_data(
    form: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    data: Any = "random"
    if form == "idx":
        data = write_idx_folder(tmp_path / "d")
    elif form == "folders":
        data = write_class_folders(tmp_path / "d")
    elif form == "cifar":
        data = write_cifar(tmp_path / "d", monkeypatch)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, out, err = command(data, "--limit", 16)
    assert code == 0
    assert said in " ".join(out.split())
    assert re.search(r"^fused +[\d.]+ MiB +[\d,.]+ +\d\.\d{4} +[\d.]+ % +\d+\.\d{4} +[\d.]+ %$", out, re.MULTILINE)
    assert ("in_channels=3, as the images have" in err) == (form in ("folders", "cifar"))
    assert all(len(line) <= 80 for line in out.splitlines())
    assert sorted(tmp_path.iterdir()) == before  # nothing is written without --out


class Doubles(Dataset[Any]):
    """Gray images in float64."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(images, 1, 32, 32, generator=generator, dtype=torch.float64)
        self.labels = torch.arange(images) % 3

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


DOUBLES = Images(Doubles(22), Doubles(6), 3, 1, 32, "noise")
SETTINGS = Settings(
    data="noise", model="densenet_d2l", strategy="fused", weights=None, epochs=2, batch=4, size=32,
    optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=None, autocast=None, device="cpu", seed=7, limit=None,
    workers=0, out=None, resume=False,
)  # fmt: skip


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("densenet_d2l", num_classes=3).double()


def expected_epochs(epochs: int) -> list[tuple[list[float], int]]:
    """What plain PyTorch makes of naive: the loss of each step, and how many images were recognized, by epoch."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    data: Any = DOUBLES.train
    for epoch in range(1, epochs + 1):
        order = loop._order(22, 7, epoch)
        steps, right = [], 0
        for batch in (order[at : at + 4] for at in range(0, 20, 4)):
            outputs = model(data.images[batch])
            loss = F.cross_entropy(outputs, data.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
            right += int((outputs.argmax(1) == data.labels[batch]).sum())
        found.append((steps, right))
    return found


def test_the_curve_in_float64_is_that_of_plain_pytorch(every_strategy: str) -> None:
    training = Training(network(), every_strategy, DOUBLES, SETTINGS)
    records = [training.run_epoch(1, lambda line: None) for _ in range(2)]
    for record, (steps, right) in zip(records, expected_epochs(2), strict=True):
        assert record.step_losses == pytest.approx(steps, rel=1e-9)
        assert record.train_loss == pytest.approx(sum(steps) / 5)
        assert record.train_accuracy == right / 20


def test_accuracies_and_test_losses_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(network(), "naive", DOUBLES, SETTINGS)
    loss, accuracy = training._test()
    outputs = training.network.eval()(DOUBLES.test.images)  # type: ignore[attr-defined]
    labels = DOUBLES.test.labels  # type: ignore[attr-defined]
    assert loss == pytest.approx(F.cross_entropy(outputs, labels).item())
    assert accuracy == pytest.approx((outputs.argmax(1) == labels).double().mean().item())
    monkeypatch.setattr(Training, "_step", lambda *_: (1.0, 3))
    monkeypatch.setattr(Training, "_test", lambda *_: (float("inf"), 0.5))
    record = training.run_epoch(1, lambda line: None)
    assert (record.train_accuracy, record.test_loss) == (0.75, None)


def test_each_epoch_has_an_order_of_its_own() -> None:
    orders = [tuple(loop._order(50, seed, epoch)) for seed in (0, 1) for epoch in (1, 2)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_all_strategies_start_alike(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "run"
    code, said, _ = command(idx_folder, "--strategy", "all", "--lr", 0.001, "--epochs", 2, "--out", out)
    assert code == 0
    found = losses(out)
    assert [name for name, epoch in found if epoch == 1] == list_strategies()
    for (_, epoch), steps in found.items():
        assert steps == pytest.approx(found["naive", epoch], rel=1e-3)
    firsts = [found[name, 1][0] for name in list_strategies()]
    assert firsts == pytest.approx([firsts[0]] * len(firsts), rel=1e-6)
    words = " ".join(said.split())
    apart = {epoch: [steps for (_, e), steps in found.items() if e == epoch] for epoch in (1, 2)}
    for steps, where in ((0, "at the first step"), (-1, "at the end of epoch 1")):
        values = [losses[steps] for losses in apart[1]]
        assert f"{max(values) - min(values):.1e} {where}".replace("0.0e+00", "0") in words
    assert "at the end of epoch 2" in words
    assert "float32 rounds" in words


def test_a_record_an_epoch(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    assert command(idx_folder, "--strategy", "naive,fused", "--epochs", 2, "--out", tmp_path / "run")[0] == 0
    lines = (tmp_path / "run" / "training.jsonl").read_text().splitlines()
    found = [(record["strategy"], record["epoch"]) for record in map(json.loads, lines)]
    assert found == [("naive", 1), ("naive", 2), ("fused", 1), ("fused", 2)]
    first = read_epochs(tmp_path / "run")[0]
    assert len(first.step_losses) == 3
    assert first.images == {
        "source": f"MNIST-format images in {idx_folder}",
        "train": 24, "test": 9, "classes": 3, "shape": [1, 32, 32],
    }  # fmt: skip
    assert first.environment == json.loads(json.dumps(environment("cpu")))
    assert first.options["lr"] == 0.1
    assert first.options["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert first.images_per_s == pytest.approx(24 / first.seconds)


def test_weights_are_plain(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    command(idx_folder, "--strategy", "naive", "--out", tmp_path)
    state = torch.load(tmp_path / "naive.pt", weights_only=True)
    model = build_model("densenet_d2l", num_classes=3)
    assert list(state) == list(model.state_dict())
    assert all(tensor.is_contiguous() for tensor in state.values())
    model.load_state_dict(state)
    record = only(tmp_path)
    code, _, _ = command(idx_folder, "--weights", tmp_path / "naive.pt", "--lr", 1e-9, "--out", tmp_path / "b")
    assert code == 0
    assert only(tmp_path / "b").step_losses != record.step_losses
    # The running statistics move, the weights do not.
    again = torch.load(tmp_path / "b" / "fused.pt", weights_only=True)
    torch.testing.assert_close(again["features.conv0.weight"], state["features.conv0.weight"])


def test_activation_memory_is_the_measure_rooms(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    assert command(idx_folder, "--strategy", "naive,fused_recompute", "--out", tmp_path)[0] == 0
    peaks = {}
    for record in read_epochs(tmp_path):
        case = Case(
            "step", "densenet_d2l", record.strategy, "train", 8, (1, 32, 32), memory_format="channels_last",
            options={"num_classes": 3}, device=record.options["device"],
        )  # fmt: skip
        device = torch.device(case.device)
        peaks[record.strategy] = record.peak_delta_bytes
        measured = measure_peak(lambda case=case: build_workload(case), device).peak_delta_bytes  # type: ignore[misc]
        assert record.peak_delta_bytes == pytest.approx(measured, rel=0.01)
    assert peaks["fused_recompute"] < 0.8 * peaks["naive"]


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4}, torch.optim.SGD, (0.1, 0.9, 1e-4)),
        ({"optimizer": "adam", "lr": 0.5}, torch.optim.Adam, (0.5, None, 0)),
        ({"optimizer": "adamw", "lr": None}, torch.optim.AdamW, (1e-3, None, 1e-2)),
    ],
)
def test_optimizers(options: dict[str, Any], kind: type, expected: tuple[Any, ...]) -> None:
    settings = dataclasses.replace(SETTINGS, **options).completed(32)
    optimizer = Training(network(), "naive", DOUBLES, settings).optimizer
    assert type(optimizer) is kind
    defaults = optimizer.defaults
    assert (defaults["lr"], defaults.get("momentum"), defaults["weight_decay"]) == expected


def test_mixed_precision(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    for name, options in (("plain", []), ("mixed", ["--autocast", "bf16"])):
        assert command(idx_folder, "--lr", 0.01, *options, "--out", tmp_path / name)[0] == 0
    plain, mixed = only(tmp_path / "plain").step_losses, only(tmp_path / "mixed").step_losses
    assert plain[0] != mixed[0]
    assert plain[0] == pytest.approx(mixed[0], rel=0.05)
    for autocast, scaled in ((None, False), ("bf16", False), ("fp16", True)):
        training = Training(network(), "naive", DOUBLES, dataclasses.replace(SETTINGS, autocast=autocast))
        assert training.scaler.is_enabled() == scaled


def test_out_of_memory_is_a_result(idx_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Training.activation_bytes

    living: list[weakref.ref[Training]] = []
    released: list[bool] = []

    def too_much(self: Training) -> int:
        if self.strategy == "naive":
            living.append(weakref.ref(self))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self)

    monkeypatch.setattr(Training, "activation_bytes", too_much)
    monkeypatch.setattr(command_module, "release_memory", lambda _: released.append(living[-1]() is None))
    code, out, err = command(idx_folder, "--strategy", "naive,fused")
    assert code == 0
    assert "naive: did not fit in memory; lower --batch (it is 8)" in " ".join(out.split())
    assert re.search(r"^fused .*MiB", out, re.MULTILINE)
    assert released == [True], "memory is released while the failed network is still held"
    code, out, err = command(idx_folder, "--strategy", "naive")
    assert (code, out) == (2, "")
    assert "no strategy could be trained: did not fit in memory" in err


def test_what_cannot_run_here_is_named(
    idx_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = loop.set_strategy

    def picky(model: nn.Module, name: str) -> nn.Module:
        if name == "fused":
            raise UnsupportedError("strategy 'fused' cannot run denseblock1: no compiler")
        return plain(model, name)

    monkeypatch.setattr(loop, "set_strategy", picky)
    code, out, _ = command(idx_folder, "--strategy", "naive,fused")
    assert code == 0
    assert "fused: strategy 'fused' cannot run denseblock1: no compiler" in out
    code, out, err = command(idx_folder, "--strategy", "fused")
    assert (code, out) == (2, "")
    assert err == "densebench.train: strategy 'fused' cannot run denseblock1: no compiler\n"


def test_other_errors_are_not_swallowed(
    idx_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Training) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Training, "activation_bytes", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        command(idx_folder, "--strategy", "naive,fused")


def test_long_epochs_say_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_LINES", 0.0)
    said: list[str] = []
    Training(network(), "naive", DOUBLES, SETTINGS).run_epoch(1, said.append)
    assert [line.split(", loss")[0] for line in said][-1] == "naive: epoch 1, step 5 of 5"


def test_small_images_are_the_default_of_small_networks() -> None:
    sizes = {name: command_module._preset(name).stem for name in ("densenet_bc", "densenet121")}
    assert sizes == {"densenet_bc": "cifar", "densenet121": "imagenet"}


def test_processes_that_read_images(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    for workers in (0, 2):
        assert command(idx_folder, "--workers", workers, "--out", tmp_path / str(workers))[0] == 0
    assert losses(tmp_path / "0") == losses(tmp_path / "2")
