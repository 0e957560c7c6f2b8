"""The model card of a run: what was trained, on what, how, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..publishing.card import Example, card_text, table
from .settings import flat

__all__ = ["model_card"]


def model_card(
    name: str,
    description: Mapping[str, Any],
    settings: Mapping[str, Any],
    validation: Mapping[str, float],
    records: Sequence[Mapping[str, Any]],
    steps: int,
    *,
    sections: Sequence[str] = (),
    license: str | None = None,
    examples: Sequence[Example] = (),
) -> str:
    """Markdown with the hub's metadata.

    Args:
        name: of the model.
        description: `Task.describe`: data, objective, model.
        settings: of the run, plain values.
        validation: the last validation's numbers.
        records: the run's log.
        steps: made.
        sections: on how the model is loaded.
        license: its identifier on the hub.
        examples: pictures beside the card.
    """
    trained = [record for record in records if "loss" in record]
    parts = [str(description["summary"])] if "summary" in description else []
    parts += [*sections, "## Data and task"]
    parts.append(table(flat({k: v for k, v in description.items() if k not in ("summary", "tags")})))
    parts.append("## Results")
    results: dict[str, Any] = {"steps": steps}
    if trained:
        results["training loss, last logged"] = trained[-1]["loss"]
        results["hours of training"] = round(sum(r.get("seconds", 0.0) for r in trained) / 3600, 3)
        results["steps skipped"] = trained[-1].get("skipped", 0)
    parts.append(table(results | {f"validation {key}": value for key, value in validation.items()}))
    parts += ["## Settings", table(flat(settings))]
    tags = [*description.get("tags", ())]
    return card_text(name, parts, license=license, tags=tags, examples=examples, library_name="diffusers")
