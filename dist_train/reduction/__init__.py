"""Reductions: how one tensor per rank becomes one tensor on all.

Each works on a `torch.distributed` process group and plain tensors; `dist_train.strategies.allreduce` runs them on its
buckets, overlapped with the backward pass.
"""
