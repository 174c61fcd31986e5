"""Vector quantisation with a codebook that is learned by gradients or by moving averages.

van den Oord et al. 2017, "Neural Discrete Representation Learning" (equations 1-3, appendix A.1); Razavi et al. 2019,
"Generating Diverse High-Fidelity Images with VQ-VAE-2". With sg for stop-gradient and e_k the codes:

    code        k = argmin_k ‖z_e − e_k‖²                        output  z_q = z_e + sg(e_k − z_e)
    learned     codebook_weight · mse(sg z_e, e_k)  +  commitment_weight · mse(z_e, sg e_k)
    EMA         commitment only;   N ← γN + (1−γ)n,   m ← γm + (1−γ)Σz,   e = m / N̂,
                N̂_k = (N_k + ε) / (ΣN + Kε) · ΣN

Departures: the codebook starts as the k-means centres of the first batch (Łańcucki et al. 2020), and a code whose
share of the traffic stays under a tenth of an even share is revived as a vector of the current batch (Dhariwal et al.
2020, "Jukebox"), its statistics with it. Both happen in `update`, never in the forward pass. With `normalize`, features
and codes are unit vectors in search, losses and output (Yu et al. 2021, "ViT-VQGAN").
"""

import abc
from dataclasses import dataclass

import torch
from einops import pack, unpack
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vqvae.quantizers.base import (
    MASKED,
    Quantized,
    Quantizer,
    code_counts,
    straight_through,
    usage_and_perplexity,
)
from vqvae.quantizers.nearest import nearest

# Traffic is averaged over about ten updates: an encoder that moves fast, as at the start, leaves codes behind fast.
DECAY = 0.9
# A revived code starts with an even share of the traffic and has 22 updates (0.9^22 = 0.1) to earn a tenth of it.
REVIVE_SHARE = 0.1
# Vectors kept between a forward and its update, for k-means and revival.
POOL_PER_CODE = 8
KMEANS_STEPS = 10


