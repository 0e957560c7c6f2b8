"""Processes that share a file of rows: one alone, or those of `accelerate launch`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

__all__ = ["Processes"]

_PATIENCE = timedelta(days=365)
"""How long a process waits for others, whose shares may take longer than torch's half an hour."""


class Processes:
    """Who of how many this process is.

    Attributes:
        index, count: from 0.
    """

    def __init__(self) -> None:
        self.index, self.count, self._state = 0, 1, None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env

            cpu = parse_flag_from_env("ACCELERATE_USE_CPU")  # it doesn't look there itself
            self._state = PartialState(cpu=cpu, timeout=_PATIENCE)
            self.index, self.count = self._state.process_index, self._state.num_processes

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def device(self) -> str | None:
        """Of this process alone, where the launcher says one."""
        return None if self._state is None else str(self._state.device)

    def shared(self, value: Any) -> Any:
        """What the first process has, in all of them; an exception is raised in all of them."""
        if self._state is not None:
            from accelerate.utils import broadcast_object_list

            (value,) = broadcast_object_list([value])
        if isinstance(value, BaseException):
            raise value
        return value

    def gathered(self, values: list[Any]) -> list[Any]:
        """Everyone's, in all processes; waits for them."""
        if self._state is None:
            return values
        from accelerate.utils import gather_object

        return gather_object(values)
