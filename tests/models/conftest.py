"""Counting of multiply-adds, shared by the tests of the image networks and of the clip models."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="session")
def multiply_adds():
    """`multiply_adds(model, *shape)` on `meta`: convolutions, linear layers and matrix products, as fvcore counts."""
    # PyTorch imports its compiler for a forward pass on meta, which sets an environment variable: not within a test.
    importlib.import_module("torch._dynamo")

    def count(model, *shape):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.empty(*shape, device="meta"))
        return counter.get_total_flops() // 2

    return count
