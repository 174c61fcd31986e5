"""Whether two programs give the same codes, but for ties: what "equal" can mean between different roundings.

A code is the nearest vector to a feature, and features are sums of float32 products, which every program rounds in an
order of its own. Where a feature lies within rounding of the plane between two code vectors, either code is right.
So another program's code o, where the model's nearest is k, is a *tie* if at the model's own feature z

    (‖z − e_o‖² − ‖z − e_k‖²)/2  ≤  δ·‖e_o − e_k‖ + ρ            in float64

The left side over ‖e_o − e_k‖ is how far z lies from that plane, so the first term says that the plane is within δ of
z, the rounding of features. How large that is depends on the depth and the sizes of a network far more than on ‖z‖, so
it is measured: with z* the features of the same network in float64,

    δ  =  8 · max over the image's positions ‖z − z*‖   +   16 eps · max over the image's positions ‖z‖

Another program's error is another draw of what z − z* is a draw of: as many sums, in another order. The largest of an
image's positions says how large such errors are, and 8 leaves room for a program that sums less carefully. The second
term is for what features go through afterwards (projections, remainders, grids), a few float32 operations each, and for
networks that happen to make no error. ρ = (d + 3) eps (‖z − c‖·max‖e − c‖ + max‖e − c‖²/2) bounds the rounding of the
search itself in float32, as `vqvae.quantizers.nearest_search` derives it; c is the codes' mean. eps is 2^-23.

Kinds that round or take signs have distances to their codes' vectors like any other; logits are affine like halved
distances. Both z and z* are carried through projections, groups, remainders and grids up to each codebook, and compared
there. A code after a tie depends on which of the two was taken: what is left is that after the other program's own
codes, so each of its codes is judged on its own path.

All of this is of float32, so it is computed without autocast and TF32, and a model in less is refused: rounding to
eight bits would call nearly any code a tie.

Pixels: a level is right if it is the nearest to the model's point estimate, or would be if that were `LEVEL_MARGIN`
elsewhere.
"""

import copy
import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vqvae.interop.code_graphs import Codebook, code_graph
from vqvae.interop.precision import check_float32, in_full_float32
from vqvae.model import VQVAE

