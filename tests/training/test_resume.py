"""A run that was cut short goes on as if it had not been."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from densebench.training import command as command_module
from densebench.training.checkpoints import save_weights
from densebench.training.errors import TrainingError
from densebench.training.loop import Training
from densebench.training.records import FILE, RunFolder, read_epochs
from tests.training.conftest import Command, losses, needs_torchvision

pytestmark = needs_torchvision()
OPTIMIZERS = {
    "sgd": ["--momentum", 0.9, "--lr", 0.01, "--strategy", "naive,fused"],
    "adam": ["--optimizer", "adam", "--strategy", "fused"],
}


def same_files(one: Path, other: Path) -> bool:
    states = [torch.load(folder / "fused.pt", weights_only=True) for folder in (one, other)]
    return all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_is_uninterrupted(optimizer: str, idx_folder: Path, tmp_path: Path, command: Command) -> None:
    options = [idx_folder, *OPTIMIZERS[optimizer]]
    assert command(*options, "--epochs", 3, "--out", tmp_path / "whole")[0] == 0
    assert command(*options, "--epochs", 1, "--out", tmp_path / "parts")[0] == 0
    code, out, _ = command(*options, "--epochs", 3, "--out", tmp_path / "parts", "--resume")
    assert code == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert parts == whole
    assert len(parts) == (6 if optimizer == "sgd" else 3)
    assert same_files(tmp_path / "whole", tmp_path / "parts")
    if optimizer == "sgd":
        assert "at the end of epoch 1," in " ".join(out.split())  # the table knows the earlier epochs


def test_an_epoch_that_was_recorded_but_not_saved_is_run_again(
    idx_folder: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "run"
    assert command(idx_folder, "--out", out)[0] == 0
    shutil.copy(out / "fused.checkpoint", tmp_path / "first")
    assert command(idx_folder, "--out", out, "--epochs", 2, "--resume")[0] == 0
    whole = losses(out)
    shutil.copy(tmp_path / "first", out / "fused.checkpoint")
    with (out / "training.jsonl").open("a") as file:
        file.write('{"strategy": "fused", "epo')  # killed in the middle of a line
    assert command(idx_folder, "--out", out, "--epochs", 2, "--resume")[0] == 0
    assert losses(out) == whole
    assert [record.epoch for record in read_epochs(out)] == [1, 2]
    assert len((out / "training.jsonl").read_text().splitlines()) == 4


def test_nothing_is_left_to_do(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    assert command(idx_folder, "--out", tmp_path)[0] == 0
    before = (tmp_path / "training.jsonl").read_text()
    code, out, err = command(idx_folder, "--out", tmp_path, "--resume")
    assert code == 0
    assert "fused: nothing left to do after 1 epoch\n" in err
    assert "fused" in out
    assert (tmp_path / "training.jsonl").read_text() == before


def test_another_strategy_may_join(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    assert command(idx_folder, "--strategy", "naive", "--out", tmp_path)[0] == 0
    code, out, _ = command(idx_folder, "--strategy", "naive,fused", "--out", tmp_path, "--resume")
    assert code == 0
    assert set(losses(tmp_path)) == {("naive", 1), ("fused", 1)}
    assert "The losses lie apart by" in out


def test_another_run_is_not_gone_on_with(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    assert command(idx_folder, "--out", tmp_path)[0] == 0
    before = (tmp_path / "training.jsonl").read_text()
    code, _, err = command(idx_folder, "--out", tmp_path)
    assert code == 2
    assert err == f"densebench.train: {tmp_path} holds a run; go on with it by --resume, or choose another --out\n"
    for option, value in (("--lr", 0.05), ("--weight-decay", 0.1), ("--seed", 3)):
        code, _, err = command(idx_folder, "--out", tmp_path, "--resume", option, value)
        assert code == 2
        assert f"--resume: {option} is {value} and was " in err
    assert (tmp_path / "training.jsonl").read_text() == before


def test_a_broken_checkpoint_is_named(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    assert command(idx_folder, "--out", tmp_path)[0] == 0
    path = tmp_path / "fused.checkpoint"
    path.write_bytes(path.read_bytes()[:5000])
    code, _, err = command(idx_folder, "--out", tmp_path, "--resume", "--epochs", 2)
    assert code == 2
    assert f"cannot read {path}" in err
    assert "delete it" in err


def test_interrupted_runs_keep_finished_epochs(
    idx_folder: Path, tmp_path: Path, drawing_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [idx_folder, "--epochs", 3, "--out", tmp_path / "run"]
    plain = Training._step

    def interrupted(self: Training, *batch: torch.Tensor) -> tuple[float, int]:
        if self.epochs_done == 1:
            raise KeyboardInterrupt
        return plain(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_step", interrupted)
        code, out, err = drawing_command(*options)
    assert code == 130
    assert err.endswith(f"interrupted; finished epochs are kept in {tmp_path / 'run'}, and --resume goes on\n")
    assert set(losses(tmp_path / "run")) == {("fused", 1)}
    assert out == f"{tmp_path / 'run' / 'curves.svg'}\n"
    assert drawing_command(*options, "--resume")[0] == 0
    assert len(losses(tmp_path / "run")) == 3


@pytest.mark.parametrize("name", ["append", "save_weights", "save_checkpoint"])
def test_interrupted_after_an_epoch(
    name: str, idx_folder: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is missing of record, weights and checkpoint, the epoch is run again: nothing has a hole."""
    owner: Any = RunFolder if name == "append" else command_module
    plain = getattr(owner, name)
    calls: list[Any] = []

    def interrupted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        plain(*arguments)

    options = [idx_folder, "--epochs", 2]
    assert command(*options, "--out", tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert command(*options, "--out", tmp_path / "run")[0] == 130
    assert command(*options, "--out", tmp_path / "run", "--resume")[0] == 0
    assert [record.epoch for record in read_epochs(tmp_path / "run")] == [1, 2]
    whole, resumed = (torch.load(tmp_path / run / "fused.pt") for run in ("whole", "run"))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_nothing_of_somebody_elses_is_written_over(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "fused.pt").write_text("precious")
    code, _, err = command(idx_folder, "--out", mine)
    assert code == 2
    assert f"{mine} holds fused.pt, which is no run's and would be written over; choose another --out" in err
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("fused.pt", "precious")]


def test_a_checkpoint_knows_its_run(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    """Where the records are gone, nothing else tells."""
    options = [idx_folder, "--epochs", 1, "--out", tmp_path / "run"]
    assert command(*options)[0] == 0
    (tmp_path / "run" / FILE).write_text("")
    code, _, err = command(*options, "--resume", "--seed", 5)
    assert code == 2
    assert "the checkpoint of fused in" in err
    assert "is another run's, or its images have changed" in err
    code, _, err = command(*options, "--resume", "--limit", 12)
    assert (code, "is another run's" in err) == (2, True)


def test_weights_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Linear(2, 2)
    save_weights(network, tmp_path, "naive")
    before = (tmp_path / "naive.pt").read_bytes()

    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot write .*naive.pt \(PytorchStreamWriter[^\n]*$"):
        save_weights(network, tmp_path, "naive")
    assert [path.name for path in tmp_path.iterdir()] == ["naive.pt"]
    assert (tmp_path / "naive.pt").read_bytes() == before
