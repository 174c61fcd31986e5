"""What runs of earlier versions call things differently in their state/run.json."""

from collections.abc import Mapping
from typing import Any


def updated(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run.json as this version calls them.

    Until the options of a prior came from its own class, its kind stood beside them, whether it takes labels inside
    them, and a model's class was that of its config.
    """
    found = dict(plain)
    model, prior = found.get("model"), found.get("prior")
    if isinstance(model, Mapping) and isinstance(model.get("class"), str):
        found["model"] = {**model, "class": model["class"].removesuffix("Config")}
    if isinstance(prior, Mapping) and "class" not in prior:
        options = dict(prior)
        if "labels" in options:
            found["labels"] = options.pop("labels")
        kind = f"{found.get('prior_kind')}Prior"
        if found.get("latents") == "gaussian":
            kind = "MixtureTransformerPrior"
            options.pop("code_noise", None)
        found["prior"] = {"class": kind, **options}
    return found
