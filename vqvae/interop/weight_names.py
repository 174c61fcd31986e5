"""What the importers share: a config from weights' shapes, names of one layout in another, and a model.

Weights here have the names of diffusers' `VQModel`, whose quantizer is `quantize`.

A file may be made to harm: sizes in a config and numbers in names are bounded by the tensors that are there, and names
and shapes are compared with those of a model without memory (on torch's device "meta") before one with memory is built.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import safefolder
from safefolder.building import shapes_alone
from safefolder.folder import check_weights
from safefolder.messages import shown
from safefolder.tensors import few, in_short
from vqvae.vqgan import VQGAN

# Names of diffusers that lie beside its encoder and decoder, and lie within them here.
WITHIN = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# Of a quantizer that takes the nearest code.
CODEBOOK = "quantize.embedding.weight"
NEAREST = {CODEBOOK: "quantizer.codebook"}
# Of a residual block without a shortcut: two norms and two convolutions.
BLOCK_TENSORS = 8
MOST_BLOCKS = 1000
# Pixels along a side that a file may say without being asked about; the largest released model has 512.
MOST_PIXELS = 4096

MOST_NUMBER = 1e30
# More would halve an image of a million pixels a side until nothing is left.
MOST_LEVELS = 20

# What a value of a config file must be, in words and as a test. True is no integer here.
KINDS: dict[str, Callable[[Any], bool]] = {
    "an integer": lambda value: type(value) is int,
    "an integer or null": lambda value: value is None or type(value) is int,
    "a number": lambda value: type(value) in (int, float) and abs(value) < MOST_NUMBER,  # not inf, nor NaN
    "true or false": lambda value: type(value) is bool,
    "a text": lambda value: type(value) is str,
    "a list of integers": lambda value: isinstance(value, list) and all(type(each) is int for each in value),
    "a list of texts": lambda value: isinstance(value, list) and all(type(each) is str for each in value),
}


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, str], source: str | Path) -> None:
    """Raise ValueError for the first value of another kind; one that is not there is not looked at."""
    for name, kind in kinds.items():
        if name in values and not KINDS[kind](values[name]):
            raise ValueError(f"{source}: got {name}={shown(values[name])}, expected {kind}")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Another project's names of the parts of encoder and decoder.

    Attributes:
        levels: of each network, up to the level's number.
        block: of a residual block, up to its number.
        middle: first block, attention, second block.
        finest_first: the decoder counts its levels from the finest, as the encoder does; else in the order they run.
    """

    levels: Mapping[str, str]
    block: str
    middle: tuple[str, str, str]
    finest_first: bool

    def name(self, name: str, num_levels: int) -> str | None:
        """A weight's name in diffusers' layout; None for one that no VQGAN has."""
        start, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias"):
            return None
        if start in WITHIN:
            return name
        net, _, place = start.partition(".")
        if net not in self.levels:
            return None
        if place in ("conv_in", "conv_out", "norm_out"):
            return f"{net}.{'conv_norm_out' if place == 'norm_out' else place}.{leaf}"
        if (m := re.fullmatch(r"mid\.(\w+)\.(\w+)", place)) is not None and m[1] in self.middle:
            at = self.middle.index(m[1])
            new = (RESNET, ATTENTION, RESNET)[at].get(m[2])
            return new and f"{net}.mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[at]}.{new}.{leaf}"
        levels, resample = ("down", "downsample") if net == "encoder" else ("up", "upsample")
        if (m := re.fullmatch(rf"{self.levels[net]}\.(\d{{1,6}})\.(.+)", place)) is None:
            return None
        number = num_levels - 1 - int(m[1]) if net == "decoder" and self.finest_first else int(m[1])
        level = f"{net}.{levels}_blocks.{number}"
        if m[2] == f"{resample}.conv":
            return f"{level}.{resample}rs.0.conv.{leaf}"
        if (part := re.fullmatch(rf"({self.block}|attn)\.(\d{{1,6}})\.(\w+)", m[2])) is None:
            return None
        names, parts = (ATTENTION, "attentions") if part[1] == "attn" else (RESNET, "resnets")
        new = names.get(part[3])
        return new and f"{level}.{parts}.{part[2]}.{new}.{leaf}"


