"""CUDA graphs, what of them a CPU can show."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from moe_sampler._graphs import record


def test_after_a_recording_that_failed_another_one_succeeds(monkeypatch):
    """Till then torch draws no random numbers on the device."""
    ended = []

    @contextlib.contextmanager
    def graph(graph, **settings):
        try:
            yield
        except RuntimeError:
            ended.append("failed")
            raise
        ended.append("recorded")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        record(fails, SimpleNamespace(device="cpu"))
    assert ended == ["failed", "recorded"]
    assert record(int, SimpleNamespace(device="cpu"))[1] == 0 and ended[2:] == ["recorded"]