NUM_ERRORS = 8
NUM_ULPS = 16
# A 64th of a level. The expected level of a mixture, a float32 sum of 255 terms, is accurate to a thousandth.
LEVEL_MARGIN = 1 / 64
# Images that are encoded or decoded at once, and those that are judged at once, in float64.
BATCH = 16
GROUP = 4
# Of scores in float64 that are held at once.
SEARCH_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How another program's codes compare with a model's.

    Attributes:
        num_codes_compared: all codes of all images.
        num_equal: of these, the same code; after a tie of an earlier depth or scale, if it is right there too.
        num_ties: another code, which is as near up to rounding.
        num_wrong: the rest, which rounding does not explain.
    """

    num_codes_compared: int
    num_equal: int
    num_ties: int
    num_wrong: int


def compare_codes(
    model: VQVAE, images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"], other_codes: Int[Tensor, "b *grid"]
) -> Agreement:
    """What another program made of these images, compared with `model.encode(images)`.

    Where all is equal this is the encoding alone; images with another code are encoded in float64 too, a few at a time,
    and of their positions those that differ are searched, in slices of `SEARCH_BYTES`. It runs where the model is, in
    full float32, whatever autocast and TF32 are set to.

    Raises:
        ValueError: a model in less than float32, codes of another shape or outside the codebook, images that the model
            does not take, or a kind of quantizer that is none of the library's.
    """
    check_float32(model, "compare the codes of", or_wider=True)
    levels = model.to_levels(images)
    with in_full_float32():
        codes = torch.cat([model.encode(part) for part in levels.split(BATCH)])
    if other_codes.shape != codes.shape or other_codes.is_floating_point():
        raise ValueError(
            f"expected codes as integers of shape {tuple(codes.shape)}, "
            f"got {other_codes.dtype} of shape {tuple(other_codes.shape)}"
        )
    others = other_codes.to(codes)
    if others.numel() and not 0 <= int(others.min()) <= int(others.max()) < model.num_codes:
        raise ValueError(f"codes must lie in [0, {model.num_codes}), got {int(others.min())} to {int(others.max())}")
    differs = codes != others
    wrong = torch.zeros_like(differs)
    images_to_judge = differs.flatten(1).any(1).nonzero().squeeze(1)
    if len(images_to_judge):
        with in_full_float32():
            judge = _Judge(model)
            for group in images_to_judge.split(GROUP):
                wrong[group] = judge.wrong(levels[group], others[group], differs[group])
    num_wrong = int(wrong.sum())
    num_ties = int((differs & ~wrong).sum())
    return Agreement(
        num_codes_compared=codes.numel(),
        num_equal=codes.numel() - num_ties - num_wrong,
        num_ties=num_ties,
        num_wrong=num_wrong,
    )


@torch.no_grad()
def count_wrong_pixels(
    model: VQVAE, codes: Int[Tensor, "b *grid"], other_images: UInt8[Tensor, "b c h w"]
) -> tuple[int, int]:
    """Of another program's decoded pixels, how many are not those of `model.decode`, and how many of them wrongly.

    Raises:
        ValueError: a model in less than float32, images of another shape, or codes that the model does not take.
    """
    check_float32(model, "compare the pictures of", or_wider=True)
    expected = (len(codes), model.config.num_channels, *model.size)
    if other_images.shape != expected:
        raise ValueError(f"expected images of shape {expected}, got {tuple(other_images.shape)}")
    num_other = num_wrong = 0
    for part, pictures in zip(codes.split(BATCH), other_images.split(BATCH), strict=True):
        with model.evaluating(), in_full_float32():
            estimate = model.likelihood.point_estimate(model.decoder(model.vectors(part))).double()
        others = pictures.to(estimate.device).double()
        num_other += int((others != estimate.round().clamp(0, 255)).sum())
        num_wrong += int((~((others - estimate).abs() <= 0.5 + LEVEL_MARGIN)).sum())
    return num_other, num_wrong


class _Judge:
    """A model in float32 and in float64, for codes of both."""

    def __init__(self, model: VQVAE):
        self.model = model
        self.exact_encoder = copy.deepcopy(model.encoder).eval().double()
        self.graph = code_graph(model.quantizer, torch.float64)

    @torch.no_grad()
    def wrong(self, levels: Tensor, others: Tensor, differs: Tensor) -> Tensor:
        """Which of these codes rounding does not explain, in their shape."""
        with self.model.evaluating():
            z = self.model.encoder(levels).double()
        both = torch.cat([z, self.exact_encoder(levels)])
        # A position without another code at any depth is right. A scale's codes say something of all positions.
        positionwise = differs.shape[1:3] == z.shape[1:3]
        positions = differs.reshape(*z.shape[:3], -1).any(3) if positionwise else torch.ones_like(z[..., 0]) > 0
        judge = functools.partial(_is_wrong, positions)
        return self.graph.run(both, torch.cat([others, others]), judge)[0][: len(levels)]


def _is_wrong(positions: Tensor, codebook: Codebook, both: Tensor, given: Tensor) -> Tensor:
    z, exact = both.chunk(2)
    others = given[: len(z)]
    error = NUM_ERRORS * _largest(z - exact) + NUM_ULPS * torch.finfo(torch.float32).eps * _largest(z)
    if positions.shape != others.shape:
        positions = torch.ones_like(others, dtype=torch.bool)
    error = error.reshape(-1, *[1] * (others.ndim - 1)).expand_as(others)
    wrong = torch.zeros_like(positions)
    found = [
        ~(lead <= error * slope + codebook.rounding(z))
        for z, others, error in zip(
            *(each.split(_num_rows(codebook)) for each in (z[positions], others[positions], error[positions])),
            strict=True,
        )
        for lead, slope in [codebook.lead(z, codebook.find(z), others)]
    ]
    wrong[positions] = torch.cat(found)
    return torch.cat([wrong, wrong])


def _num_rows(codebook: Codebook) -> int:
    """Places that are searched at once: of the scores, two are held for each code."""
    return max(1, SEARCH_BYTES // (16 * max(1, codebook.num_scores)))


def _largest(z: Tensor) -> Tensor:
    """The largest norm of each image's positions, "b"."""
    return z.norm(dim=-1).flatten(1).amax(1)
