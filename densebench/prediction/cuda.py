"""What a CUDA device adds to the bytes of tensors: the allocator's rounding, and what libraries take.

All of it is documented behavior of PyTorch 2.13, and not validated: no record of a GPU is committed yet. Not
modeled, because nothing public says how much it is: cuDNN's workspaces (alive during one convolution, chosen by
its heuristics), what our own launchers take for partial sums and the places of maxima (under 1 % of a training
step), and memory that the caching allocator holds without using it.
"""

from __future__ import annotations

from densebench.prediction.gpus import Gpu

# CUDACachingAllocator.cpp, kMinBlockSize: every block is a multiple of this.
BLOCK_BYTES = 512

# CUDABlas.cpp, getChosenWorkspaceSize: kept for each (handle, stream), from the first product on. Forward and
# backward run in two threads, and each thread has a handle of its own.
CUBLAS_HOPPER_BYTES = 32 * 2**20
CUBLAS_BYTES = (4096 * 2 + 16 * 8) * 2**10

# Left to the driver: the CUDA context with its loaded kernels. An assumption, on the large side of what
# nvidia-smi shows for a process that has run a network.
CONTEXT_BYTES = 512 * 2**20


def rounded(nbytes: int) -> int:
    """The bytes the allocator hands out for a request; nothing for nothing."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def cublas_bytes(gpu: Gpu | None, mode: str) -> int:
    """cuBLAS's workspaces in a step; for an unknown GPU those of the largest."""
    one = CUBLAS_HOPPER_BYTES if gpu is None or gpu.capability >= (9, 0) else CUBLAS_BYTES
    return one * (2 if mode == "train" else 1)
