"""Training by two processes with gloo on the CPU: what each of them ends with. Run by a test as a subprocess.

python -m tests.two_processes RANK STORE FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from densebench.registry import get_strategy, list_strategies
from tests.comparison import Quantities, everything, upstream
from tests.networks import images, small

STEPS = 2
LEARNING_RATE = 0.1


def train(rank: int, strategy: str) -> Quantities:
    """Two optimizer steps of two forwards each before one backward, each process with its own images."""
    network = small(strategy)
    # Buffers are not broadcast: that writes to them between the forwards (pytorch/pytorch#175024).
    parallel = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        outputs = [parallel(images(size, seed=seed)) for size, seed in batches(step, rank)]
        sum((output * upstream(output)).sum() for output in outputs).backward()
        optimizer.step()
    return everything(network, **{f"parameter {name}": p for name, p in network.named_parameters()})


def batches(step: int, rank: int) -> list[tuple[int, int]]:
    """Number of images and seed of each forward of a step; unequal between the processes."""
    return [((5, 3)[rank], 100 * step + 10 * rank + forward) for forward in range(2)]


def main(rank: int, store: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for strategy in list_strategies():
        if get_strategy(strategy).missing() is None:
            torch.save(train(rank, strategy), folder / f"{strategy}.{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
