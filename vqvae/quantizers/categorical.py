"""Posteriors over codes: what Gumbel softmax and SQ-VAE have in common.

Each position has a categorical posterior p = softmax(l) with logits that are affine in the vector, l_k = w_k·z + b_k.
With Gumbel noise g and embeddings e_k:

    training      y = softmax((l + g)/τ);   hard: z_q = e_k for k = argmax y, gradient that of y; soft: z_q = Σ y_k e_k
    evaluation    k = argmax l, z_q = e_k:  deterministic, so its entropy is zero
    `draw`        k from p, exactly:        `entropy` is H(p), `log_posterior` is ln p_k

τ falls from `temperature` to `final_temperature` along a half cosine of `anneal_steps` updates (Ramesh et al. 2021). In
training with hard samples `codes` are the sampled ones, which are those that `z_q` is made of. A soft sample is no
code's vector; its `codes` are the most probable ones. Distributions over all codes are held chunk by chunk
(`vqvae.quantizers.soft`).
"""

import abc
import math

import torch
from einops import pack
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers.base import Quantized
from vqvae.quantizers.estimators import gumbel_softmax
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer, counted
from vqvae.quantizers.prior_in_loop import PriorInTheLoop, rate_of
from vqvae.quantizers.soft import CHUNK_ELEMENTS, entropy_of, in_chunks


