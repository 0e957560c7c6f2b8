"""Work on a Ray cluster: classes for `Dataset.map_batches`, and what `--ray` runs. Needs the extra `ray`."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .cluster import over_workers
    from .images import GenerateImages

_NAMES = {"images": ("GenerateImages",), "cluster": ("over_workers",)}

__all__ = ["GenerateImages", "over_workers"]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
