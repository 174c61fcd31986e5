"""What every quantizer is: features in, codes and their vectors out, and the state of the codebook with each result.

A quantizer works on channels-last features `"b *grid d"` of any rank and needs no model around it:

    quantizer = VectorQuantizer(num_codes=1024, dim=64)
    q = quantizer(z_e)                        # Quantized
    task_loss(q.z_q) + sum(q.auxiliary.values())
    optimizer.step(); quantizer.update()      # statistics and revival, once per optimiser step

The forward pass reads the codebook and never changes it: the codebook that quantised a batch is the one in its loss.
All change of state that is not a gradient happens in `update`.

How a kind is made. `project` maps features into the space of the codes (a sphere, a box). `quantize` finds codes and
their vectors there. Where those vectors are a function of `z_e` that can be differentiated (Gumbel softmax, IBQ), that
is all. Where they are not, the kind names an `estimator`, which is applied once to the whole: a composition of three
residual steps still passes the gradient to the encoder once, not three times.

    z_e -> check, mask, float32 -> project -> quantize -> codes, vectors -> estimator -> z_q
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from safefolder import arrays
from safefolder.arrays import Codes, Mask, Vectors
from safefolder.configured import Configured, ConfiguredOptions
from vqvae.quantizers.estimators import Estimator
from vqvae.quantizers.prior_in_loop import PriorInTheLoop

MASKED = -1


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The result of a quantizer.

    `*parts` is empty for a single codebook, (depth,) for a residual and (groups,) for a grouped quantizer.

    Attributes:
        z_q: code vectors, with the estimator's gradient to the encoder; `"b *grid d"`.
        codes: int64, a code a position, with further axes for residual and grouped kinds; masked positions hold
            `MASKED`.
        auxiliary: named terms to add to the training objective, each a scalar, already weighted.
        entropy: posterior entropy H(z|y) in nats per image, `"b"`; zero where the codes were not sampled.
        log_posterior: ln P_enc(z|y) of these codes in nats per image, `"b"`; zero where they were not sampled.
        usage: fraction of the codebook that this batch used, in [0, 1].
        perplexity: exp of the entropy of this batch's code histogram, in [1, num_codes].
        dead_codes: how many codes this batch did not use.
    """

    z_q: Float[Tensor, "b *grid d"]
    codes: Int[Tensor, "b *positions"]
    auxiliary: Mapping[str, Float[Tensor, ""]]
    entropy: Float[Tensor, " b"]
    log_posterior: Float[Tensor, " b"]
    usage: Float[Tensor, "*parts"]
    perplexity: Float[Tensor, "*parts"]
    dead_codes: Int[Tensor, "*parts"]

    def with_vectors(self, z_q: Tensor) -> "Quantized":
        """The same result with other vectors."""
        return dataclasses.replace(self, z_q=z_q)


torch.export.register_dataclass(Quantized)


