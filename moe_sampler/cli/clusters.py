"""Options of Ray, checked before any work."""

from __future__ import annotations

from importlib.util import find_spec

from .._numbers import whole

__all__ = ["check_cluster"]


def check_cluster(address: str | None, workers: int | None) -> None:
    """Raise ValueError where --ray can't be."""
    if workers is not None and address is None:
        raise ValueError("--ray-workers is for --ray ADDRESS")
    if workers is not None:
        whole("--ray-workers", workers, 10**6)
    if address is not None and find_spec("ray") is None:
        raise ValueError('a cluster is reached by Ray: pip install "moe-sampler[ray]"')
