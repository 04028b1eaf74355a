"""Operators of the fused path, one operation a file. They know matrices and maps, and nothing of networks.

Each file holds a PyTorch reference that notes its bytes, a cache-blocked CPU path (made of `passes`), Triton
kernels, and the registration as `torch.ops.densebench.<name>`.
"""
