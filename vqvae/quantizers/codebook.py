"""Codebooks that are listed: search, usage, start and revival, for the learned and the moving-average codebook.

The codebook starts as the k-means centres of the first step's vectors (Łańcucki et al. 2020, "Robust Training of Vector
Quantized Bottleneck Models"). From then on codes without use are revived, by one of two policies:

- "dead" (Dhariwal et al. 2020, "Jukebox"): a code whose share of the usage stays under a tenth of an even share
  becomes a vector of the current step, and its statistics with it.
- "clustered" (Zheng & Vedaldi 2023, "Online Clustered Codebook", CVQ): every code moves to a vector of the current step
  by as much as it is idle, with p its moving share of the usage and γ = 0.99:

      p ← γ p + (1 − γ) n / Σn          a = exp(−10 · K · p / (1 − γ) − 1e-3)          e ← (1 − a) e + a · anchor

  Anchors are random vectors, the first of the paper's choices.

Both happen in `update`, never in the forward pass. Over several processes one reduction a step sums counts and sums,
and all draw from the same pool (`vqvae.quantizers.step_statistics`), so every process ends with the same codebook to
the bit, and with that of one process which saw all their vectors.
"""

import abc
import dataclasses
from typing import Literal

import torch
from einops import pack, unpack
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers.base import Quantized
from vqvae.quantizers.centres import kmeans
from vqvae.quantizers.estimators import rotation_trick, straight_through
from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.positionwise import Assignment, PositionwiseQuantizer, masked_mean
from vqvae.quantizers.prior_in_loop import (
    SPREAD,
    Chosen,
    PriorInTheLoop,
    gumbel_noise,
    jacobi,
    posterior_at,
    rate_of,
    step_by_step,
)
from vqvae.quantizers.step_statistics import Pool, Sums, pool_size

Revival = Literal["dead", "clustered", "off"]
# "dead": usage is averaged over about ten updates. An encoder that moves fast, as at the start, leaves codes behind
# fast. A revived code starts with an even share and has 22 updates (0.9^22 = 0.1) to earn a tenth of it.
DEAD_DECAY = 0.9
DEAD_SHARE = 0.1
CLUSTERED_DECAY = 0.99
VARIANCE_DECAY = 0.95


