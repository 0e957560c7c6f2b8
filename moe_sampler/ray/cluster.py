"""Items of work over the workers of a cluster; a worker that dies is replaced, and its item done again."""

from __future__ import annotations

import logging
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..errors import first_line

__all__ = ["check_ray", "connect", "over_workers"]


def check_ray() -> Any:
    """The module.

    Raises:
        ValueError: it isn't installed.
    """
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError('a cluster is reached by Ray: pip install "moe-sampler[ray]"') from None
    return ray


def connect(address: str) -> Any:
    """Ray, connected to a cluster, or to the one that this process is connected to already.

    Args:
        address: host:port, ray://host:port, "auto" for the cluster that this machine is in, or "local" for
            one of this machine alone, which ends with the process.

    Raises:
        ValueError: no Ray, or no cluster there.
    """
    ray = check_ray()
    if not ray.is_initialized():
        _check_reachable(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # its own errors, and those of the network
            raise ValueError(f"there is no Ray cluster at {address}: {first_line(error)}") from None
    return ray


def _check_reachable(address: str) -> None:
    """Ray itself tries for ten minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        if address not in ("auto", "local"):
            raise ValueError(f"--ray {address}: give host:port, ray://host:port, auto or local")
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"there is no Ray cluster at {address}: {error}") from None


def over_workers(
    address: str,
    make: Callable[[], Callable[[Any], Any]],
    items: Sequence[Any],
    *,
    workers: int | None = None,
    gpus: float = 0,
) -> Iterator[Any]:
    """What a function gives for each item, as they are done, in any order.

    Args:
        address: as `connect` takes it.
        make: called once in each worker, gives the function. It may be called for an item again, where a
            worker died: what it writes must be whole or not there, and what is there isn't done again.
        items: anything that can be pickled; at least one.
        workers: how many at most; by default one a GPU, or one a CPU where none is asked for.
        gpus: of each worker.
    """
    ray = connect(address)
    if workers is None:
        found = ray.cluster_resources()
        workers = int(found.get("GPU", 0) / gpus) if gpus else int(found.get("CPU", 1))
        if not workers:
            raise ValueError("the cluster has no GPUs: give --device cpu")
    rows = [{"item": pickle.dumps(item)} for item in items]
    with _silent(ray):
        done = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Worker,
            fn_constructor_args=(make,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(rows))),
            num_gpus=gpus or None,
            num_cpus=1,
        )
        for row in done.iter_rows():
            yield pickle.loads(row["result"])


@contextmanager
def _silent(ray: Any) -> Iterator[None]:
    """Ray Data tells of every run on standard error, where our own progress is."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._do = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [pickle.dumps(self._do(pickle.loads(item))) for item in batch["item"]]
        return {"result": results}
