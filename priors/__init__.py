"""Models of discrete code grids: what is left to say about an image once it is codes.

    from priors import TransformerPrior, TransformerPriorConfig

    prior = TransformerPrior(TransformerPriorConfig(num_codes=512, grid=(7, 7)))
    prior.log_prob(codes)      # nats, "b"; train on -prior(codes).mean()
    prior.sample(16)           # codes, int64 "16 7 7"

Knows nothing of images, and never imports `vqvae`.
"""

from priors.base import Prior
from priors.transformer import TransformerPrior, TransformerPriorConfig
from priors.uniform import UniformPrior
from priors.unigram import UnigramPrior

__all__ = ["Prior", "TransformerPrior", "TransformerPriorConfig", "UniformPrior", "UnigramPrior"]
