"""`python -m densebench.train`: try a strategy on images of your own - the same learning curve for less memory.

The table goes to stdout, progress and errors to stderr. Exit codes: 0; 1 if the loss is no number any more; 2 for
what cannot be done; 130 if interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

FINE, DIVERGED, USAGE, INTERRUPTED = 0, 1, 2, 130
_EPILOG = """DATA is one of
  a folder with train/ and val/ (or test/) of class folders of images
  a folder of MNIST-format idx files, gzipped or not
  a folder that holds cifar-10-batches-py/
  random: synthetic images with made-up labels
Nothing is downloaded, and images are not augmented: each is resized and its middle cut out; colors are normalized
as torchvision's weights want them, gray values lie in [0, 1]. What an epoch has left over for an incomplete batch
is left out. A file that is no image is found when it is read, not before.

examples:
  the network of d2l.ai on Fashion-MNIST, by every strategy:
  python -m densebench.train /usr/share/datasets/fashion-mnist --model densenet_d2l --size 96 --batch 256 \\
      --optimizer sgd --lr 0.1 --epochs 10 --strategy all --out runs/fashion
  fine-tune torchvision's DenseNet-121 on CIFAR-10 (in data/cifar-10-batches-py):
  python -m densebench.train data --weights densenet121-a639ec97.pth --size 224 --batch 32 \\
      --optimizer adam --lr 1e-3 --epochs 1 --out runs/cifar
  see it run:
  python -m densebench.train random --model densenet_d2l --size 32 --limit 512 --strategy naive,fused"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"densebench.train: {message} (try --help)\n")


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = _Parser(
        prog="python -m densebench.train",
        description="Train one DenseNet by one or more strategies on the same batches, and compare.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("data", metavar="DATA", help="the images, see below")
    add(
        "--model",
        default="densenet121",
        help="a DenseNet's name (default densenet121; densenet_d2l for gray images)",
    )
    add("--strategy", default="fused", help="one, several with commas between, or all (default fused)")
    add("--weights", metavar="FILE", help="a state_dict to start from; a classifier of other classes starts anew")
    add("--epochs", type=int, default=1, help="default 1")
    add("--batch", type=int, default=32, help="images in a step (default 32)")
    add("--size", type=int, help="side of the image (default 224; 32 for the CIFAR family)")
    add("--optimizer", default="sgd", help="sgd (the default), adam or adamw, as torch.optim has them")
    add("--lr", type=float, help="learning rate (default 0.1 for sgd, 0.001 for the others)")
    add("--momentum", type=float, default=0.0, help="of sgd (default 0)")
    add("--weight-decay", type=float, help="default: the optimizer's own")
    add(
        "--autocast",
        metavar="DTYPE",
        help="mixed precision: bf16, or fp16 with its gradients scaled (default: none)",
    )
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="of weights and order (default 0)")
    add("--limit", type=int, metavar="N", help="take N images a split, drawn at random, always the same")
    add("--workers", type=int, default=0, help="processes that read images (default 0: the command itself)")
    add("--out", metavar="FOLDER", help="keep training.jsonl, each strategy's weights and curves.svg there")
    add("--resume", action="store_true", help="go on with the run in --out, after its last finished epoch")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and answer on stdout; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        code = _train(options)
    except KeyboardInterrupt:
        kept = f"; finished epochs are kept in {options.out}, and --resume goes on" if options.out else ""
        code = _fail(f"interrupted{kept}", INTERRUPTED)
    if options.out and code != USAGE:
        _draw(Path(options.out))
    return code


def _train(options: argparse.Namespace) -> int:
    # Only now: importing torch takes seconds, and --help should not.
    from densebench.registry import UnsupportedError
    from densebench.training.command import train
    from densebench.training.errors import DivergedError, TrainingError
    from densebench.training.settings import Settings

    try:
        print(train(Settings(**vars(options)), lambda line: print(f"  {line}", file=sys.stderr, flush=True)))
    except DivergedError as error:
        return _fail(str(error), DIVERGED)
    except (TrainingError, UnsupportedError) as error:
        return _fail(str(error), USAGE)
    return FINE


def _draw(folder: Path) -> None:
    from densebench.report.figure_learning import write_curves

    try:
        path = write_curves(folder)
    except OSError as error:
        print(f"densebench.train: cannot draw the curves in {folder} ({error.strerror})", file=sys.stderr)
    else:
        if path is not None:
            print(path)


def _fail(message: str, code: int) -> int:
    if "\n" in message:  # from a process that reads images: its traceback comes before the sentence
        last = message.strip().splitlines()[-1]
        message = last.partition("Error: ")[2] or last
    print(f"densebench.train: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
