"""A decoder-only transformer over code grids.

    x_1 = start(label),  x_i = code(z_{i-1})  ->  `priors.trunk`  ->  features_i
    ln P(z_i | before, label) = log-softmax(Linear(features_i))

The trunk, with its sources, is described in `priors.trunk`; all around it is in `priors.raster`.

Residual and grouped codes, "b h w d", are a grid of three axes like any other: flattened, one code a step
(`DepthTransformerPrior` takes one step of its large trunk for all d).
"""

from priors.raster import RasterPrior
from priors.trunk import GridTrunk


class TransformerPrior(RasterPrior):
    """An autoregressive transformer over a code grid; its options are those of `TrunkPrior` and `TrunkModel`.

    >>> prior = TransformerPrior(num_codes=512, grid=(7, 7), num_classes=10)
    >>> prior.log_prob(torch.zeros(3, 7, 7, dtype=torch.int64)).shape
    torch.Size([3])
    """

    def make_trunk(self) -> GridTrunk:
        return GridTrunk(self.config, self.grid)
