"""The model card of a run: what was trained, on what, how, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .settings import flat

__all__ = ["model_card"]


def model_card(
    name: str,
    description: Mapping[str, Any],
    settings: Mapping[str, Any],
    validation: Mapping[str, float],
    records: Sequence[Mapping[str, Any]],
    steps: int,
) -> str:
    """Markdown with the hub's metadata.

    Args:
        name: of the model.
        description: `Task.describe`: data, objective, model.
        settings: of the run, plain values.
        validation: the last validation's numbers.
        records: the run's log.
        steps: made.
    """
    data = ModelCardData(library_name="diffusers", tags=["moe-sampler", *description.get("tags", ())])
    trained = [record for record in records if "loss" in record]
    parts = [f"---\n{data.to_yaml()}\n---", f"# {name}"]
    if "summary" in description:
        parts.append(str(description["summary"]))
    parts.append("## Data and task")
    parts.append(_table(flat({k: v for k, v in description.items() if k not in ("summary", "tags")})))
    parts.append("## Results")
    results: dict[str, Any] = {"steps": steps}
    if trained:
        results["training loss, last logged"] = trained[-1]["loss"]
        results["hours of training"] = round(sum(r.get("seconds", 0.0) for r in trained) / 3600, 3)
        results["steps skipped"] = trained[-1].get("skipped", 0)
    parts.append(_table(results | {f"validation {key}": value for key, value in validation.items()}))
    parts += ["## Settings", _table(flat(settings)), "Made with moe-sampler."]
    return str(ModelCard("\n\n".join(parts) + "\n"))


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items())])
