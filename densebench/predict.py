"""`python -m densebench.predict`: does a network fit on a card, under which strategy, and with how many images?

The table goes to stdout, progress and errors to stderr. Exit codes: 0, or 2 for a question that makes no sense.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

_EXAMPLES = """examples:
  python -m densebench.predict densenet264 --batch 256 --memory 24GiB
  python -m densebench.predict densenet121 --batch 64 --autocast bf16 --optimizer adamw --memory 16GB --json
  python -m densebench.predict densenet121 --spatial-dims 3 --size 96 --batch 4 --memory 24GiB
  python -m densebench.predict densenet121 --mode infer --batch 1 --strategy naive --device cpu

Nothing is run and no GPU is needed. What a CUDA device adds (rounding, cuBLAS, 0.5 GiB for the driver) is taken
from PyTorch's sources; cuDNN's workspaces are not in it. Answers are kept in ~/.cache/densebench
($XDG_CACHE_HOME)."""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    command = argparse.ArgumentParser(
        prog="python -m densebench.predict",
        description="Predict the peak memory of a step, and the largest batch that fits, without running it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", help="a network's name, e.g. densenet121, densenet264, densenet_bc, resnet50")
    command.add_argument("--batch", type=int, default=64, help="images in a step (default 64)")
    command.add_argument(
        "--size", type=int, help="side of the image (default 224; 32 for the CIFAR family, 96 for volumes)"
    )
    command.add_argument("--channels", type=int, help="of the image (default 3; 1 for volumes)")
    command.add_argument(
        "--spatial-dims", type=int, choices=(2, 3), default=2, help="2 for images (the default), 3 for volumes"
    )
    command.add_argument("--memory", help="of the card: 24GiB (24 x 2^30 bytes) or 24GB (24 x 10^9)")
    command.add_argument("--strategy", default="all", help="one strategy, or all (the default)")
    command.add_argument("--mode", default="train", help="train (the default), forward (with graph) or infer")
    command.add_argument("--dtype", default="fp32", help="of parameters and images: fp32, fp64, bf16 or fp16")
    command.add_argument("--autocast", help="dtype of mixed precision, e.g. bf16 (default: none)")
    command.add_argument("--optimizer", help="sgd, sgd_momentum, adam, adamw, rmsprop or adagrad (default: none)")
    command.add_argument("--device", default="cuda", help="cuda (the default) or cpu")
    command.add_argument("--gpu", default="H100", help="whose rates make the floor of the time (default H100)")
    command.add_argument("--json", action="store_true", help="all that is predicted, as JSON")
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer on stdout; returns the exit code."""
    options = parser().parse_args(arguments)
    # Only now: importing torch takes seconds, and --help should not.
    try:
        from densebench.prediction import PredictionError
        from densebench.prediction.command import answer
        from densebench.registry import UnsupportedError
    except ImportError as error:
        print(f"densebench.predict: PyTorch lacks what a prediction needs ({error}); use >= 2.11", file=sys.stderr)
        return 2
    try:
        print(answer(options, lambda line: print(f"  {line}", file=sys.stderr, flush=True)))
    except (ValueError, TypeError, PredictionError, UnsupportedError) as error:
        print(f"densebench.predict: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
