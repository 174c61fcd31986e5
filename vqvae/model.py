"""VQVAE: images to codes and back, with a proper likelihood (van den Oord et al. 2017).

    images ──Encoder──> z_e ──Quantizer──> codes, z_q ──Decoder──> features ──Likelihood──> −ln P_dec(y|z) in nats
      uint8              "b h w d"         int64 "b h w"            "b f H W"                 distortion, "b"

What it shares with other autoencoders, and the objective of training, is in `vqvae.autoencoder`; its auxiliary terms
are the quantizer's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safefolder import arrays
from safefolder.arrays import Codes, Labels
from vqvae.autoencoder import Autoencoder, Output
from vqvae.bound import PriorLike, check_fit
from vqvae.levels import Images, times
from vqvae.metrics import CodeUsage
from vqvae.quantizers import EMAVectorQuantizer, Quantized, Quantizer
from vqvae.quantizers.base import own_generator
from vqvae.quantizers.prior_in_loop import PriorInTheLoop
from vqvae.residual import ResidualAutoencoder


@dataclass(frozen=True, kw_only=True)
class VQVAEOutput(Output):
    """The result of a forward pass.

    Attributes:
        quantized: codes, their vectors, auxiliary terms and the state of the codebook.
        rate: of the codes under the prior in the loop, in nats per image, `"b"`, with its gradient; None without one.
    """

    quantized: Quantized
    rate: Float[Tensor, " b"] | None = None

    @property
    def counted(self) -> Int[Tensor, "b *grid"]:
        """The codes."""
        return self.quantized.codes


class VQVAE(ResidualAutoencoder):
    """A tokenizer of images.

    `grid` holds the axes of the codes of one image: (h, w); (h, w, depth) for residual and grouped quantizers, and
    (positions,) for a multi-scale one.

        model = VQVAE(image_size=32, num_channels=3)
        codes = model.encode(images)          # uint8 "b 3 32 32" -> int64 "b 8 8"; other sizes have other grids
        model.decode(codes)                   # uint8 "b 3 32 32", the likelihood's point estimate
        model(images).distortion              # nats per image, "b"

    The networks are convolutions: images of any height and width that the factor divides have codes, and any grid of
    codes an image. `image_size` is that of training, and of `grid`; a prior is for one grid. Where the quantizer or
    attention ties positions to each other, other sizes work, or are refused, as those say.

    What people mean is taken (`safefolder.options`): `VQVAE(image_size=(64, 64), quantizer="FSQ", likelihood="Normal")`
    has an `image_size` of 64, and the defaults of each kind.

    Args:
        quantizer: which quantizer, and its options; its `dim` is the width of `z_e`.
        beta: weight of the rate of a prior in the loop (`vqvae.quantizers.prior_in_loop`); None is without one.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(
        self, *, quantizer: Quantizer.Config = EMAVectorQuantizer.Config(), beta: float | None = None, **networks: Any
    ):
        super().__init__(**networks)
        if beta is not None and not 0 < beta < math.inf:
            raise ValueError(f"expected a finite beta above zero, or None for no prior in the loop, got {beta}")
        self.quantizer = quantizer.build()
        if beta is not None:
            self.quantizer.check_weighs_prior()
        self.grid = self.latent_grid(self.feature_grid)
        self.make_networks(encoded=self.quantizer.dim, decoded=self.quantizer.dim)

    def latent_grid(self, feature_grid: tuple[int, int]) -> tuple[int, ...]:
        """The axes of the codes of one image with features of these rows and columns."""
        return self.quantizer.code_grid(feature_grid)

    @property
    def num_codes(self) -> int:
        return self.quantizer.num_codes

    @property
    def stochastic(self) -> bool:
        """Whether there is a posterior over codes to sample from."""
        return self.quantizer.stochastic

    def forward(self, images: Images, loop: PriorInTheLoop | None = None) -> VQVAEOutput:
        """Images (uint8, or float in [0, 1]) to distortion and codes, with or without a prior in the loop.

        Raises:
            ValueError: another shape, another dtype, floats outside [0, 1], or a quantizer that takes no prior.
        """
        levels = self.to_levels(images)
        if loop is None:
            return self._output(levels, self.quantizer(self.encoder(levels)))
        return self._output(levels, *self.quantizer.through_prior(self.encoder(levels), loop))

    @torch.no_grad()
    def draw(
        self, images: Images, generator: torch.Generator | None = None, loop: PriorInTheLoop | None = None
    ) -> VQVAEOutput:
        """`forward` in evaluation, with codes sampled from the posterior P_enc(z|y). Errors as `forward`."""
        with self.evaluating():
            levels = self.to_levels(images)
            z_e = self.encoder(levels)
            if loop is None:
                return self._output(levels, self.quantizer.draw(z_e, generator=generator))
            if generator is None:
                generator = own_generator(z_e.device)
            return self._output(levels, *self.quantizer.through_prior(z_e, loop, generator))

    def loop(
        self, prior: "LoopPrior", labels: Labels | None, num: int, beta: float, num_iterations: int | None = None
    ) -> PriorInTheLoop:
        """A prior for the codes of `num` images with these labels, as `forward` and `draw` take it."""
        known = None
        if prior.num_classes is not None and labels is not None:
            known = arrays.labels_for(labels, num, self.quantizer.device)
        return PriorInTheLoop(
            log_conditionals=lambda codes: prior.log_conditionals(codes, known),
            relaxed_log_conditionals=lambda weights: prior.relaxed_log_conditionals(weights, known),
            walk=lambda chooser: prior.walk(num, chooser, known),
            beta=beta,
            num_iterations=num_iterations,
        )

    def through(
        self, prior: "LoopPrior", labels: Labels | None = None, num_iterations: int | None = None
    ) -> "Autoencoder | PriorGuidedEncoder":
        """The encoder with the prior in its loop, where `config.beta` says so; else the model itself.

        `num_iterations` is for codes to train on; the bound asks for the walk, which is None.

        Raises:
            ValueError: a prior for other codes.
        """
        if self.config.beta is None:
            return self
        check_fit(self, prior)
        return PriorGuidedEncoder(
            model=self, prior=prior, labels=labels, beta=self.config.beta, num_iterations=num_iterations
        )

    def posterior_scores(self, images: Images) -> tuple[Float[Tensor, "b *grid k"], bool]:
        """Scores whose log-softmax is the posterior over codes, and whether the prior's conditional is added first.

        In evaluation; see `vqvae.quantizers.Quantizer.posterior_scores`.

        Raises:
            ValueError: as `forward`, or a model without a posterior.
        """
        with torch.no_grad(), self.evaluating():
            return self.quantizer.posterior_scores(self.encoder(self.to_levels(images)), self.config.beta)

    def check_has_posterior(self) -> None:
        """Raise ValueError for a model without a posterior over codes."""
        if not self.stochastic and self.config.beta is None:
            raise ValueError(
                f"{type(self.quantizer).__name__} has no posterior over codes, so there are no bits to get back; "
                "compress losslessly without"
            )

    def _output(self, levels: Tensor, quantized: Quantized, rate: Tensor | None = None) -> VQVAEOutput:
        features = self.decoder(quantized.z_q)
        return VQVAEOutput(
            distortion=-self.likelihood.log_prob(levels, features),
            features=features,
            latents=quantized.codes,
            auxiliary={**quantized.auxiliary, **self.likelihood.auxiliary(levels, features)},
            entropy=quantized.entropy,
            log_posterior=quantized.log_posterior,
            quantized=quantized,
            rate=rate,
        )

    def latents(self, features: Float[Tensor, "b h2 w2 d"]) -> Int[Tensor, "b *grid"]:
        """The codes of the encoder's features, int64."""
        return self.quantizer(features).codes

    def vectors(self, latents: Codes) -> Float[Tensor, "b h2 w2 d"]:
        """The code vectors that the decoder takes, of codes of any integer type.

        Raises:
            ValueError: codes with other axes, or outside the codebook.
        """
        codes = arrays.integers(latents, "codes", self.quantizer.device)
        if codes.ndim != 1 + len(self.grid) or 0 in codes.shape[1:]:
            expected = ", ".join(map(str, self.grid))
            raise ValueError(f"expected codes on a grid, such as (b, {expected}), got {tuple(codes.shape)}")
        return self.quantizer.decode(codes)

    def update(self) -> None:
        """The quantizer's statistics and revival; after the optimiser's step."""
        self.quantizer.update()

    def usage(self) -> CodeUsage:
        """An empty histogram of each codebook, to which `out.counted` of each batch is added."""
        return CodeUsage(self.num_codes, self.quantizer.code_axes)


