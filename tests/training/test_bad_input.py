"""Each wrong option gets one sentence with the remedy and exit code 2; a loss that is no number, exit code 1."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from densebench.training.loop import Training
from tests.training.conftest import Command, losses, needs_torchvision, write_class_folders, write_idx_folder

pytestmark = needs_torchvision()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "densenet12"], "unknown model 'densenet12'; known: densenet121"),
        (["--model", "resnet50"], "unknown model 'resnet50'; known: densenet121"),
        (["--model", "densenet_x"], "unknown model 'densenet_x'"),
        (["--strategy", "fuse"], "unknown strategy 'fuse'; known: all, naive"),
        (["--strategy", "naive,"], "unknown strategy ''"),
        (["--strategy", "all,naive"], "stands alone"),
        (["--optimizer", "lion"], "unknown optimizer 'lion'; known: sgd, adam, adamw"),
        (["--autocast", "int8"], "unknown dtype for --autocast 'int8'; known: bf16, fp16"),
        (["--device", "tpu"], "unknown device 'tpu'; known: cpu, cuda"),
        (["--epochs", 0], "--epochs 0"),
        (["--epochs", "two"], "argument --epochs: invalid int value: 'two'"),
        (["--batch", 0], "--batch 0"),
        (["--limit", 0], "--limit 0"),
        (["--size", -1], "--size -1"),
        (["--size", 28], "--size 28 is too small for densenet_d2l; give 29 or more"),
        (["--lr", 0], "--lr 0 is no learning rate"),
        (["--lr", "nan"], "--lr nan is no learning rate"),
        (["--momentum", 1], "--momentum 1 is not in [0, 1)"),
        (["--momentum", 0.9, "--optimizer", "adam"], "--momentum belongs to --optimizer sgd"),
        (["--weight-decay", -1], "--weight-decay -1"),
        (["--workers", -1], "--workers -1"),
        (["--seed", -1], "--seed -1"),
        (["--weights", "nowhere.pt"], "--weights nowhere.pt: there is no such file"),
        (["--weights", __file__], "holds no state_dict"),
        (["--resume"], "--resume needs the --out folder"),
        (["--batch", 25], "--batch 25 is more than all images to train on; give 24 or less"),
        (["--batch", 1], "--batch 1 at --size 32 leaves batch norms one value a channel"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_wrong_options(options: list[object], named: str, idx_folder: Path, command: Command) -> None:
    code, out, err = command(idx_folder, *options)
    assert (code, out) == (2, "")
    assert named in err
    assert len(err.splitlines()) == 1


def test_the_smallest_size_trains(idx_folder: Path, command: Command) -> None:
    assert command(idx_folder, "--size", 29)[0] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(idx_folder: Path, command: Command) -> None:
    code, _, err = command(idx_folder, "--device", "cuda")
    assert code == 2
    assert "give --device cpu" in err


def test_wrong_folders(tmp_path: Path, command: Command) -> None:
    code, out, err = command(tmp_path / "nowhere")
    assert (code, out) == (2, "")
    assert f"there is no folder {tmp_path / 'nowhere'}; DATA is" in err
    assert len(err.splitlines()) == 1


def test_weights_for_other_images(tmp_path: Path, command: Command) -> None:
    gray, color = write_idx_folder(tmp_path / "gray"), write_class_folders(tmp_path / "color")
    assert command(gray, "--out", tmp_path / "run")[0] == 0
    code, _, err = command(color, "--weights", tmp_path / "run" / "fused.pt")
    assert code == 2
    assert "features.conv0.weight is [64, 1, 7, 7] there and [64, 3, 7, 7] in the network" in err


def test_out_that_cannot_be_written(idx_folder: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = command(idx_folder, "--out", tmp_path / "file" / "run")
    assert (code, out) == (2, "")
    assert "cannot write to" in err
    assert "choose another --out" in err
    code, _, err = command(idx_folder, "--out", tmp_path / "new", "--resume")
    assert code == 2
    assert f"there is no run in {tmp_path / 'new'}" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_off(workers: int, tmp_path: Path, command: Command) -> None:
    """Found when it is read, also by another process."""
    folder = write_class_folders(tmp_path)
    path = folder / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:100])
    code, out, err = command(folder, "--workers", workers)
    assert (code, out) == (2, "")
    said = [line for line in err.splitlines() if line.startswith("densebench.train: ")]
    assert len(said) == 1
    assert said[0].startswith(f"densebench.train: cannot read the image {path} (")
    assert "Traceback" not in err


def test_a_loss_that_is_no_number_ends_the_run(idx_folder: Path, command: Command) -> None:
    code, out, err = command(idx_folder, "--lr", 1e30, "--strategy", "naive,fused")
    assert (code, out) == (1, "")
    assert "at step 2 of epoch 1 by naive, so the run ends; lower --lr (it is 1e+30)" in err
    assert "fused" not in err


def test_epochs_before_it_are_kept(
    idx_folder: Path, tmp_path: Path, drawing_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Training._step

    def diverges(self: Training, *batch: torch.Tensor) -> tuple[float, int]:
        loss, right = plain(self, *batch)
        return (float("nan") if self.epochs_done else loss), right

    monkeypatch.setattr(Training, "_step", diverges)
    code, _, err = drawing_command(idx_folder, "--epochs", 3, "--out", tmp_path)
    assert code == 1
    assert "the loss is nan at step 1 of epoch 2 by fused" in err
    assert set(losses(tmp_path)) == {("fused", 1)}
    assert (tmp_path / "curves.svg").is_file()
    state = torch.load(tmp_path / "fused.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_interrupted_without_a_folder(idx_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Training) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Training, "activation_bytes", interrupted)
    code, _, err = command(idx_folder)
    assert (code, err) == (130, "densebench.train: interrupted\n")


def test_help_is_quick(repository: Path) -> None:
    """It imports neither torch nor matplotlib, and has both recipes."""
    code = (
        "import sys; from densebench import train\n"
        "try: train.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 5
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--model densenet_d2l --size 96 --batch 256" in done.stdout
    assert "--size 224 --batch 32" in done.stdout


def test_the_examples_of_help_are_understood() -> None:
    from densebench import train
    from densebench.training.settings import Settings, check

    text = train._EPILOG.replace("\\\n", " ")
    lines = [line.split()[3:] for line in text.splitlines() if line.startswith("  python -m densebench.train ")]
    assert len(lines) == 3
    for words in lines:
        options = train.parser().parse_args(words)
        options.weights = None  # a file that is not there
        check(Settings(**vars(options)))