class CategoricalQuantizer(PositionwiseQuantizer):
    """Abstract: codes sampled from a posterior with affine logits.

    Args:
        num_codes: rows of the codebook, at least 1.
        dim: width of a row, and of the features.
        temperature, final_temperature, anneal_steps: the schedule of τ, in calls of `update`.
        hard: training passes on a code's vector, with the gradient of the relaxed sample; else the relaxed sample.
    """

    stochastic = True
    codebook: nn.Parameter

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        hard: bool = False,
        temperature: float = 0.5,
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
        self.temperature = temperature
        self.final_temperature = final_temperature
        self.anneal_steps = anneal_steps
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def table(self) -> Tensor:
        """The embeddings, "k d"."""
        return self.codebook.to(self.dtype)

    @abc.abstractmethod
    def logits(self) -> tuple[Tensor, Tensor]:
        """The weights "k d" and biases "k" of the posterior's logits."""

    @abc.abstractmethod
    def most_probable(self, vectors: Tensor) -> Tensor:
        """The code of the largest logit for each vector, the lowest of several, the same in every batch."""

    @abc.abstractmethod
    def terms(
        self, vectors: Tensor, chosen: Tensor, entropies: Tensor, average: Tensor, valid: Tensor | None
    ) -> dict[str, Tensor]:
        """Auxiliary terms, given each position's posterior entropy "n" and the mean posterior "k"."""

    @property
    def current_temperature(self) -> Tensor:
        """τ at this update, scalar."""
        done = (self.num_updates / self.anneal_steps).clamp_max(1)
        return (
            self.final_temperature + (self.temperature - self.final_temperature) * (1 + torch.cos(math.pi * done)) / 2
        )

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        if self.training:
            self.observe(vectors, valid)
        table, (weight, bias) = self.table, self.logits()
        weights = counted(vectors, valid)
        shared = (weight, bias, table.detach() if self.hard else table, self.current_temperature.to(self.dtype))
        parts = in_chunks(_sample if self.training else _score, (vectors, weights), shared, self.num_codes)
        entropies = torch.cat([part[0] for part in parts])
        average = torch.stack([part[1] for part in parts]).sum(0) / weights.sum().clamp_min(1)
        drawn_entropies, log_posterior = None, None
        if not self.training:
            codes = self.most_probable(vectors)
            chosen = table[codes]
        else:
            sampled, most, soft, codes = (
                torch.cat(column) for column in zip(*(part[2:] for part in parts), strict=True)
            )
            drawn_entropies = entropies
            if self.hard:
                chosen, log_posterior = table[codes] + (soft - soft.detach()), sampled
            else:
                codes, chosen, log_posterior = self.most_probable(vectors), soft, most
        terms = self.terms(vectors, chosen, entropies, average, valid)
        return Assignment(chosen, codes, terms, drawn_entropies, log_posterior)

    def check_weighs_prior(self) -> None:
        """The relaxed sample takes a prior's gradient."""

    def through_prior(
        self, z_e: Tensor, loop: PriorInTheLoop, generator: torch.Generator | None = None
    ) -> tuple[Quantized, Tensor]:
        """As the base says. The posterior is the quantizer's own, whatever the prior; training takes its gradient."""
        z_e = self.prepared(z_e)
        with torch.autocast(z_e.device.type, enabled=False):
            if not self.training:
                q = self.run(z_e, None, generator)
                return q, rate_of(q.codes, loop)
            vectors, _ = pack([self.project(z_e)], "* d")
            self.observe(vectors, None)
            weight, bias = self.logits()
            log_probs = F.log_softmax(vectors @ weight.T + bias, dim=-1)
            weights = relaxed = gumbel_softmax(log_probs, self.current_temperature.to(self.dtype))
            codes = relaxed.argmax(-1)
            if self.hard:
                weights = F.one_hot(codes, self.num_codes) + (relaxed - relaxed.detach())
            posteriors = log_probs.exp()
            chosen, entropies = weights @ self.table, entropy_of(posteriors)
            terms = self.terms(vectors, chosen, entropies, posteriors.mean(0), None)
            del terms["kl"]  # to even odds, in whose place the prior's rate comes
            found = Assignment(chosen, codes, terms, entropies, log_probs.gather(-1, codes[:, None])[:, 0])
            q = self.result(found, z_e, None)
        conditionals = loop.relaxed_log_conditionals(weights.reshape(*z_e.shape[:-1], self.num_codes))
        return q, -(posteriors.reshape(conditionals.shape) * conditionals).flatten(1).sum(1)

    @torch.no_grad()
    def codes_through_prior(
        self, z_e: Tensor, loop: PriorInTheLoop, generator: torch.Generator | None = None
    ) -> Tensor:
        z_e = self.prepared(z_e)
        with torch.autocast(z_e.device.type, enabled=False):
            return self.run(z_e, None, generator).codes

    @torch.no_grad()
    def posterior_scores(self, z_e: Tensor, beta: float | None) -> tuple[Tensor, bool]:
        """As the base says. The posterior is the quantizer's own, whatever the prior."""
        with torch.autocast(z_e.device.type, enabled=False):
            weight, bias = self.logits()
            return self.project(self.prepared(z_e)) @ weight.T + bias, False

    def observe(self, vectors: Tensor, valid: Tensor | None) -> None:
        """Look at what is quantised in training, for `update`."""

    def draw_codes(self, vectors: Tensor, valid: Tensor | None, generator: torch.Generator) -> Assignment:
        weight, bias = self.logits()
        weights = counted(vectors, valid)
        parts = []
        average = torch.zeros_like(bias)
        size = max(1, CHUNK_ELEMENTS // self.num_codes)
        for chunk, share in zip(vectors.split(size), weights.split(size), strict=True):
            log_probs = F.log_softmax(chunk @ weight.T + bias, dim=-1)
            # The largest of ln p + Gumbel noise is a draw from p (Gumbel 1954; Maddison et al. 2014).
            noise = -torch.empty_like(log_probs).exponential_(generator=generator).log()
            codes = (log_probs + noise).argmax(-1)
            posteriors = log_probs.exp()
            parts.append((codes, entropy_of(posteriors), log_probs.gather(-1, codes[:, None])[:, 0]))
            average += share @ posteriors
        codes, entropies, log_posterior = (torch.cat(column) for column in zip(*parts, strict=True))
        chosen = self.table[codes]
        terms = self.terms(vectors, chosen, entropies, average / weights.sum().clamp_min(1), valid)
        return Assignment(chosen, codes, terms, entropies, log_posterior)

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.table[codes]

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        super().update()


def _score(vectors: Tensor, weights: Tensor, weight: Tensor, bias: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """Of a chunk: the entropies of the posteriors, and the sum of those that count."""
    posteriors = F.softmax(vectors @ weight.T + bias, dim=-1)
    return entropy_of(posteriors), weights @ posteriors


def _sample(
    vectors: Tensor, weights: Tensor, weight: Tensor, bias: Tensor, table: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """Of a chunk: what `_score` gives; ln p of the sampled and of the likeliest codes; relaxed vectors; their codes."""
    log_probs = F.log_softmax(vectors @ weight.T + bias, dim=-1)
    relaxed = gumbel_softmax(log_probs, temperature)
    codes = relaxed.argmax(-1)
    log_posterior = log_probs.gather(-1, codes[:, None])[:, 0]
    posteriors = log_probs.exp()
    most = log_probs.amax(-1)
    return entropy_of(posteriors), weights @ posteriors, log_posterior, most, relaxed @ table, codes
