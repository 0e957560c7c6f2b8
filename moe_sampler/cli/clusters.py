"""Options of Ray, checked before any work."""

from __future__ import annotations

from .._numbers import whole

__all__ = ["check_cluster"]


def check_cluster(address: str | None, workers: int | None) -> None:
    """Raise ValueError where --ray can't be."""
    if workers is not None and address is None:
        raise ValueError("--ray-workers is for --ray ADDRESS")
    if workers is not None:
        whole("--ray-workers", workers, 10**6)
    if address is not None:
        from ..ray.cluster import check_ray

        check_ray()
