"""The options of drawing, choosers for the autoregressive walk, and the filters that shape a random draw.

    prior.sample(16, labels, Sampling(temperature=0.9, top_p=0.95))

A chooser is any callable from log-probabilities, "b k", to the codes that it fixes, "b".
`random_chooser` samples (generation); `known_chooser` answers with codes given beforehand and adds up
their log-probability (scoring).

The filters take logits or log-probabilities over the last axis and return them with the codes that
are ruled out at -inf. They need no normalised input and give none.

- temperature T: p_k^(1/T), renormalised. T = 0 is the limit: all mass on the likeliest code.
- top-k (Fan, Lewis & Dauphin 2018, "Hierarchical neural story generation"): the k likeliest codes.
  Exactly k are kept: of codes tied at the border those with the lowest index stay.
- top-p (Holtzman et al. 2020, "The curious case of neural text degeneration"): the smallest set of
  likeliest codes whose mass reaches p; ties go to the lowest index here too.
- min-p (Nguyen et al. 2024, "Turning up the heat: min-p sampling"): codes at least min_p times as
  likely as the likeliest.

`random_chooser` applies them in that order. It draws by inverting the cumulative distribution with
one uniform number an image, so a generator on the CPU gives a model on any device the same numbers.
With a seed for each image the numbers of an image come from its seed alone.

`guidance_ramp` is a schedule for classifier-free guidance: early positions lay out the picture and are
hurt by strong guidance, later ones follow (a rising scale is used by Tian et al. 2024, VAR, and by
Yu et al. 2024, RAR).
"""

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer
from torch import Tensor

from safefolder import Options, SavedModel, arrays
from safefolder.arrays import Codes
from safefolder.messages import shown

Precision = Literal["auto", "float32", "bfloat16", "int8"]
Seeds = Sequence[int] | Integer[np.ndarray, " b"] | Integer[Tensor, " b"]
Chooser = Callable[[Float[Tensor, "b k"]], Int[Tensor, " b"]]

# More would be lost in the rounding of log-probabilities.
_MOST_GUIDANCE = 1e6


@dataclass(frozen=True, kw_only=True)
class Sampling(Options):
    """How grids are sampled from a prior. The default is the model itself.

    Guidance may also be a number for each position, in the order of the walk (`guidance_ramp`); a tuple then.
    """

    temperature: float = 1.0
    """under 1 more typical, over 1 more varied; 0 is the likeliest code each time"""
    top_k: int | None = None
    """sample among the k likeliest codes only"""
    top_p: float | None = None
    """sample among the likeliest codes that hold this share of the probability"""
    min_p: float | None = None
    """sample among the codes at least this share as likely as the likeliest"""
    guidance: float | Sequence[float] | None = None
    """strength of the label, by classifier-free guidance; 1 is none"""
    num_steps: int | None = None
    """sample several codes at once, in so many steps, with a prior that can: faster, a little worse"""
    precision: Precision = "auto"
    """arithmetic of the draws; auto is what is fastest for the device and the number of grids"""
    compiled: bool = False
    """use torch.compile, which takes a while the first time and pays for many grids"""
    draft: SavedModel | None = None
    """a cheap prior, or a `DraftHead`, that proposes several codes which the prior then takes or refuses in one pass:
    the distribution stays that of the prior, and a pass gives more than a code"""
    num_proposals: int | None = None
    """codes that the draft proposes at once; unless given, 2 of a prior, and of a head what is fastest (0 perhaps)"""
    batch_size: int | None = None
    """grids sampled at once, by default as many as 1 GiB holds, at most 256; other sizes give other draws, as good"""

    @classmethod
    def meant(cls, name: str, value: Any) -> Any:
        """The value, held against its range first: that says more than its type."""
        if isinstance(value, np.ndarray) and value.ndim == 1:
            value = value.tolist()
        if value is not None and name in _EXPECTED and not _is_in_range(name, value):
            raise ValueError(f"got {name}={value!r}, expected {_EXPECTED[name]}")
        if value is not None and name == "guidance":
            _check_guidance(value)
        return value

    def changed(self) -> list[str]:
        """The names of the options that are not as they are by default."""
        return [each.name for each in fields(self) if getattr(self, each.name) != each.default]


def apply_temperature(logits: Float[Tensor, "*b k"], temperature: float) -> Float[Tensor, "*b k"]:
    """Logits of p^(1/temperature). Temperature 0 keeps only the first of the likeliest codes."""
    if temperature == 1:
        return logits
    if temperature < torch.finfo(logits.dtype).tiny:
        return keep_top_k(logits, 1)
    # Subtracting the maximum first keeps the likeliest code at 0 however small the temperature is.
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Float[Tensor, "*b k"], num_kept: int) -> Float[Tensor, "*b k"]:
    """Keep the `num_kept` largest logits, the lowest index first among equals; the rest is -inf."""
    if num_kept >= logits.shape[-1]:
        return logits
    border = logits.topk(num_kept).values[..., -1:]
    above, tied = logits > border, logits == border
    room = num_kept - above.sum(-1, keepdim=True)
    kept = above | (tied & (tied.cumsum(-1) <= room))
    return logits.masked_fill(~kept, -math.inf)


