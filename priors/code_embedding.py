"""What transformers over codes share besides the trunk: codes to vectors, and logits to nats."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CodeEmbedding(nn.Embedding):
    """A vector of each code; in training a share `noise` of the codes is read as others, drawn evenly."""

    def __init__(self, num_codes: int, width: int, noise: float):
        super().__init__(num_codes, width)
        self.noise = noise

    def forward(self, input: Tensor) -> Tensor:
        """Vectors "*n w" of codes "*n"."""
        if self.training and self.noise > 0:
            wrong = torch.rand(input.shape, dtype=torch.float32, device=input.device) < self.noise
            input = torch.where(wrong, torch.randint_like(input, self.num_embeddings), input)
        return super().forward(input)

    def mixed(self, weights: Tensor) -> Tensor:
        """Vectors "*n w" of mixtures of codes, by their weights "*n k"."""
        return weights.to(self.weight.dtype) @ self.weight


def code_nats(logits: Tensor, codes: Tensor) -> Tensor:
    """-ln P of codes "b n" under logits "b n k", nats "b n"."""
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view_as(codes)
