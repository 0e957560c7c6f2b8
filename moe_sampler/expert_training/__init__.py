"""The experts' own training: their objectives, David's weights, and the data they learn from."""

from typing import TYPE_CHECKING

from .._lazy import lazy_names

if TYPE_CHECKING:
    from .captions import Captions, TextStates
    from .david import AssessedUNet, Assessment, Assessor, BlockProbes, structure_classes
    from .images import LatentImages, encode_source
    from .objectives import Objective
    from .settings import DavidSettings, ExpertSettings, LevelSettings
    from .task import ExpertTask

_NAMES = {
    "captions": ("Captions", "TextStates"),
    "david": ("AssessedUNet", "Assessment", "Assessor", "BlockProbes", "structure_classes"),
    "images": ("LatentImages", "encode_source"),
    "objectives": ("Objective",),
    "settings": ("DavidSettings", "ExpertSettings", "LevelSettings"),
    "task": ("ExpertTask",),
}

__all__ = [
    "AssessedUNet",
    "Assessment",
    "Assessor",
    "BlockProbes",
    "Captions",
    "DavidSettings",
    "ExpertSettings",
    "ExpertTask",
    "LatentImages",
    "LevelSettings",
    "Objective",
    "TextStates",
    "encode_source",
    "structure_classes",
]

__getattr__, __dir__ = lazy_names(globals(), _NAMES)
