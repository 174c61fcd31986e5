"""Models of grids of codes or vectors: what is left to say about an image once it is latents.

    from priors import Sampling, TransformerPrior

    prior = TransformerPrior(num_codes=512, grid=(7, 7))
    prior.log_prob(codes)      # nats, "b"; train on -prior(codes).mean()
    prior.sample(16)           # codes, int64 "16 7 7"
    prior.sample(16, sampling=Sampling(temperature=0.9, top_p=0.95))
    prior.sample(16, sampling=Sampling(draft=draft))  # a `DraftHead` or a cheap prior proposes: the same, sooner

In place of raster order: `AnyOrderPrior` samples under any mask and several codes a step, `DepthTransformerPrior` is
for several codes a position, `NextScalePrior` for pictures of codes from coarse to fine. `LlamaPrior` is for software
that serves language models (`priors.llama_folder`). `PixelCNNPrior`, `NGramPrior`, `UnigramPrior` and `UniformPrior`
are what they have to beat. Real vectors:

    from priors import MixtureTransformerPrior

    prior = MixtureTransformerPrior(dim=4, grid=(7, 7))
    prior.log_prob(latents)    # nats of a density, "b"; latents "b 7 7 4"
    prior.sample(16)           # latents "16 7 7 4"

Knows nothing of images, and never imports `vqvae`.
"""

from priors.any_order import AnyOrderPrior
from priors.base import Prior
from priors.continuous import ContinuousPrior
from priors.depth import DepthTransformerPrior
from priors.draft_head import DraftHead
from priors.llama import LlamaPrior
from priors.mixture_transformer import MixtureTransformerPrior
from priors.next_scale import NextScalePrior
from priors.ngram import NGramPrior
from priors.normal import NormalPrior
from priors.pixelcnn import PixelCNNPrior
from priors.sampling import Sampling
from priors.transformer import TransformerPrior
from priors.uniform import UniformPrior
from priors.unigram import UnigramPrior

__all__ = [
    "AnyOrderPrior",
    "ContinuousPrior",
    "DepthTransformerPrior",
    "DraftHead",
    "LlamaPrior",
    "MixtureTransformerPrior",
    "NGramPrior",
    "NextScalePrior",
    "NormalPrior",
    "PixelCNNPrior",
    "Prior",
    "Sampling",
    "TransformerPrior",
    "UniformPrior",
    "UnigramPrior",
]
