"""What the two models are trained for, and the codes that the prior is trained on."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from priors import TransformerPrior
from vqvae import VQVAE
from vqvae.data import Batch, index_batches
from vqvae.quantizers import Quantized, QuantizerConfig

MAX_PRIOR_CODES = 2**20


class CodebookObjective(nn.Module):
    """Distortion in nats per dimension plus the quantizer's terms, for a batch of images."""

    def __init__(self, model: VQVAE):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        out = self.model(images)
        terms = {
            "distortion": out.distortion.mean() / self.model.num_dims,
            **out.quantized.auxiliary,
        }
        return {"objective": torch.stack(list(terms.values())).sum(), **terms, **codebook_state(out.quantized)}

    def update(self) -> None:
        self.model.quantizer.update()


def codebook_state(q: Quantized) -> dict[str, Tensor]:
    """Usage, perplexity and dead codes: their means, and where there are several codebooks, those of each."""
    state = {}
    for name in ("usage", "perplexity", "dead_codes"):
        values = getattr(q, name).float()
        state[name] = values.mean()
        state |= {f"{name}/{index}": value for index, value in enumerate(values.reshape(-1)) if values.ndim}
    return state


@dataclass(frozen=True)
class CodeGrids:
    """The codes of a set of images in memory, and their labels."""

    codes: Tensor
    labels: Tensor | None

    def at(self, indices: np.ndarray) -> Batch:
        chosen = torch.from_numpy(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return Batch(self.codes[chosen].long(), labels)

    def batches(self, **order: Any) -> Generator[Batch, None, None]:
        """Shuffled batches without end, in the order that images would come in."""
        return (self.at(indices) for indices in index_batches(len(self.codes), **order))


class PriorObjective(nn.Module):
    """Rate in nats per code, for a batch of codes."""

    def __init__(self, prior: TransformerPrior):
        super().__init__()
        self.prior = prior

    def forward(self, codes: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        per_code = -self.prior(codes, labels).mean() / self.prior.num_places
        return {"objective": per_code, "rate": per_code}

    def update(self) -> None:
        """Nothing moves outside the gradient."""


def check_listable(config: QuantizerConfig) -> None:
    """A prior gives a probability to each code, so it must be able to list them."""
    num_codes = config.build().num_codes
    if num_codes > MAX_PRIOR_CODES:
        raise ValueError(
            f"a prior cannot list the {num_codes} codes of this quantizer, at most {MAX_PRIOR_CODES}: give each place "
            "several codes of fewer bits (--quantizer GroupedQuantizer/BSQ), or train the codebook alone with "
            "--stage codebook"
        )
