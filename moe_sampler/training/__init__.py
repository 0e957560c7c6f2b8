"""Training on Accelerate: settings, random draws, the trainer, checkpoints."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from ..errors import CheckpointError
    from .draws import Draws
    from .settings import SettingsError
    from .task import Losses, Task
    from .trainer import Interrupted, NonFiniteError, Trainer
    from .training_settings import TrainingSettings

_NAMES = {
    ".errors": ("CheckpointError",),
    "draws": ("Draws",),
    "settings": ("SettingsError",),
    "task": ("Losses", "Task"),
    "trainer": ("Interrupted", "NonFiniteError", "Trainer"),
    "training_settings": ("TrainingSettings",),
}

__all__ = [
    "CheckpointError",
    "Draws",
    "Interrupted",
    "Losses",
    "NonFiniteError",
    "SettingsError",
    "Task",
    "Trainer",
    "TrainingSettings",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
