"""The interface of a prior over grids of real vectors, the latents of a Gaussian encoder.

A continuous prior is a density p(z) over grids z of `math.prod(grid)` positions, each a vector of R^d:

    ln p(z | label) = sum_i ln p(z_i | z_1 .. z_{i-1}, label)

in raster order (row-major over `grid`, the last axis fastest). It is a density, so -ln p(z) may be
negative and changes with the unit of z; in the ELBO it is the difference to the posterior's own
density, -ln p(z) + ln q(z | image), that is free of units and counts.

A prior knows nothing of images. Its outputs are at least float32; `prior.double()` gives float64.
"""

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from priors.draws import check_room
from priors.grid import GridModel, check_size
from priors.sampling import Sampling, check_sampling
from safefolder import arrays
from safefolder.arrays import Labels, Vectors
from safefolder.configured import ConfiguredOptions
from safefolder.options import Given


class ContinuousPrior(GridModel):
    """A density over grids of vectors. Models fill in the methods marked abstract, and only those.

    Args:
        dim: channels d of the vector at each position.

    Attributes: `dim` d, the width of a vector; `grid`, e.g. (7, 7); `num_classes`, None for an
    unconditional prior.
    """

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        check_size(options.dim, "dim")
        super().check_options(options)

    def __init__(self, *, dim: Given[int] = 8, **grid: Any):
        super().__init__(**grid)
        self.dim = dim

    @abstractmethod
    def _log_prob(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Nats "b" of checked latents "b n d" (flattened, in this prior's `dtype`) and labels "b"."""

    @abstractmethod
    def _sample(self, num: int, labels: Tensor | None, temperature: float, generator: torch.Generator | None) -> Tensor:
        """Latents "b n d", sampled in evaluation mode and without gradients."""

    def log_prob(self, latents: Vectors, labels: Labels | None = None) -> Float[Tensor, " b"]:
        """Log-density of whole grids, in nats; gradients reach the latents too.

        Without labels a class-conditional prior gives the density under "no label".
        Raises ValueError for latents that are not floating point, not finite or of a wrong shape, and
        for labels of a wrong type, shape or range.
        """
        found = self._check_latents(latents)
        return self._log_prob(found, self._check_labels(labels, len(found)))

    def forward(self, latents: Vectors, labels: Labels | None = None) -> Float[Tensor, " b"]:
        """`log_prob`, so that wrappers of modules (Fabric, DDP, compile) see it."""
        return self.log_prob(latents, labels)

    @torch.no_grad()
    def sample(
        self,
        num: int,
        labels: Labels | None = None,
        sampling: Sampling = Sampling(),
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b *grid d"]:
        """Draw `num` grids. The same seed of `generator` gives the same latents.

        Args:
            labels: class of each grid "b", or one class for all of them; None samples under "no label".
            sampling: of which there is only the temperature T. It multiplies every Gaussian's standard deviation, and
                weights w of a mixture become w^(1/T), normalised. 1 is the model itself, 0 takes the mean of the
                heaviest component at each position.
            generator: of the draws; torch's global one unless given.

        Raises ValueError for a bad count or labels, more grids than memory holds, and options that it does not have.
        """
        check_sampling(sampling)
        if others := [name for name in sampling.changed() if name != "temperature"]:
            told = " and ".join(f"{name}={getattr(sampling, name)!r}" for name in others)
            raise ValueError(
                f"got {told}, expected only a temperature: {type(self).__name__} samples vectors, not codes"
            )
        num = self._check_num(num)
        check_room(num, self.dtype.itemsize * self.num_positions * self.dim, self.device, "sample fewer at a time")
        found = self._check_labels(labels, num)
        with self.evaluating():
            latents = self._sample(num, found, sampling.temperature, generator)
        return latents.reshape(num, *self.grid, self.dim)

    def _check_latents(self, latents: Vectors) -> Tensor:
        """The latents as "b n d" on this prior's device, in its dtype."""
        latents = arrays.vectors(latents, "latents")
        if latents.ndim < 1 or tuple(latents.shape[1:]) != (*self.grid, self.dim):
            expected = ", ".join(map(str, ("b", *self.grid, self.dim)))
            raise ValueError(f"got latents of shape {tuple(latents.shape)}, expected ({expected})")
        latents = latents.to(device=self.device, dtype=self.dtype)
        # One host sync; none while compiling.
        if not torch.compiler.is_compiling() and not bool(latents.isfinite().all()):
            num_bad = int((~latents.isfinite()).sum())
            raise ValueError(
                f"got latents with {num_bad} of {latents.numel()} values NaN or infinite as {self.dtype}, "
                "expected finite numbers: see whether the encoder's training diverged"
            )
        return latents.reshape(len(latents), self.num_positions, self.dim)


def draw_noise(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Standard normal numbers; a generator on the CPU gives the same ones to a model on any device."""
    source = device if generator is None else generator.device
    return torch.randn(shape, dtype=dtype, device=source, generator=generator).to(device)
