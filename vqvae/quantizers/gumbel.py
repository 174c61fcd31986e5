"""Gumbel softmax: a categorical posterior over codes whose logits are a linear map of the features.

Jang et al. 2016, "Categorical Reparameterization with Gumbel-Softmax"; Maddison et al. 2016; as a tokenizer, Ramesh et
al. 2021, "Zero-Shot Text-to-Image Generation" (dVAE). With logits l = W z + b and p = softmax(l), sampled as
`vqvae.quantizers.categorical` says:

    terms      kl_weight · KL(p ‖ uniform) = kl_weight · (ln K − H(p))
               + entropy_weight · (ln K − H(E_z[p]))

The last term is not the dVAE's; LFQ and IBQ have its like. Without it few codes are the most probable of any position.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from vqvae.quantizers.categorical import CategoricalQuantizer
from vqvae.quantizers.nearest_search import nearest
from vqvae.quantizers.positionwise import masked_mean, none_is_zero
from vqvae.quantizers.soft import entropy_of


class GumbelQuantizer(CategoricalQuantizer):
    """A sample of a categorical posterior over codes.

    Beside these its options are those of `CategoricalQuantizer`.

    Args:
        hard: as in `CategoricalQuantizer`; on, as in the dVAE.
        temperature: τ at the start, as in `CategoricalQuantizer`; 1.
        kl_weight: of KL(posterior ‖ uniform) in nats a position.
        entropy_weight: of what the entropy of all positions' codes lacks; 0 is the dVAE, which left most codes unused
            here.
    """

    remedy = "raise entropy_weight"

    def __init__(
        self,
        *,
        hard: bool = True,
        temperature: float = 1.0,
        kl_weight: float = 5e-4,
        entropy_weight: float = 0.2,
        **posterior: Any,
    ):
        super().__init__(hard=hard, temperature=temperature, **posterior)
        self.kl_weight = kl_weight
        self.entropy_weight = entropy_weight
        self.to_logits = nn.Linear(self.dim, self.num_codes)
        # Logits as wide as the features are long: from near-even posteriors a decoder learns little for long.
        nn.init.normal_(self.to_logits.weight)
        self.codebook = nn.Parameter(torch.randn(self.num_codes, self.dim))

    def logits(self) -> tuple[Tensor, Tensor]:
        return self.to_logits.weight.to(self.dtype), self.to_logits.bias.to(self.dtype)

    def most_probable(self, vectors: Tensor) -> Tensor:
        weight, bias = self.logits()
        return nearest(vectors, weight, -bias)

    def terms(
        self, vectors: Tensor, chosen: Tensor, entropies: Tensor, average: Tensor, valid: Tensor | None
    ) -> dict[str, Tensor]:
        most = math.log(self.num_codes)
        return {
            "kl": self.kl_weight * masked_mean(most - entropies, valid),
            "codebook_entropy_deficit": self.entropy_weight * none_is_zero(most - entropy_of(average), vectors, valid),
        }
