"""Quantizers that treat every position on its own: the common frame of all kinds but the compositions."""

import abc
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from einops import pack
from jaxtyping import Float, Int
from torch import Tensor

from vqvae.quantizers.base import MASKED, Quantized, Quantizer
from vqvae.quantizers.step_statistics import Pool, Sums

# Codebooks up to this size have a histogram with an entry a code; larger ones are counted by sorting.
LISTED = 2**20
# Collapse is looked for this often (in updates), in a moving average over about fifty batches.
CHECK_EVERY = 50
USAGE_DECAY = 0.98
COLLAPSED = 0.1


class Assignment(NamedTuple):
    """What a kind finds for vectors "n d": their code vectors "n d", codes "n", and terms.

    Of sampled codes also the entropies of the posteriors and the codes' log-probabilities, in nats, "n".
    """

    chosen: Tensor
    codes: Tensor
    auxiliary: Mapping[str, Tensor]
    entropy: Tensor | None = None
    log_posterior: Tensor | None = None


class PositionwiseQuantizer(Quantizer):
    """Abstract: one codebook, one code a position."""

    # What to do about a collapse; each kind says what helps it.
    remedy = "lower the learning rate of the encoder, or use fewer codes"

    def __init__(self, *, num_codes: int, dim: int):
        super().__init__(num_codes=num_codes, dim=dim)
        # Codes used, relative to what an even use of all codes would have used of as many vectors.
        self.register_buffer("recent_usage", torch.ones(()), persistent=False)
        self.num_checked = 0
        self.warned = False
        # Whether an `update` found the codes started, so that forwards need not gather for their start. Not asked of a
        # buffer, which would wait for the device.
        self.has_started = False
        # What forwards gather for the next `update`; no buffers, see `vqvae.quantizers.step_statistics`.
        self.gathered: tuple[Sums | Pool, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PositionwiseQuantizer":
        super()._apply(fn, recurse)
        for each in self.gathered:
            each.apply(fn)
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        super()._load_from_state_dict(*args, **options)
        self.has_started = False  # what was loaded may be from before the start

    @abc.abstractmethod
    def assign(self, vectors: Tensor, valid: Tensor | None) -> Assignment:
        """Codes of vectors "n d"; `valid` "n" is False at those that do not count, which are zeros."""

    @abc.abstractmethod
    def vectors_of(self, codes: Tensor) -> Tensor:
        """The vectors "n d" of valid codes "n"."""

    def draw_codes(self, vectors: Tensor, valid: Tensor | None, generator: torch.Generator) -> Assignment:
        """The same, with codes sampled from the posterior; for a stochastic kind."""
        return self.assign(vectors, valid)

    def quantize(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        vectors, _ = pack([z_e], "* d")
        valid = None if mask is None else mask.reshape(-1)
        found = self.assign(vectors, valid) if generator is None else self.draw_codes(vectors, valid, generator)
        return self.result(found, z_e, valid)

    def result(self, found: Assignment, z_e: Tensor, valid: Tensor | None) -> Quantized:
        """What was found for each vector of `z_e`, as the answer for whole images."""
        chosen, codes, auxiliary, entropy, log_posterior = found
        if valid is not None:
            codes = torch.where(valid, codes, MASKED)
            chosen = torch.where(valid[:, None], chosen, 0.0)
        usage, perplexity, dead_codes = statistics(codes, self.num_codes)
        if self.training:
            self._watch(dead_codes, len(codes) if valid is None else valid.sum())
        return Quantized(
            z_q=chosen.reshape(z_e.shape),
            codes=codes.reshape(z_e.shape[:-1]),
            auxiliary=auxiliary,
            entropy=self._per_image(entropy, valid, z_e),
            log_posterior=self._per_image(log_posterior, valid, z_e),
            usage=usage,
            perplexity=perplexity,
            dead_codes=dead_codes,
        )

    def _per_image(self, nats: Tensor | None, valid: Tensor | None, z_e: Tensor) -> Tensor:
        if nats is None:
            return z_e.new_zeros(len(z_e))
        nats = nats if valid is None else torch.where(valid, nats, 0.0)
        return nats.reshape(len(z_e), len(nats) // max(len(z_e), 1)).sum(1)

    def look_up(self, codes: Tensor) -> Tensor:
        chosen = self.vectors_of(codes.reshape(-1).clamp_min(0)).reshape(*codes.shape, self.dim)
        return torch.where((codes >= 0)[..., None], chosen, 0.0)

    @torch.no_grad()
    def _watch(self, dead_codes: Tensor, num_vectors: Tensor | int) -> None:
        num = torch.as_tensor(num_vectors, dtype=torch.float32, device=self.recent_usage.device)
        even = -self.num_codes * torch.expm1(num * torch.log1p(torch.tensor(-1 / self.num_codes, device=num.device)))
        now = (self.num_codes - dead_codes) / even.clamp_min(1)
        self.recent_usage.lerp_(torch.where(num > 0, now.to(self.recent_usage), self.recent_usage), 1 - USAGE_DECAY)

    def update(self) -> None:
        for each in self.gathered:
            each.clear()
        self.num_checked += 1
        if self.num_checked % CHECK_EVERY or self.warned:
            return
        usage = float(self.recent_usage)  # waits for the device, once in CHECK_EVERY updates
        if usage < COLLAPSED:
            self.warned = True
            warnings.warn(
                f"the codebook of {type(self).__name__} has collapsed: recent batches used {usage:.1%} of the codes "
                f"that an even use of {self.num_codes} would have; {self.remedy}",
                stacklevel=2,
            )

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}"


def code_counts(codes: Int[Tensor, " n"], num_codes: int) -> Float[Tensor, " k"]:
    """How often each code occurs, in float32 (exact below 2^24); masked positions are not counted."""
    valid = codes >= 0
    counts = torch.zeros(num_codes, dtype=torch.float32, device=codes.device)
    return counts.scatter_add_(0, codes.clamp_min(0), valid.float())


def statistics(
    codes: Int[Tensor, " n"], num_codes: int
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Int[Tensor, ""]]:
    """Usage, perplexity (1 where nothing was counted) and the number of codes that do not occur.

    In memory of the smaller of the codebook's and the batch's size, so that 2^36 codes can be counted.
    """
    if num_codes <= LISTED:
        counts = code_counts(codes, num_codes)
    else:
        # Sorted, equal codes are runs; the n-th run's length is a count. There are at most as many runs as codes here.
        ordered = codes.sort().values
        starts = torch.ones_like(ordered)
        starts[1:] = (ordered[1:] != ordered[:-1]).long()
        counts = torch.zeros(len(codes), dtype=torch.float32, device=codes.device).scatter_add_(
            0, starts.cumsum(0) - 1, (ordered >= 0).float()
        )
    used = (counts > 0).sum()
    probs = counts / counts.sum().clamp_min(1)
    perplexity = torch.special.entr(probs).sum().exp()
    return used.float() / num_codes, perplexity, num_codes - used


def counted(vectors: Float[Tensor, "n d"], valid: Tensor | None) -> Float[Tensor, " n"]:
    """The weight of each vector in a mean over those that count: one or zero."""
    return torch.ones_like(vectors[:, 0]) if valid is None else valid.to(vectors.dtype)


def masked_mean(values: Float[Tensor, "n *w"], valid: Tensor | None) -> Float[Tensor, ""]:
    """The mean over the vectors that count (and all their elements); zero where none does."""
    if valid is None:
        return values.sum() / max(values.numel(), 1)
    width = values[0].numel() if len(values) else 1
    spread = valid.reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(spread, values, 0.0).sum() / (valid.sum() * width).clamp_min(1)


def none_is_zero(term: Float[Tensor, ""], vectors: Float[Tensor, "n d"], valid: Tensor | None) -> Float[Tensor, ""]:
    """A term of the mean over vectors, which is zero where none counts."""
    if valid is None:
        return term if len(vectors) else torch.zeros_like(term)
    return torch.where(valid.any(), term, 0.0)
