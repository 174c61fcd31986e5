"""Gumbel softmax: a categorical posterior over codes, trained through a relaxed sample.

Jang et al. 2016, "Categorical Reparameterization with Gumbel-Softmax"; Maddison et al. 2016; as a tokenizer, Ramesh et
al. 2021, "Zero-Shot Text-to-Image Generation" (dVAE). With logits l = W z + b, posterior p = softmax(l), Gumbel noise
g, and embeddings e_k:

    training      y = softmax((l + g)/τ);   hard: z_q = e_k for k = argmax y, gradient that of y;   soft: z_q = Σ y_k
    e_k evaluation    k = argmax l, z_q = e_k:  deterministic, so its entropy is zero
    terms         kl_weight · KL(p ‖ uniform) = kl_weight · (ln K − H(p))
                  + entropy_weight · (ln K − H(E_z[p]))

The last term is not the dVAE's; LFQ and IBQ have its like. Without it the most probable codes of all places were 2 % of
1,024 after 600 steps on the embedded images, with it 96 % after 1,200. τ falls from `temperature` to
`final_temperature` along a half cosine of `anneal_steps` updates, as in the dVAE. In training with hard samples `codes`
are the sampled ones, which are those that `z_q` is made of, and `entropy` is H(p). A soft sample is no code's vector;
its `codes` are the most probable ones. Distributions over all codes are held chunk by chunk (`vqvae.quantizers.soft`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers.base import QuantizerConfig
from vqvae.quantizers.binary import entropy_of
from vqvae.quantizers.estimators import gumbel_softmax
from vqvae.quantizers.nearest import nearest
from vqvae.quantizers.placewise import Assignment, PlacewiseQuantizer, masked_mean, none_is_zero
from vqvae.quantizers.soft import in_chunks


@dataclass(frozen=True, kw_only=True)
class GumbelQuantizerConfig(QuantizerConfig):
    """Options of `GumbelQuantizer`."""

    num_codes: int = 512
    dim: int = 64
    hard: bool = True
    kl_weight: float = 5e-4
    entropy_weight: float = 0.2
    temperature: float = 1.0
    final_temperature: float = 1 / 16
    anneal_steps: int = 150_000

    def build(self) -> "GumbelQuantizer":
        return GumbelQuantizer(**vars(self))


class GumbelQuantizer(PlacewiseQuantizer):
    """A sample of a categorical posterior over codes.

    Args:
        hard: training passes on a code's vector, with the gradient of the relaxed sample; else the relaxed sample.
        kl_weight: of KL(posterior ‖ uniform) in nats a place.
        entropy_weight: of what the entropy of all places' codes lacks; 0 is the dVAE, which left most codes unused
        here. temperature, final_temperature, anneal_steps: the schedule of τ, in calls of `update`.
    """

    remedy = "raise entropy_weight"

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        hard: bool = True,
        kl_weight: float = 5e-4,
        entropy_weight: float = 0.2,
        temperature: float = 1.0,
        final_temperature: float = 1 / 16,
        anneal_steps: int = 150_000,
    ):
        super().__init__(num_codes=num_codes, dim=dim)
        if not 0 < final_temperature <= temperature or anneal_steps < 1:
            raise ValueError(
                f"expected 0 < final_temperature <= temperature and anneal_steps >= 1, got {final_temperature}, "
                f"{temperature} and {anneal_steps}"
            )
        self.hard = hard
        self.kl_weight = kl_weight
        self.entropy_weight = entropy_weight
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.anneal_steps = anneal_steps
        self.to_logits = nn.Linear(dim, num_codes)
        # Logits as wide as the features are long: from near-even posteriors a decoder learns little for long.
        nn.init.normal_(self.to_logits.weight)
        self.codebook = nn.Parameter(torch.randn(num_codes, dim))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def table(self) -> Tensor:
        return self.codebook.to(self.dtype)

    @property
    def current_temperature(self) -> Tensor:
        """τ at this update, scalar."""
        done = (self.num_updates / self.anneal_steps).clamp_max(1)
        return (
            self.final_temperature + (self.temperature - self.final_temperature) * (1 + torch.cos(math.pi * done)) / 2
        )

    def assign(self, vectors: Tensor, kept: Tensor | None) -> Assignment:
        table = self.table
        weight, bias = self.to_logits.weight.to(table.dtype), self.to_logits.bias.to(table.dtype)
        sampling = self.training
        shared = (weight, bias, table.detach() if self.hard else table, self.current_temperature)
        weights = torch.ones_like(vectors[:, 0]) if kept is None else kept.to(vectors.dtype)
        parts = in_chunks(_sample if sampling else _score, (vectors, weights), shared, self.num_codes)
        entropies = torch.cat([part[0] for part in parts])
        average = torch.stack([part[1] for part in parts]).sum(0) / weights.sum().clamp_min(1)
        deficit = none_is_zero(math.log(self.num_codes) - entropy_of(average), vectors, kept)
        terms = {
            "kl": self.kl_weight * masked_mean(math.log(self.num_codes) - entropies, kept),
            "codebook_entropy_deficit": self.entropy_weight * deficit,
        }
        if not sampling:
            codes = nearest(vectors, weight, -bias)
            return Assignment(table[codes], codes, terms)
        soft = torch.cat([part[2] for part in parts])
        if not self.hard:
            return Assignment(soft, nearest(vectors, weight, -bias), terms, entropies)
        codes = torch.cat([part[3] for part in parts])
        return Assignment(table[codes] + (soft - soft.detach()), codes, terms, entropies)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.table[codes]

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        super().update()


def _score(vectors: Tensor, weights: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    """Of a chunk: the entropies of the posteriors, and their weighted sum."""
    posteriors = F.softmax(vectors @ weight.T + bias, dim=-1)
    return entropy_of(posteriors), weights @ posteriors


def _sample(
    vectors: Tensor, weights: Tensor, weight: Tensor, bias: Tensor, table: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """Of a chunk: what `_score` gives, the relaxed samples' vectors, and the sampled codes."""
    logits = vectors @ weight.T + bias
    relaxed = gumbel_softmax(logits, temperature.to(logits.dtype))
    return *_score(vectors, weights, weight, bias), relaxed @ table, relaxed.argmax(-1)
