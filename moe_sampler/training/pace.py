"""How many steps fit into the time there is.

The rate of a warm-up and of the steady steps after it doesn't depend on how many steps there will be, so that
number is settled late: when the time that is left is what the decay takes, at the speed seen until then.
From there on the schedule is that of an ordinary run of so many steps. Should steps become slower during the
decay, it is shortened.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from itertools import pairwise
from statistics import median

from .settings import SettingsError
from .training_settings import TrainingSettings

__all__ = ["Pace"]

_EVERY = 0.5
"""Seconds between two looks at the clock."""
_LOOKS = 60
"""The speed is the median between so many looks: it changes when another program comes or goes, but not for a
run that was halted for a while."""


class Pace:
    """The settings of a run that ends at a time.

    Args:
        settings: of a run whose decay is the last lr_decay_steps of max_train_steps; here that is a share.
        deadline: as `time.time` counts.

    Attributes:
        decay_start: the step that the decay began at, or None before it.

    Raises:
        SettingsError: a schedule that depends on its end from the beginning.
    """

    def __init__(self, settings: TrainingSettings, deadline: float) -> None:
        if settings.lr_scheduler != "warmup_stable_decay":
            raise SettingsError("a run that ends at a time needs lr_scheduler warmup_stable_decay")
        self._own, self._deadline = settings, deadline
        self._share = settings.lr_decay_steps / settings.max_train_steps
        self.decay_start: int | None = None
        self._looks: deque[tuple[float, int]] = deque(maxlen=_LOOKS)

    def begin(self, step: int, total: int | None, decay_start: int | None) -> TrainingSettings:
        """Settings to begin with at `step`: steady ones, or, for a resumed run whose decay had begun, those
        that it had settled on, with `total` steps."""
        self._looks.append((time.time(), step))
        self._compiles = True
        self.decay_start = decay_start
        if decay_start is not None and total is not None:
            return self._settled(total, decay_start)
        return dataclasses.replace(self._own, max_train_steps=10**9, lr_decay_steps=0)

    def look(self, step: int, total: int) -> TrainingSettings | None:
        """After `step` steps of `total`: other settings to go on with, or None.

        total: what the present settings say.
        """
        now = time.time()
        if now - self._looks[-1][0] < _EVERY:
            return None
        looks = [*self._looks, (now, step)]
        speed = median((after[1] - before[1]) / (after[0] - before[0]) for before, after in pairwise(looks))
        fits = math.floor(speed * max(0.0, self._deadline - now))
        if self._compiles:  # the first steps also bring things to the device, and compile
            self._looks.clear()
            self._compiles = False
        self._looks.append((now, step))
        if self.decay_start is not None:
            return self._settled(step + fits, self.decay_start) if step + fits < total else None
        wanted = math.ceil(step * self._share / (1 - self._share))
        if fits > wanted:
            return None
        self.decay_start = step
        return self._settled(step + min(fits, wanted), step)

    def _settled(self, total: int, decay_start: int) -> TrainingSettings:
        return dataclasses.replace(
            self._own,
            max_train_steps=total,
            lr_decay_steps=total - decay_start,
            lr_warmup_steps=min(self._own.lr_warmup_steps, decay_start),
        )
