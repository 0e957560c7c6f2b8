"""A path for orders of convergence."""

from moe_sampler import VPPath

__all__ = ["EveryTimestep"]


class EveryTimestep:
    """The VP path in continuous time, so that rounding to integer timesteps doesn't blur an order."""

    discrete = False

    def __init__(self):
        self._path = VPPath.linear()

    def __getattr__(self, name):
        return getattr(self._path, name)