class CodebookQuantizer(PositionwiseQuantizer):
    """Abstract: nearest code of a table whose rows move one by one.

    Args:
        num_codes: rows of the table, at least 1.
        dim: width of a row, and of the features.
        commitment_weight: of `mse(z_e, sg e)`; 0.25 in the paper.
        normalize: compare and return unit vectors.
        rotation: the rotation trick's gradient to the encoder, in place of straight through.
        revival: how codes without use get a new vector: "dead", "clustered" (CVQ) or "off".

    Attributes:
        num_samples: how many codes each vector counts towards in training, one share each.
    """

    num_samples: int = 1
    codebook: Tensor

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        commitment_weight: float = 0.25,
        normalize: bool = False,
        rotation: bool = False,
        revival: Revival = "dead",
    ):
        super().__init__(num_codes=num_codes, dim=dim)
        self.commitment_weight = commitment_weight
        self.normalize = normalize
        self.on_sphere = normalize
        self.estimator = rotation_trick if rotation else straight_through
        self.revival = revival
        self.remedy = (
            "lower the encoder's learning rate, or quantise in fewer dimensions (ProjectedQuantizer with a width of 8)"
            if revival != "off"
            else 'turn revival on (revival="dead")'
        )
        # Usage: a moving average of counts (dead) or of shares (clustered; from zero, so that codes move until they are
        # used). Saved weights have it as `traffic`.
        self.register_buffer("traffic", torch.zeros(num_codes))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # For σ² of `vqvae.quantizers.prior_in_loop`: moving mean squared distance per dimension to the nearest code.
        self.register_buffer("error", torch.ones(()))
        # Statistics of the step, added up by forwards and consumed by `update`.
        self.sums_of_step = Sums(torch.float32, counts=(num_codes,), vectors=(num_codes, dim), errors=())
        self.pool = Pool(pool_size(num_codes), dim)
        self.gathered = (self.sums_of_step, self.pool)

    @property
    def table(self) -> Float[Tensor, "k d"]:
        """The codes as `decode` gives them: float32 or better, unit vectors where normalised."""
        return self.project(self.codebook.to(self.dtype))

    @abc.abstractmethod
    def reset_codes(
        self, weights: Float[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]
    ) -> None:
        """Move each code k to `vectors[k]` by `weights[k]` in [0, 1], its statistics to those of `share` vectors."""

    def project(self, z_e: Tensor) -> Tensor:
        return F.normalize(z_e, dim=-1) if self.normalize else z_e

    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        table = self.table
        codes = nearest(vectors, table)
        found = self.e_step(vectors.detach(), table.detach()) if self.training else None
        return self._settle(vectors, table, codes, found, valid)

    def _settle(
        self, vectors: Tensor, table: Tensor, codes: Tensor, found: Tensor | None, valid: Tensor | None
    ) -> Assignment:
        """Vectors are given to the codes found "n num_samples", or else to `codes`, their nearest ones."""
        nearest_vectors = table[codes]
        if self.training:
            given = codes[:, None] if found is None else found
            self._gather(vectors.detach(), nearest_vectors.detach(), given, valid)
        chosen = nearest_vectors if found is None else _mean_vectors(table, found)
        return Assignment(chosen, codes, self.terms(vectors, chosen, valid))

    def check_weighs_prior(self) -> None:
        if self.num_samples > 1:
            raise ValueError(
                f"{type(self).__name__} shares vectors among codes that it samples by distance alone, so a prior has "
                "no say: take EMAVectorQuantizer"
            )

    def through_prior(
        self, z_e: Tensor, loop: PriorInTheLoop, generator: torch.Generator | None = None
    ) -> tuple[Quantized, Tensor]:
        self.check_weighs_prior()
        z_e = self.prepared(z_e)
        with torch.autocast(z_e.device.type, enabled=False):
            projected = self.project(z_e)
            codes, costs = self._costs(projected)
        # The prior runs under the caller's autocast, which for a forward pass of its own is right and fast.
        chosen = self._choose(codes, costs, loop, generator)
        if self.training:
            chosen = posterior_at(chosen.codes, costs, loop)
        elif loop.num_iterations is not None:
            chosen = chosen._replace(rate=rate_of(chosen.codes, loop))
        with torch.autocast(z_e.device.type, enabled=False):
            vectors, _ = pack([projected], "* d")
            found = self._settle(vectors, self.table, codes.reshape(-1), chosen.codes.reshape(-1, 1), None)
            q = self.result(found._replace(codes=chosen.codes.reshape(-1)), projected, None)
            q = dataclasses.replace(q, entropy=chosen.entropy, log_posterior=chosen.log_posterior)
            return (q if self.estimator is None else q.with_vectors(self.estimator(projected, q.z_q))), chosen.rate

    @torch.no_grad()
    def codes_through_prior(
        self, z_e: Tensor, loop: PriorInTheLoop, generator: torch.Generator | None = None
    ) -> Tensor:
        self.check_weighs_prior()
        z_e = self.prepared(z_e)
        with torch.autocast(z_e.device.type, enabled=False):
            codes, costs = self._costs(self.project(z_e))
        return self._choose(codes, costs, loop, generator).codes

    @torch.no_grad()
    def posterior_scores(self, z_e: Tensor, beta: float | None) -> tuple[Tensor, bool]:
        if beta is None:
            return super().posterior_scores(z_e, beta)
        self.check_weighs_prior()
        with torch.autocast(z_e.device.type, enabled=False):
            return -self._costs(self.project(self.prepared(z_e)))[1] / beta, True

    def _costs(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest codes "b *grid", and c of `vqvae.quantizers.prior_in_loop` "b *grid k", with its gradient."""
        vectors, shape = pack([projected], "* d")
        table = self.table
        # Of ‖z − e‖² the part ‖z‖² is the same for all codes. From the nearest on, so that where σ² is next to nothing,
        # that one costs nothing and the others may be infinite.
        distances = table.square().sum(1) / 2 - vectors @ table.T
        distances = distances - distances.detach().amin(1, keepdim=True)
        variance = (SPREAD * self.error).to(distances)
        return unpack(nearest(vectors, table), shape, "*")[0], unpack(distances / variance, shape, "* k")[0]

    def _choose(self, codes: Tensor, costs: Tensor, loop: PriorInTheLoop, generator: torch.Generator | None) -> Chosen:
        costs = costs.detach()
        noise = gumbel_noise(costs, generator) if self.training or generator is not None else None
        if loop.num_iterations is None:
            return step_by_step(costs, loop, noise)
        zero = costs.new_zeros(len(costs))
        return Chosen(jacobi(codes, costs, loop, noise, loop.num_iterations), zero, zero, zero)

    def e_step(self, vectors: Tensor, table: Tensor) -> Tensor | None:
        """The codes "n num_samples" that each vector counts towards in training; None is its nearest one."""
        return None

    def terms(self, vectors: Tensor, chosen: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        return {"commitment": self.commitment_weight * masked_mean((vectors - chosen.detach()).square(), valid)}

    def vectors_of(self, codes: Tensor) -> Tensor:
        return self.table[codes]

    @torch.no_grad()
    def _gather(self, vectors: Tensor, nearest_vectors: Tensor, found: Tensor, valid: Tensor | None) -> None:
        weights = torch.ones_like(found[:, 0]) if valid is None else valid
        errors = (vectors - nearest_vectors).square_().mean(1)
        self.sums_of_step["errors"].add_((errors * weights).sum())
        counts, sums = self.sums_of_step["counts"], self.sums_of_step["vectors"]
        weighted = (vectors * weights[:, None]).to(sums.dtype)
        for codes in found.unbind(1):  # whole counts, which are exact; `update` divides them
            counts.scatter_add_(0, codes, weights.to(counts.dtype))
            sums.index_add_(0, codes, weighted)
        if self.revival != "off" or not self.has_started:  # else nobody draws from the pool
            self.pool.add(vectors, valid, self.num_updates)

    @torch.no_grad()
    def update(self) -> None:
        self.sums_of_step.reduce()
        total = self.sums_of_step["counts"].sum() / self.num_samples
        counts, sums = (self.sums_of_step[name].div_(self.num_samples) for name in ("counts", "vectors"))
        if total == 0:  # nothing was quantised in training mode since the last update, by any process
            return
        if self.num_updates == 0:
            self._start(total)
        else:
            self._measure(total)
            self.learn(counts, sums)
            if self.revival == "dead":
                self._revive_dead(counts, total)
            elif self.revival == "clustered":
                self._revive_clustered(counts, total)
        self.num_updates += 1
        self.has_started = True
        super().update()

    def _measure(self, total: Tensor) -> None:
        # The first step's codes were those before the start, and say nothing.
        weight = 1.0 if self.num_updates == 1 else 1 - VARIANCE_DECAY
        error = (self.sums_of_step["errors"] / total).clamp_min(torch.finfo(self.error.dtype).tiny)
        self.error.lerp_(error.to(self.error), weight)

    def learn(self, counts: Tensor, sums: Tensor) -> None:
        """Move the codebook to the step's statistics; a learned codebook has its gradient instead."""

    def _start(self, total: Tensor) -> None:
        """The k-means centres of the first step's vectors."""
        centres = kmeans(self.pool.joint(), self.pool.draw(self.num_codes), self.normalize)
        share = total / self.num_codes
        if self.revival == "dead":
            self.traffic.fill_(share)
        self.reset_codes(torch.ones_like(self.traffic), centres, share)

    def _revive_dead(self, counts: Tensor, total: Tensor) -> None:
        self.traffic.lerp_(counts.to(self.traffic), 1 - DEAD_DECAY)
        dead = self.traffic < DEAD_SHARE * self.traffic.mean()
        num_dead = int(dead.sum())  # waits for the device
        if num_dead:
            share = total / self.num_codes
            vectors = torch.zeros_like(self.table)
            vectors[dead] = self.pool.draw(num_dead)
            self.traffic[dead] = share.to(self.traffic.dtype)
            self.reset_codes(dead.to(vectors.dtype), vectors, share)

    def _revive_clustered(self, counts: Tensor, total: Tensor) -> None:
        self.traffic.lerp_((counts / total).to(self.traffic), 1 - CLUSTERED_DECAY)
        weights = torch.exp(-10 * self.num_codes * self.traffic / (1 - CLUSTERED_DECAY) - 1e-3)
        self.reset_codes(weights, self.pool.draw(self.num_codes), total / self.num_codes)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalize={self.normalize}, revival={self.revival}"


def _mean_vectors(table: Tensor, codes: Tensor) -> Tensor:
    """The mean of the vectors of each row of codes "n m"; bit-equal to them where all are one code's."""
    first, *others = codes.unbind(1)
    mean = table[first]
    for count, column in enumerate(others, start=2):
        mean = torch.lerp(mean, table[column], 1 / count)
    return mean
