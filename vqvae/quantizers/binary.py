"""What the kinds have in common whose codes are signs: numbering, and the entropies of independent bits.

Codes are binary numbers, a bit a channel, 1 for a positive sign; the first channel is the lowest bit.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from vqvae.quantizers.positionwise import masked_mean


def pack_bits(bits: Bool[Tensor, "n d"]) -> Int[Tensor, " n"]:
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


def unpack_signs(codes: Int[Tensor, " n"], num_bits: int, dtype: torch.dtype) -> Float[Tensor, "n d"]:
    """-1 and 1."""
    return 2 * (codes[..., None] >> torch.arange(num_bits, device=codes.device) & 1).to(dtype) - 1


def check_bits(num_bits: int, limit: int, reason: str) -> None:
    if not 1 <= num_bits <= limit:
        raise ValueError(f"expected 1 to {limit} bits, got {num_bits}: {reason}")


def per_sample_entropy(logits: Float[Tensor, "n d"], valid: Tensor | None) -> Float[Tensor, ""]:
    """The mean over vectors of the entropy of d independent bits with these log-odds, in nats."""
    entropies = F.softplus(logits) - logits * torch.sigmoid(logits)
    return masked_mean(entropies.sum(-1), valid)


def average_codes(logits: Float[Tensor, "n d"], valid: Tensor | None) -> Float[Tensor, " k"]:
    """The mean over vectors of each of the 2^d codes' probabilities, without a matrix of n x 2^d.

    Bits are independent given the vector, so a code's probability is that of its low half times that of its high half,
    and the mean over vectors of the products is one matrix product of n x 2^(d/2) factors.
    """
    num = logits.shape[-1]
    low, high = (_half_codes(half) for half in logits.split([num // 2, num - num // 2], dim=-1))
    if valid is not None:
        low = torch.where(valid[:, None], low, 0.0)
    total = max(len(logits), 1) if valid is None else valid.sum().clamp_min(1)
    return (high.T @ low / total).reshape(-1)


def _half_codes(logits: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    num = logits.shape[-1]
    bits = (unpack_signs(torch.arange(2**num, device=logits.device), num, logits.dtype) + 1) / 2
    return (F.logsigmoid(logits) @ bits.T + F.logsigmoid(-logits) @ (1 - bits).T).exp()
