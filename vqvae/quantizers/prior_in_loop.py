"""A prior in the loop: codes that are chosen, or sampled, by what they cost as well as by how near they are.

Chou, Lookabaugh & Gray 1989, "Entropy-constrained vector quantization". With σ² four times the mean squared distance
per dimension of vectors to their nearest codes, c_ik = ‖z_i − e_k‖²/2σ² stands for the distortion in nats that code k
at position i would bring. Weighing it against β times the rate gives, in the prior's order i = 1 … n,

    code        k_i = argmin_k  c_ik − β ln P_pri(k | k_1 … k_{i−1})
    posterior   P_enc(k | y, k_1 … k_{i−1}) ∝ P_pri(k | k_1 … k_{i−1}) · exp(−c_ik / β)

The code is entropy-constrained assignment, with a price that depends on the codes before where the paper has one price
a code. The posterior is what minimises E[c_i] + β·KL(P_enc ‖ P_pri); a draw from it is the code of

    k_i = argmax_k  ln P_pri(k | k_1 … k_{i−1}) − c_ik / β + g_ik        with Gumbel noise g

The choice at position i needs the codes before it: `step_by_step` is one walk of the prior. For training `jacobi` is
faster: it chooses at all positions at once, given the codes of the iteration before, starting with the nearest codes.
After iteration s the first s positions are those of the walk and stay so: as many iterations as positions are the walk,
one comes close.

Training samples codes, and minimises distortion + β · Σ_i KL(P_enc(· | y, codes before) ‖ P_pri(· | codes before)). Its
gradient reaches the prior by the cross entropy, and the encoder by c, beside what comes straight through from the
decoder.

Why four times: what a code's distance does to the distortion is not known before it is decoded, and mean squared
distances overstate it; the negative ELBO is least there.

A quantizer that has a posterior of its own takes the prior's gradient through its relaxed sample w instead:

    rate        −Σ_i Σ_k q_ik ln P_pri(k | w_1 … w_{i−1}),        q_i the posterior at position i

which reaches the encoder by q, exactly given the context, and by the context.

The prior's conditionals, positions times codes for each image, are held: this is for codebooks that a prior can list.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqvae.quantizers.soft import entropy_of

# σ² in mean squared distances, see above.
SPREAD = 4.0

Conditionals = Callable[[Tensor], Tensor]
Chooser = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PriorInTheLoop:
    """A prior as a quantizer sees it.

    Attributes:
        log_conditionals: gives ln P(z_i = · | codes before i), `"b *grid k"` in nats, of codes `"b *grid"`.
        relaxed_log_conditionals: the same of weights `"b *grid k"` in place of codes, differentiable.
        walk: steps through the positions in the prior's order, shows a chooser ln P(· | codes before) `"b k"`, and goes
            on with the codes `"b"` that it returns; gives all of them, `"b *grid"`.
        beta: weight of the rate, above zero; 1 is that of the bound.
        num_iterations: Jacobi iterations in place of the walk: fast, nearly the same, and without entropies; None is
            the walk.

    Raises:
        ValueError: a beta that is no positive number, or no iteration.
    """

    log_conditionals: Conditionals
    relaxed_log_conditionals: Conditionals
    walk: Callable[[Chooser], Tensor]
    beta: float = 1.0
    num_iterations: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise ValueError(f"expected a finite beta above zero, got {self.beta}; leave the prior out for none")
        if self.num_iterations is not None and self.num_iterations < 1:
            raise ValueError(f"expected at least one iteration, or None for the walk, got {self.num_iterations}")


class Chosen(NamedTuple):
    """Codes "b *grid", −ln P_pri(codes), and of sampled ones the posterior's entropy and ln P_enc(codes), nats "b"."""

    codes: Tensor
    rate: Tensor
    entropy: Tensor
    log_posterior: Tensor


@torch.no_grad()
def step_by_step(
    costs: Float[Tensor, "b *grid k"], loop: PriorInTheLoop, noise: Float[Tensor, "b *grid k"] | None = None
) -> Chosen:
    """The module's codes, or with Gumbel noise draws from its posterior.

    The entropy of draws is Σ_i H(P_enc(· | y, codes before i)), whose mean over draws is that of the posterior; without
    noise it is zero, and so is ln P_enc.

    Args:
        costs: c, less anything that is the same for all codes of a position.
    """
    positions = iter(costs.flatten(1, -2).unbind(1))
    noises = None if noise is None else iter(noise.flatten(1, -2).unbind(1))
    rate, entropy, log_posterior = costs.new_zeros(3, len(costs))

    def chooser(conditionals: Tensor) -> Tensor:
        nonlocal rate, entropy, log_posterior
        scores = conditionals - next(positions) / loop.beta
        if noises is None:
            codes = scores.argmax(-1)
        else:
            log_probs = scores.log_softmax(-1)
            codes = (log_probs + next(noises)).argmax(-1)
            entropy = entropy + entropy_of(log_probs.exp())
            log_posterior = log_posterior + log_probs.gather(-1, codes[:, None])[:, 0]
        rate = rate - conditionals.gather(-1, codes[:, None])[:, 0]
        return codes

    return Chosen(loop.walk(chooser), rate, entropy, log_posterior)


@torch.no_grad()
def jacobi(
    start: Int[Tensor, "b *grid"],
    costs: Float[Tensor, "b *grid k"],
    loop: PriorInTheLoop,
    noise: Float[Tensor, "b *grid k"] | None,
    num_iterations: int,
) -> Int[Tensor, "b *grid"]:
    """Nearly the codes of `step_by_step`, and those themselves after as many iterations as positions."""
    codes = start
    for _ in range(num_iterations):
        scores = loop.log_conditionals(codes) - costs / loop.beta
        codes = (scores if noise is None else scores + noise).argmax(-1)
    return codes


def posterior_at(codes: Int[Tensor, "b *grid"], costs: Float[Tensor, "b *grid k"], loop: PriorInTheLoop) -> Chosen:
    """Codes with the exact rate and entropy of the posterior at each position, given the codes before, with gradients.

    The rate is Σ_i E[−ln P_pri(k_i | codes before i)], a cross entropy that teaches the prior what the posterior is; by
    the costs both reach the features, and a codebook that gradients learn.
    """
    log_conditionals = loop.log_conditionals(codes)
    log_probs = (log_conditionals.detach() - costs / loop.beta).log_softmax(-1)
    probs = log_probs.exp()
    return Chosen(
        codes=codes,
        rate=-(probs * log_conditionals).flatten(1).sum(1),
        entropy=entropy_of(probs).flatten(1).sum(1),
        log_posterior=log_probs.detach().gather(-1, codes[..., None]).flatten(1).sum(1),
    )


def rate_of(codes: Int[Tensor, "b *grid"], loop: PriorInTheLoop) -> Float[Tensor, " b"]:
    """−ln P(codes) in nats, with the gradient to the prior."""
    return -loop.log_conditionals(codes).gather(-1, codes[..., None]).flatten(1).sum(1)


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise."""
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return -(-uniform.log()).log()
