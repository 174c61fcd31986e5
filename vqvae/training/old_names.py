"""What runs of earlier versions call things differently in their state/run.json."""

from collections.abc import Mapping
from typing import Any


def updated(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run.json as this version calls them.

    Until the options of a prior came from its own class, its kind stood beside them, whether it takes labels inside
    them, and a model's class was that of its config.
    """
    found = dict(plain)
    found["model"] = {**plain["model"], "class": plain["model"]["class"].removesuffix("Config")}
    if "class" not in plain["prior"]:
        options = dict(plain["prior"])
        kind = f"{plain['prior_kind']}Prior"
        if plain.get("latents") == "gaussian":
            kind = "MixtureTransformerPrior"
            options.pop("code_noise", None)
        found |= {"labels": options.pop("labels", True), "prior": {"class": kind, **options}}
    return {**found, "prior_kind": plain["prior_kind"]}