@runtime_checkable
class LoopPrior(PriorLike, Protocol):
    """A prior over codes that can be in the loop."""

    def log_conditionals(self, codes: Tensor, labels: Tensor | None, /) -> Tensor: ...

    def relaxed_log_conditionals(self, weights: Tensor, labels: Tensor | None, /) -> Tensor: ...

    def walk(self, num: int, chooser: Callable[[Tensor], Tensor], labels: Tensor | None, /) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class PriorGuidedEncoder:
    """A VQVAE whose encoder weighs what its codes cost under a prior: `model.through(prior, labels)`.

    It takes the model's place in `vqvae.bound`, for images with these labels. Its codes decode as any.
    """

    model: VQVAE
    prior: LoopPrior
    labels: Labels | None
    beta: float
    num_iterations: int | None = None
    stochastic = True

    @property
    def num_codes(self) -> int:
        return self.model.num_codes

    @property
    def grid(self) -> tuple[int, ...]:
        return self.model.grid

    def __call__(self, images: Images) -> VQVAEOutput:
        """`VQVAE.forward` with the prior in the loop: the most probable codes, in evaluation mode."""
        levels = self.model.to_levels(images)
        return self.model(levels, self._loop(levels))

    def draw(self, images: Images, generator: torch.Generator | None = None) -> VQVAEOutput:
        """`VQVAE.draw` with the prior in the loop."""
        levels = self.model.to_levels(images)
        return self.model.draw(levels, generator, self._loop(levels))

    @torch.no_grad()
    def encode(self, images: Images, generator: torch.Generator | None = None) -> Int[Tensor, "b *grid"]:
        """`VQVAE.encode` with the prior in the loop; with a generator, codes that are sampled."""
        with self.model.evaluating():
            levels = self.model.to_levels(images)
            return self.model.quantizer.codes_through_prior(self.model.encoder(levels), self._loop(levels), generator)

    def _loop(self, images: Tensor) -> PriorInTheLoop:
        if tuple(images.shape[2:]) != self.model.size:
            height, width = images.shape[2:]
            raise ValueError(
                f"got images of {height}x{width}, expected {times(self.model.size)}: the prior in the loop is for "
                "their grid alone"
            )
        return self.model.loop(self.prior, self.labels, len(images), self.beta, self.num_iterations)