def keep_top_p(logits: Float[Tensor, "*b k"], mass: float) -> Float[Tensor, "*b k"]:
    """Keep the fewest likeliest codes whose probabilities reach `mass`; the rest is -inf."""
    if mass == 1:
        return logits  # a rounded cumulative sum must not cut the tail
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # exactly 0 for the likeliest, which so stays
    dropped = before >= mass
    dropped[..., 0] = False  # also where so small a mass is rounded to 0
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)


def keep_min_p(logits: Float[Tensor, "*b k"], share: float) -> Float[Tensor, "*b k"]:
    """Keep the codes at least `share` times as likely as the likeliest; the rest is -inf."""
    if share == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(share), -math.inf)


def guidance_ramp(strength: float, num_positions: int, power: float = 1.0) -> list[float]:
    """Guidance from 1 at the first position to `strength` at the last, 1 + (strength - 1) (i / (n - 1))^power.

    Power 0 is `strength` everywhere, 1 a straight line; higher ones leave more of the first positions alone.
    """
    if not (power >= 0 and math.isfinite(power)):
        raise ValueError(f"got power={power}, expected a number >= 0")
    last = max(num_positions - 1, 1)
    return [1 + (strength - 1) * (position / last) ** power for position in range(num_positions)]


def shaped(log_probs: Float[Tensor, "*b k"], sampling: Sampling) -> Float[Tensor, "*b k"]:
    """Logits of what is sampled from: temperature, then top-k, top-p and min-p."""
    logits = apply_temperature(log_probs, sampling.temperature)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def probabilities(sampling: Sampling, log_probs: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
    """What is sampled from, normalised."""
    return shaped(log_probs, sampling).softmax(-1)


def random_chooser(
    sampling: Sampling = Sampling(),
    *,
    generator: torch.Generator | None = None,
    seeds: Seeds | None = None,
) -> Chooser:
    """A chooser that samples at random: temperature, then top-k, top-p and min-p, then one draw a row.

    Args:
        sampling: of which it takes those four.
        generator: of the draws; torch's global one unless given.
        seeds: in its place, a seed of its own for each row; row i then depends on seed i and its own conditionals
            alone.
    Raises ValueError for seeds beside a generator, and for seeds outside 0 .. 2^32 - 1.
    """
    if seeds is not None and generator is not None:
        raise ValueError("got seeds and a generator, expected one of the two")
    streams = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in check_seeds(seeds)]

    def choose(log_probs: Float[Tensor, "b k"]) -> Int[Tensor, " b"]:
        logits = shaped(_movable(log_probs), sampling)
        if streams is None:
            source = generator.device if generator is not None else logits.device
            uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=source, generator=generator)
        else:
            if len(logits) != len(streams):
                raise ValueError(f"got {len(streams)} seeds for a walk of {len(logits)} grids, expected one each")
            draws = [torch.rand(1, 1, dtype=torch.float64, device="cpu", generator=stream) for stream in streams]
            uniform = torch.cat([torch.empty(0, 1, dtype=torch.float64, device="cpu"), *draws])
        return _draw(logits.softmax(-1), uniform.to(logits.device)).to(log_probs.device)

    return choose


class KnownChooser:
    """A chooser that answers with known codes, and adds up what they cost.

    Attributes: `log_prob` "b", nats, of the positions chosen so far (None before the first).
    """

    def __init__(self, codes: Codes):
        found = arrays.integers(codes, "codes", expected='integers "b *grid"')
        if found.ndim < 1:
            raise ValueError(f'got codes of shape {tuple(found.shape)}, expected integers "b *grid"')
        self.codes = found.reshape(found.shape[0], math.prod(found.shape[1:]))
        self.log_prob: Tensor | None = None
        self._position = 0

    def __call__(self, log_probs: Float[Tensor, "b k"]) -> Int[Tensor, " b"]:
        num, num_positions = self.codes.shape
        if self._position >= num_positions:
            raise ValueError(
                f"got more than {num_positions} steps, expected one for each known code; "
                "a KnownChooser serves one walk over positions that no prefix covers"
            )
        if log_probs.shape[0] != num:
            raise ValueError(f"got a walk of {log_probs.shape[0]} grids, expected {num} as in codes")
        if self._position == 0:
            self.codes = self.codes.to(log_probs.device)
            check_range(self.codes, log_probs.shape[1], "codes")
        chosen = self.codes[:, self._position]
        cost = log_probs.gather(1, chosen[:, None])[:, 0]
        self.log_prob = cost if self.log_prob is None else self.log_prob + cost
        self._position += 1
        return chosen