class Quantizer(nn.Module, Configured):
    """Abstract: `num_codes` codes for features of width `dim`.

    Where a composition takes the options of another quantizer, the name of its kind stands for the kind's own defaults:
    `ResidualQuantizer(quantizer="FSQ")`.

    Args:
        num_codes: of the codebook, at least 1.
        dim: width of the features, and of the codes' vectors.

    Attributes:
        num_codes: symbols of each entry of `codes`.
        dim: width of `z_e` and `z_q`.
        code_axes: axes of `codes` after those of the grid: (depth,), (groups,), or none.
        estimator: how the gradient reaches `z_e`; None where the vectors of `quantize` have their own.
        on_sphere: codes are unit vectors, so what is left of a vector is none that a further step could quantise.
        positionwise: each position of the features has codes of its own.
        stochastic: there is a posterior over codes to `draw` from.
    """

    class Config(ConfiguredOptions):
        """Abstract: the options of one kind of quantizer, as plain data."""

    @classmethod
    def check_options(cls, options: ConfiguredOptions) -> None:
        for name, value in vars(options).items():
            is_weight = name == "weight" or name.endswith("_weight")
            if is_weight and isinstance(value, int | float) and not 0 <= value < math.inf:
                raise ValueError(f"got {name}={value}, expected the weight of a term, which is at least 0")

    code_axes: tuple[int, ...] = ()
    estimator: Estimator | None = None
    on_sphere: bool = False
    positionwise: bool = True
    stochastic: bool = False

    def __init__(self, *, num_codes: int, dim: int):
        super().__init__()
        if num_codes < 1 or dim < 1:
            raise ValueError(f"expected at least one code of width at least one, got num_codes={num_codes}, dim={dim}")
        self.num_codes = num_codes
        self.dim = dim
        # Says how precise the quantizer is, also for a kind that has no weights.
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where it lives, also without weights."""
        return self._anchor.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of all its work and of `z_q`: float32, or float64 after `.double()`."""
        return torch.promote_types(self._anchor.dtype, torch.float32)

    def forward(self, z_e: Vectors, mask: Mask | None = None) -> Quantized:
        """Quantise features `"b *grid d"`. `mask`, `"b *grid"`, is True at the positions that count.

        Works in float32 (in float64 after `.double()`), whatever the features' type and the autocast. What is masked
        gets the code `MASKED` and zeros, and counts nowhere: terms, statistics and the next `update` are those of the
        other positions alone.

        Raises:
            ValueError: the width is not `dim`, or a feature that counts is NaN or infinite.
        """
        mask = self._mask_of(mask)
        z_e = self.prepared(z_e, mask)
        with torch.autocast(z_e.device.type, enabled=False):
            return self.run(z_e, mask)

    def _mask_of(self, mask: Mask | None) -> Tensor | None:
        """The mask as a tensor, where there is one."""
        return None if mask is None else arrays.mask_of(mask, "a mask", self.device)

    def prepared(self, z_e: Vectors, mask: Tensor | None = None) -> Tensor:
        """Features that are checked, in the quantizer's precision. Errors as `forward`."""
        if not isinstance(z_e, Tensor):
            z_e = arrays.vectors(z_e, "features").to(self.device, self.dtype)
        self.check_features(z_e, mask)
        z_e = z_e.to(self.dtype)
        # Masked positions may hold anything, NaN too: they are quantised as zeros and their answer is dropped.
        return require_finite(z_e if mask is None else torch.where(mask[..., None], z_e, 0.0))

    @torch.no_grad()
    def draw(
        self,
        z_e: Vectors,
        mask: Mask | None = None,
        generator: torch.Generator | None = None,
    ) -> Quantized:
        """Like `forward`, with codes sampled from the exact posterior P_enc(z|y); without gradients.

        A deterministic quantizer gives the result of `forward`. Errors as `forward`.

        Args:
            generator: of the features' device; seeded from torch's global one unless given.
        """
        mask = self._mask_of(mask)
        z_e = self.prepared(z_e, mask)
        if generator is None:
            generator = own_generator(z_e.device)
        with torch.autocast(z_e.device.type, enabled=False):
            return self.run(z_e, mask, generator)

    def through_prior(
        self, z_e: Float[Tensor, "b *grid d"], loop: PriorInTheLoop, generator: torch.Generator | None = None
    ) -> tuple[Quantized, Float[Tensor, " b"]]:
        """Like `forward`, with a prior in the loop; and the rate in nats per image.

        In training codes are sampled (torch's global generator), so that decoder and codebook meet what an evaluation
        draws, and rate and entropy are those of the posterior, with gradients to the features and the prior. In
        evaluation codes are the most probable ones, or, with a generator, sampled, with their entropy and
        log-posterior. See `vqvae.quantizers.prior_in_loop`.

        Raises:
            ValueError: a kind whose codes a prior cannot weigh; else as `forward`.
        """
        self.check_weighs_prior()
        raise AssertionError("a kind that weighs a prior has a way through it")

    def codes_through_prior(
        self, z_e: Float[Tensor, "b *grid d"], loop: PriorInTheLoop, generator: torch.Generator | None = None
    ) -> Int[Tensor, "b *grid"]:
        """The codes of `through_prior` alone, in evaluation. Errors as there."""
        return self.through_prior(z_e, loop, generator)[0].codes

    def check_weighs_prior(self) -> None:
        """Raise ValueError for a kind whose codes a prior cannot weigh: one without a `through_prior`."""
        raise ValueError(
            f"{type(self).__name__} cannot weigh a prior's rate: take EMAVectorQuantizer, VectorQuantizer, "
            "GumbelQuantizer or StochasticVectorQuantizer"
        )

    def posterior_scores(
        self, z_e: Float[Tensor, "b *grid d"], beta: float | None
    ) -> tuple[Float[Tensor, "b *grid k"], bool]:
        """Scores s of all codes, and whether a prior weighs in, for the posterior over codes.

        ln P_enc(k | y, codes before) is the log-softmax of s_k, or of s_k + ln P_pri(k | codes before) where it does.
        No gradients are kept.

        Args:
            beta: weight of the prior in the loop, or None without one.

        Raises:
            ValueError: a kind without a posterior.
        """
        raise ValueError(
            f"{type(self).__name__} has no posterior over codes; GumbelQuantizer and StochasticVectorQuantizer have, "
            "and codebooks with a prior in their loop"
        )

    def run(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None = None) -> Quantized:
        """The work of `forward` on checked features, which are zero where masked; with a generator, that of `draw`."""
        projected = self.project(z_e)
        q = self.quantize(projected, mask, generator)
        if self.estimator is None:
            return q
        return q.with_vectors(self.estimator(projected, q.z_q))

    @abc.abstractmethod
    def quantize(self, z_e: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Quantized:
        """Codes and vectors of projected features, which are zero where masked; before the estimator.

        With a generator, codes of a stochastic kind are sampled.
        """

    @abc.abstractmethod
    def look_up(self, codes: Tensor) -> Tensor:
        """The work of `decode` on codes that are known to be valid."""

    @abc.abstractmethod
    def update(self) -> None:
        """Apply what the forwards in training mode since the last call have gathered; after the optimiser's step."""

    def project(self, z_e: Tensor) -> Tensor:
        """Features in the space of the codes: on the unit sphere or in a box for kinds whose codes lie there."""
        return z_e

    def residual_scale(self) -> Tensor | float:
        """By how much the next step of a residual quantizer should be finer; 1 where codes find their own scale."""
        return 1.0

    def decode(self, codes: Codes) -> Float[Tensor, "b *grid2 d"]:
        """The vectors of codes, bit-equal to the `z_q` that came with them (masked positions: zeros).

        Args:
            codes: of any integer type; a masked position is -1, which unsigned types do not have.

        Raises:
            ValueError: codes that are no integers, or out of range.
        """
        codes = arrays.integers(codes, "codes", self.device)
        self.check_codes(codes)
        with torch.autocast(codes.device.type, enabled=False):
            return self.look_up(codes)

    def code_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of `codes`, after the batch's, for features of this grid.

        Raises:
            ValueError: features of such a grid cannot be quantised.
        """
        return (*grid, *self.code_axes)

    def check_features(self, z_e: Tensor, mask: Tensor | None) -> None:
        if not z_e.is_floating_point():
            raise ValueError(f"expected floating-point features, got {z_e.dtype}")
        if z_e.ndim < 2 or z_e.shape[-1] != self.dim:
            raise ValueError(
                f"expected features 'b *grid d' with d = {self.dim} last, got shape {tuple(z_e.shape)}; "
                "channels-first features need x.movedim(1, -1)"
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != z_e.shape[:-1]):
            raise ValueError(
                f"expected a boolean mask of shape {tuple(z_e.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}"
            )

    def check_codes(self, codes: Tensor) -> None:
        axes = len(self.code_axes)
        if codes.ndim < 1 + axes or (axes and tuple(codes.shape[-axes:]) != self.code_axes):
            raise ValueError(f"expected codes whose last axes are {self.code_axes}, got shape {tuple(codes.shape)}")
        # A traced graph cannot branch on values; there, an index out of range is left to the look-up itself.
        if codes.numel() and not torch.compiler.is_compiling():
            low, high = codes.aminmax()
            if low < MASKED or high >= self.num_codes:
                raise ValueError(f"codes must lie in [0, {self.num_codes}), got {int(low)} to {int(high)}")


def own_generator(device: torch.device) -> torch.Generator:
    """A generator of a device, seeded from torch's global one of the CPU."""
    return torch.Generator(device).manual_seed(int(torch.randint(2**62, (), device="cpu")))


def combined(results: Sequence[Quantized], z_q: Tensor, codes: Tensor, auxiliary: Mapping[str, Tensor]) -> Quantized:
    """The result of a composition: nats summed, statistics side by side."""
    return Quantized(
        z_q=z_q,
        codes=codes,
        auxiliary=auxiliary,
        entropy=torch.stack([q.entropy for q in results]).sum(0),
        log_posterior=torch.stack([q.log_posterior for q in results]).sum(0),
        usage=torch.stack([q.usage for q in results]),
        perplexity=torch.stack([q.perplexity for q in results]),
        dead_codes=torch.stack([q.dead_codes for q in results]),
    )


def stacked(results: Sequence[Quantized], z_q: Tensor, axis: int) -> Quantized:
    """`combined` with codes along a new axis, and terms summed."""
    codes = torch.stack([q.codes for q in results], dim=axis)
    terms = {name: torch.stack([q.auxiliary[name] for q in results]).sum() for name in results[0].auxiliary}
    return combined(results, z_q, codes, terms)


def check_positionwise(part: Quantizer, whole: str) -> None:
    """Raise ValueError for a quantizer that cannot be a part of `whole`, which needs codes of its own at a position."""
    if not part.positionwise:
        raise ValueError(
            f"{type(part).__name__} cannot stand inside a {whole}: it has no code of its own at each position; put a "
            f"{whole} inside it instead"
        )


def check_leaves_remainder(step: Quantizer) -> None:
    """Raise ValueError for a quantizer that cannot be a step of a residual or multi-scale one."""
    if step.on_sphere:
        raise ValueError(
            "unit vectors cannot be quantised residually, since what is left of one is no unit vector: set "
            "normalize=False, or put the normalised quantizer into a ProjectedQuantizer"
        )


def require_finite(z_e: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
    """The same features.

    Raises:
        ValueError: one of them is NaN or infinite, which no code stands for.
    """
    return torch.ops.vqvae.require_finite(z_e)


# One operator, so that a check of values does not break a compiled graph; it returns a copy, so that it is not dropped.
# Not by `torch.library.custom_op`: the first call of such an operator loads torch's compiler, a second of CPU time.
torch.library.define("vqvae::require_finite", "(Tensor z_e) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("vqvae::require_finite", "default")
def _require_finite(z_e: Tensor) -> Tensor:
    if not torch.isfinite(z_e).all():  # waits for the device: an error must come before its consequences
        raise ValueError("the features to quantize hold NaN or infinity; look for a diverged or broken encoder")
    return z_e.clone()


@torch.library.register_fake("vqvae::require_finite")
def _(z_e: Tensor) -> Tensor:
    return torch.empty_like(z_e)


torch.library.register_autograd("vqvae::require_finite", lambda ctx, grad: grad)