class _CodebookQuantizer(Quantizer):
    """What the learned and the EMA codebook share: search, decoding, traffic, k-means start and revival."""

    def __init__(self, *, num_codes: int, dim: int, commitment_weight: float, normalize: bool, revival: bool):
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"expected at least one code of width at least one, got num_codes={num_codes}, dim={dim}")
        self.num_codes = num_codes
        self.dim = dim
        self.commitment_weight = commitment_weight
        self.normalize = normalize
        self.revival = revival
        self.register_buffer("traffic", torch.ones(num_codes))  # moving average of counts
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        # Gathered by forwards, consumed by `update`: never saved, since a checkpoint is taken after an update.
        self.register_buffer("new_counts", torch.zeros(num_codes), persistent=False)
        self.register_buffer("new_sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("pool", torch.zeros(POOL_PER_CODE * num_codes, dim), persistent=False)
        self.register_buffer("pool_size", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    @abc.abstractmethod
    def table(self) -> Float[Tensor, "k d"]:
        """The codes as `decode` gives them: float32, unit vectors where normalised."""

    @abc.abstractmethod
    def overwrite(self, which: Bool[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]) -> None:
        """Put `vectors[k]` in place of each code k in `which`, with statistics of `share` vectors."""

    def forward(self, z_e: Float[Tensor, "b *grid d"], mask: Bool[Tensor, "b *grid"] | None = None) -> Quantized:
        self.check_features(z_e, mask)
        with torch.autocast(z_e.device.type, enabled=False):
            vectors, shape = pack([z_e.float()], "* d")
            kept = None if mask is None else mask.reshape(-1)
            # Masked places may hold anything, NaN too: they are searched as zeros and their answer is dropped.
            vectors = vectors if kept is None else torch.where(kept[:, None], vectors, 0.0)
            if self.normalize:
                vectors = F.normalize(vectors, dim=-1)
            table = self.table
            codes = nearest(vectors, table)
            chosen = table[codes]
            if kept is not None:
                codes = torch.where(kept, codes, MASKED)
                chosen = torch.where(kept[:, None], chosen, 0.0)
            counts = code_counts(codes, self.num_codes)
            if self.training:
                self._gather(vectors.detach(), codes, counts, kept)
            num_elements = self.dim * (counts.sum() if kept is not None else len(vectors))
            auxiliary = self._auxiliary(vectors, chosen, num_elements)
            z_q = straight_through(vectors, chosen.detach())
            usage, perplexity = usage_and_perplexity(counts)
        return Quantized(
            z_q=unpack(z_q, shape, "* d")[0],
            codes=unpack(codes, shape, "*")[0],
            auxiliary=auxiliary,
            entropy=z_e.new_zeros(z_e.shape[0], dtype=torch.float32),
            usage=usage,
            perplexity=perplexity,
        )

    def _auxiliary(self, vectors: Tensor, chosen: Tensor, num_elements: Tensor | int) -> dict[str, Tensor]:
        error = (vectors - chosen.detach()).square().sum() / max_one(num_elements)
        return {"commitment": self.commitment_weight * error}

    def decode(self, codes: Int[Tensor, "b *grid"]) -> Float[Tensor, "b *grid d"]:
        self.check_codes(codes)
        vectors = self.table[codes.clamp_min(0)]
        return torch.where((codes >= 0)[..., None], vectors, 0.0)

    @torch.no_grad()
    def _gather(self, vectors: Tensor, codes: Tensor, counts: Tensor, kept: Tensor | None) -> None:
        self.new_counts += counts
        index = codes.clamp_min(0)
        self.new_sums.index_add_(0, index, vectors)  # masked vectors are zeros
        # The newest vectors come first; a stride spreads the sample over the whole batch. Masked ones sort last.
        size = len(self.pool)
        order = torch.arange(len(vectors), device=vectors.device)
        if kept is not None:
            order = torch.sort((~kept).to(torch.int8), stable=True).indices
        num_kept = counts.sum().to(torch.int64)
        picks = (torch.arange(size, device=vectors.device) * num_kept.clamp_min(1)) // max(size, 1)
        if len(vectors) <= size:
            picks = torch.arange(size, device=vectors.device) % num_kept.clamp_min(1)
        self.pool.copy_(torch.where(num_kept > 0, vectors[order[picks]], self.pool))
        self.pool_size.copy_(torch.where(num_kept > 0, num_kept.clamp_max(size), self.pool_size))

    @torch.no_grad()
    def update(self) -> None:
        self._reduce()
        total = self.new_counts.sum()
        if self.pool_size == 0:
            return  # nothing was quantised in training mode since the last update
        if self.num_updates == 0:
            self._start()
        else:
            self._learn(self.new_counts, self.new_sums)
            self.traffic.lerp_(self.new_counts, 1 - DECAY)
            if self.revival:
                self._revive(total)
        self.num_updates += 1
        self.new_counts.zero_()
        self.new_sums.zero_()
        self.pool_size.zero_()

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        """Move the codebook to its statistics; a learned codebook has its gradient instead."""

    def _reduce(self) -> None:
        """Sum the statistics of all processes in one reduction; k-means and revival draw from the first one's pool."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
            return
        joint = torch.cat([self.new_counts[:, None], self.new_sums], dim=1)
        distributed.all_reduce(joint)
        self.new_counts.copy_(joint[:, 0])
        self.new_sums.copy_(joint[:, 1:])
        distributed.broadcast(self.pool, 0)
        distributed.broadcast(self.pool_size, 0)

    def _generator(self) -> torch.Generator:
        """Draws depend on the number of updates alone: equal on every process, and after a resume."""
        return torch.Generator().manual_seed(int(self.num_updates))

    def _draw(self, num: int) -> Tensor:
        """`num` vectors of the pool; without repetition where it holds that many."""
        size = int(self.pool_size)
        generator = self._generator()
        picks = torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-num // size))])[:num]
        return self.pool[picks.to(self.pool.device)]

    def _start(self) -> None:
        """k-means (Lloyd's algorithm) on the first batch's vectors; empty clusters take a random vector."""
        vectors = self.pool[: int(self.pool_size)]
        centres = self._draw(self.num_codes)
        # Copies of one vector would never part: shake all but the first round of draws by a thousandth of the spread.
        if self.num_codes > len(vectors):
            noise = torch.randn(centres.shape, generator=self._generator()).to(centres)
            noise[: len(vectors)] = 0
            centres = centres + 1e-3 * vectors.std().nan_to_num(0.0).clamp_min(1e-6) * noise
        for _ in range(KMEANS_STEPS):
            codes = nearest(vectors, centres)
            counts = code_counts(codes, self.num_codes)[:, None]
            sums = torch.zeros_like(centres).index_add_(0, codes, vectors)
            centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
            if self.normalize:
                centres = F.normalize(centres, dim=-1)
        share = self.new_counts.sum() / self.num_codes
        self.traffic.fill_(share)
        self.overwrite(torch.ones(self.num_codes, dtype=torch.bool, device=centres.device), centres, share)

    def _revive(self, total: Tensor) -> None:
        dead = self.traffic < REVIVE_SHARE * self.traffic.mean()
        if not dead.any():
            return
        share = total / self.num_codes
        vectors = torch.zeros_like(self.new_sums)
        vectors[dead] = self._draw(int(dead.sum()))
        self.traffic[dead] = share
        self.overwrite(dead, vectors, share)

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}, normalize={self.normalize}"


def max_one(value: Tensor | int) -> Tensor | int:
    return value.clamp_min(1) if isinstance(value, Tensor) else max(value, 1)


@dataclass(frozen=True, kw_only=True)
class VectorQuantizerConfig:
    """Options of `VectorQuantizer`."""

    num_codes: int = 512
    dim: int = 64
    codebook_weight: float = 1.0
    commitment_weight: float = 0.25
    normalize: bool = False
    revival: bool = True

    def build(self) -> "VectorQuantizer":
        return VectorQuantizer(**vars(self))


class VectorQuantizer(_CodebookQuantizer):
    """Vector quantisation whose codebook is a parameter, learned by the codebook term's gradient.

        q = VectorQuantizer(num_codes=1024, dim=64)(z_e)     # z_e: "b *grid 64"
        q.auxiliary["codebook"], q.auxiliary["commitment"]   # means over elements, weighted

    Args:
        codebook_weight: of `mse(sg z_e, e)`; 1 in the paper.
        commitment_weight: of `mse(z_e, sg e)`; 0.25 in the paper.
        normalize: compare and return unit vectors.
        revival: give codes without traffic a new place.
    """

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        codebook_weight: float = 1.0,
        commitment_weight: float = 0.25,
        normalize: bool = False,
        revival: bool = True,
    ):
        super().__init__(
            num_codes=num_codes,
            dim=dim,
            commitment_weight=commitment_weight,
            normalize=normalize,
            revival=revival,
        )
        self.codebook_weight = codebook_weight
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))

    @property
    def table(self) -> Float[Tensor, "k d"]:
        codebook = self.codebook.float()
        return F.normalize(codebook, dim=-1) if self.normalize else codebook

    def _auxiliary(self, vectors: Tensor, chosen: Tensor, num_elements: Tensor | int) -> dict[str, Tensor]:
        error = (vectors.detach() - chosen).square().sum() / max_one(num_elements)
        return {
            "codebook": self.codebook_weight * error,
            **super()._auxiliary(vectors, chosen, num_elements),
        }

    def overwrite(self, which: Bool[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]) -> None:
        self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))


@dataclass(frozen=True, kw_only=True)
class EMAVectorQuantizerConfig:
    """Options of `EMAVectorQuantizer`."""

    num_codes: int = 512
    dim: int = 64
    decay: float = 0.99
    commitment_weight: float = 0.25
    normalize: bool = False
    revival: bool = True

    def build(self) -> "EMAVectorQuantizer":
        return EMAVectorQuantizer(**vars(self))


class EMAVectorQuantizer(_CodebookQuantizer):
    """Vector quantisation whose codes are moving averages of the vectors that chose them.

    Args:
        decay: γ; 0.99 in the paper. Applied once per call of `update`.
        commitment_weight: of `mse(z_e, sg e)`; 0.25 in the paper.
        normalize: compare and return unit vectors.
        revival: give codes without traffic a new place.
    """

    EPSILON = 1e-5

    def __init__(
        self,
        *,
        num_codes: int = 512,
        dim: int = 64,
        decay: float = 0.99,
        commitment_weight: float = 0.25,
        normalize: bool = False,
        revival: bool = True,
    ):
        super().__init__(
            num_codes=num_codes,
            dim=dim,
            commitment_weight=commitment_weight,
            normalize=normalize,
            revival=revival,
        )
        if not 0 <= decay < 1:
            raise ValueError(f"expected a decay in [0, 1), got {decay}")
        self.decay = decay
        self.register_buffer("codebook", torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))
        self.register_buffer("counts", torch.ones(num_codes))
        self.register_buffer("sums", self.codebook.clone())

    @property
    def table(self) -> Float[Tensor, "k d"]:
        return F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        total = self.counts.sum()
        smoothed = (self.counts + self.EPSILON) / (total + self.num_codes * self.EPSILON) * total
        self.codebook.copy_(self.sums / smoothed[:, None])

    def overwrite(self, which: Bool[Tensor, " k"], vectors: Float[Tensor, "k d"], share: Float[Tensor, ""]) -> None:
        self.codebook.copy_(torch.where(which[:, None], vectors, self.codebook))
        self.counts.copy_(torch.where(which, share, self.counts))
        self.sums.copy_(torch.where(which[:, None], vectors * share, self.sums))