def known_chooser(codes: Codes) -> KnownChooser:
    """A chooser that fixes `codes` in raster order, one position a call: scoring by the walk."""
    return KnownChooser(codes)


def check_sampling(sampling: object) -> None:
    """ValueError for anything else, such as a temperature by itself."""
    if not isinstance(sampling, Sampling):
        raise ValueError(f"got sampling={shown(sampling)}, expected Sampling(temperature=...), or none for the default")


def check_range(values: Tensor, num_values: int, name: str) -> None:
    """ValueError unless every value is in 0..num_values-1. One host sync; none while compiling."""
    if values.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in torch.stack(torch.aminmax(values)).tolist())
    if low < 0 or high >= num_values:
        raise ValueError(f"got {name} from {low} to {high}, expected 0 to {num_values - 1}")


def check_seeds(seeds: Seeds) -> list[int]:
    """The seeds as a list; ValueError unless each has 32 bits, which is all that a generator reads."""
    listed = seeds.tolist() if isinstance(seeds, Tensor | np.ndarray) else seeds
    if not isinstance(listed, Sequence):
        raise ValueError(f"got seeds={seeds!r}, expected a sequence of integers, one for each grid")
    for seed in listed:
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ValueError(f"got a seed of {seed!r}, expected an integer from 0 to 2^32 - 1")
    return [int(seed) for seed in listed]


def _movable(log_probs: Tensor) -> Tensor:
    # MPS has no float64; what is sampled from is small enough for the CPU.
    return log_probs.cpu() if log_probs.device.type == "mps" else log_probs


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One code a row: the first one whose CDF exceeds u. Never one of probability 0.

    The CDF is summed by blocks and then inside the block that it falls in, in float64: one running sum over all codes
    takes longer than the rest of a small prior's step.
    """
    rows, k = probabilities.shape
    size = 2 ** ((k - 1).bit_length() // 2 + 1)
    blocks = (probabilities if k % size == 0 else F.pad(probabilities, (0, -k % size))).view(rows, -(-k // size), size)
    sums = blocks.sum(-1).double()
    cdf = sums.cumsum(-1)
    if not bool(cdf[:, -1].isfinite().all()):
        raise ValueError("got probabilities that are not finite: see whether the prior's training diverged")
    target = uniform * cdf[:, -1:]
    block = torch.searchsorted(cdf, target, right=True)
    before = cdf.gather(1, block) - sums.gather(1, block)
    inside = blocks[torch.arange(rows, device=block.device), block[:, 0]].double().cumsum(-1)
    # The block's own running sum may end a rounding error before its sum: what is left over is its last code.
    rest = (target - before).clamp(min=0)  # and may begin one late: below 0 is no code
    rest = torch.minimum(rest, torch.nextafter(inside[:, -1:], -torch.ones_like(target)))
    return (block * size + torch.searchsorted(inside, rest, right=True))[:, 0]


# What the options with a range are expected to be.
_EXPECTED = {
    "temperature": "a number >= 0 (0 is greedy)",
    "top_k": "an integer >= 1, or None to keep all codes",
    "top_p": "0 < top_p <= 1, or None to keep all codes",
    "min_p": "0 <= min_p <= 1, or None to keep all codes",
    "num_steps": "an integer >= 1, or None for a code a step",
    "num_proposals": "an integer >= 1, or None for what is fastest",
    "batch_size": "an integer >= 1",
}


def _is_in_range(name: str, value: Any) -> bool:
    if name in ("top_k", "num_steps", "num_proposals", "batch_size"):
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1
    if name == "temperature":
        return bool(isinstance(value, int | float | np.number) and value >= 0 and math.isfinite(value))
    return _is_real(value) and 0 <= value <= 1 and (name == "min_p" or value > 0)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _check_guidance(guidance: Any) -> None:
    if not isinstance(guidance, numbers.Real | Sequence) or isinstance(guidance, str):
        raise ValueError(f"got guidance of {type(guidance).__name__}, expected a number, or one for each position")
    strengths = guidance if isinstance(guidance, Sequence) else [guidance]
    if not all(_is_real(each) and 0 <= each <= _MOST_GUIDANCE for each in strengths):
        told = f"guidance={guidance}" if strengths is not guidance else "one of them in guidance"
        raise ValueError(f"got {told}, expected numbers from 0 to {_MOST_GUIDANCE:g} (1 is none)")