def to_diffusers(
    weights: Mapping[str, Tensor],
    name_of: Callable[[str], str | None],
    quantizer: Mapping[str, str],
    source: str | Path,
    kind: str,
) -> dict[str, Tensor]:
    """Weights under the names that `name_of` gives; attention's 1×1 convolutions as the linear maps they are.

    Args:
        quantizer: names of the quantizer's weights, all of which must be there, and their names here.
        kind: what has such weights.

    Raises:
        ValueError: names for which there is none, a quantizer's weight missing, or a codebook that is no matrix.
    """
    if lacking := sorted(quantizer.keys() - weights.keys()):
        raise ValueError(f"{source} has no {few(lacking)}, expected all weights of a {kind}")
    named, unknown = {}, []
    for name, tensor in weights.items():
        new = quantizer.get(name) or name_of(name)
        if new is None:
            unknown.append(name)
        elif re.search(r"\.to_(q|k|v|out\.0)\.weight$", new) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            named[new] = tensor[:, :, 0, 0]
        else:
            named[new] = tensor
    if unknown:
        raise ValueError(f"{source} holds {few(sorted(unknown))}, which no {kind} has; expected its weights alone")
    shape = tuple(named["quantizer.codebook"].shape)
    if len(shape) != 2:
        raise ValueError(f"{source} has a codebook of shape {shape}, expected (codes, width)")
    return named


def sizes(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """The fields of `VQGAN.Config` that the names and shapes of weights tell.

    Raises:
        ValueError: a part without which there is no telling, or more channels out than in.
    """
    num_levels = count(weights, "encoder.down_blocks.", source)

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"{source} has no {name}, expected all weights of encoder, decoder and quantizer")
        if weights[name].ndim != 4:
            raise ValueError(
                f"{source} has {name} of shape {tuple(weights[name].shape)}, expected that of a convolution"
            )
        return weights[name].shape

    def with_attention(blocks: str) -> tuple[int, ...]:
        found = {int(m[1]) for name in weights if (m := re.match(rf"{blocks}\.(\d{{1,6}})\.attentions\.", name))}
        return tuple(sorted(found))

    num_channels = shape("encoder.conv_in.weight")[1]
    if (given := shape("decoder.conv_out.weight")[0]) != num_channels:
        raise ValueError(f"{source} takes images of {num_channels} channels and gives {given}, expected as many")
    return {
        "num_channels": num_channels,
        "channels": tuple(
            shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(num_levels)
        ),
        "num_blocks": count(weights, "encoder.down_blocks.0.resnets.", source),
        "down_attention": with_attention(r"encoder\.down_blocks"),
        "up_attention": tuple(sorted(num_levels - 1 - level for level in with_attention(r"decoder\.up_blocks"))),
        "mid_attention": any(name.startswith("encoder.mid_block.attentions.") for name in weights),
        "latent_channels": shape("encoder.conv_out.weight")[0],
    }


def count(weights: Mapping[str, Tensor], start: str, source: str | Path) -> int:
    """How many parts have names that begin so: none of their numbers may be left out."""
    pattern = re.compile(re.escape(start) + r"(\d{1,6})\.")
    found = {int(m[1]) for name in weights if (m := pattern.match(name))}
    lacking = next((number for number in range(len(found)) if number not in found), None)
    if lacking is not None:
        raise ValueError(f"{source} has {start}{max(found)} and no {start}{lacking}, expected all before it")
    return len(found)


def assembled(make: Callable[[], VQGAN.Config], weights: Mapping[str, Tensor], source: str | Path) -> VQGAN:
    """A model of weights whose encoder's and decoder's names are diffusers', whose quantizer's are ours; in eval mode.

    What a file has no word of (the quantizer's statistics, the likelihood's scale) is as in a new model, except that
    the quantizer counts one update: its codebook is there, so no first update may put another in its place.

    Args:
        make: the config, whose errors become those of the source.

    Raises:
        ValueError: sizes that do not fit each other, or weights that do not fit them.
    """
    try:
        config = make()
        num_blocks = len(config.channels) * (2 * config.num_blocks + 1)
        if BLOCK_TENSORS * num_blocks > len(weights):
            raise ValueError(
                f"{num_blocks} residual blocks in {len(config.channels)} levels need more than {len(weights)} tensors"
            )
        if num_blocks > MOST_BLOCKS:
            raise ValueError(f"got {num_blocks:,} residual blocks, expected at most {MOST_BLOCKS:,}")
        with shapes_alone():
            shapes = config.build().state_dict()
    except (TypeError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{source} does not fit a VQGAN: {in_short(error)}") from error
    given = {_within(name): tensor for name, tensor in weights.items()}
    new = {
        name
        for name in shapes
        if name.startswith("likelihood.") or name.removeprefix("quantizer.") in ("traffic", "error", "num_updates")
    }
    check_weights({name: tensor for name, tensor in shapes.items() if name not in new}, given, source)
    model = config.build()
    own = model.state_dict()
    safefolder.folder.load_weights(model, {**{name: own[name] for name in new}, **given}, source)
    assert isinstance(model.quantizer.num_updates, Tensor)
    model.quantizer.num_updates.fill_(1)
    return model.eval()


def _within(name: str) -> str:
    first = name.split(".", 1)[0]
    return name.replace(first, WITHIN[first], 1) if first in WITHIN else name
