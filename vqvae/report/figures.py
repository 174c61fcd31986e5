"""The figures of an evaluation as its JSON file has them, which anybody may have written, and as a page says them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What a page calls the entries of elbo.json beside rates.
TERMS = {"distortion": "distortion", "entropy": "posterior entropy", "negative_elbo": "negative ELBO"}
# Entries that are numbers; None where there is none.
_NUMBERS = (*TERMS, "usage", "perplexity", "psnr", "bits_per_dim", "seconds", "rate_error", "importance_weighted", "kl")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures of one evaluation.

    Attributes:
        plain: as in elbo.json, see `vqvae.evaluation.Evaluation.plain`.

    Raises:
        ValueError: what is no such evaluation.
    """

    plain: Mapping[str, Any]

    def __post_init__(self) -> None:
        plain = self.plain
        rates = plain.get("rate")
        if not isinstance(rates, Mapping) or not rates or not all(_is_number(each) for each in rates.values()):
            raise ValueError("got figures without a rate under each prior, expected those of elbo.json")
        for name in _NUMBERS:
            if not _is_number(plain.get(name)):
                raise ValueError(
                    f"got {plain[name]!r:.40} for the figure {name!r}, expected a number, as elbo.json has"
                )
        for name in ("images", "skipped", "dims"):
            if type(plain.get(name)) is not int or plain[name] < (0 if name == "skipped" else 1):
                raise ValueError(f"got {plain.get(name)!r:.40} for {name!r}, expected a count, as elbo.json has")

    def __getitem__(self, name: str) -> Any:
        """An entry; None where there is none."""
        return self.plain.get(name)

    def bits(self, nats: float) -> float:
        """Nats per image as bits per dimension."""
        return nats / (math.log(2) * self.plain["dims"])

    @property
    def prior(self) -> str:
        """The name of the prior of the bound."""
        return list(self.plain["rate"])[-1]

    @property
    def rate(self) -> float | None:
        """Nats of the latents under the prior of the bound, less the entropy of a posterior."""
        rate, entropy = self.plain["rate"][self.prior], self["entropy"]
        return None if rate is None else rate - (entropy or 0.0)

    @property
    def protocol(self) -> tuple[Any, ...]:
        """What has to be equal where figures are to stand in one column."""
        names = ("data", "split", "data_digest", "images", "skipped", "dims")
        return tuple(self[name] for name in names)

    def rows(self, part: str | None = None) -> list[tuple[str, float | None]]:
        """Names and nats of the terms; of a part, such as "deterministic", where it has them."""
        found = self.plain if part is None else self.plain.get(part)
        if not isinstance(found, Mapping) or not isinstance(found.get("rate"), Mapping):
            return []
        rows = [(f"rate, {name} prior", nats) for name, nats in found["rate"].items()]
        return [*rows, *((told, found.get(name)) for name, told in TERMS.items())]

    def nats(self, value: float | None) -> list[str]:
        """A term in nats an image and in bits a dimension."""
        return [said(value, ".2f"), said(None if value is None else self.bits(value), ".4f")]


def said(value: Any, digits: str, unit: str = "") -> str:
    """A number as a page says it; a dash where there is none."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:{digits}}".replace("-", "−") + unit


def duration(seconds: Any) -> str:
    """How long something took."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e10:
        return "–"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def looks_of(plain: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The figures of the eye of an evaluation, if it has such as `vqvae evaluate --looks` writes."""
    found = plain.get("looks")
    if not isinstance(found, Mapping) or not isinstance(found.get("protocol"), Mapping):
        return None
    for kind in ("reconstructions", "samples"):
        estimates = found.get(kind, {} if kind == "samples" else None)
        if not isinstance(estimates, Mapping) or not all(isinstance(each, Mapping) for each in estimates.values()):
            return None
    return found


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
