"""What the importers share: a config from the shapes of weights, names of one layout in another, and a model of both.

Weights here have the names of diffusers' `VQModel`, whose quantizer is `quantize`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import safefolder
from vqvae.vqgan import VQGAN, VQGANConfig

# Names of diffusers that lie beside its encoder and decoder, and lie within them here.
WITHIN = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}
RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def few(names: Iterable[str]) -> str:
    """The first three names, and how many more."""
    first, more = sorted(names)[:3], len(set(names)) - 3
    return ", ".join(first) + (f" and {more} more" if more > 0 else "")


def to_diffusers(
    weights: Mapping[str, Tensor], name_of: Callable[[str], str | None], source: str | Path, kind: str
) -> dict[str, Tensor]:
    """Weights under the names that `name_of` gives; attention's 1×1 convolutions as the linear maps they are.

    Raises:
        ValueError: names for which there is none.
    """
    named, unknown = {}, []
    for name, tensor in weights.items():
        new = name_of(name)
        if new is None:
            unknown.append(name)
        elif re.search(r"\.to_(q|k|v|out\.0)\.weight$", new) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
            named[new] = tensor[:, :, 0, 0]
        else:
            named[new] = tensor
    if unknown:
        raise ValueError(f"{source} holds {few(unknown)}, which no {kind} has; expected its weights alone")
    return named


def sizes(weights: Mapping[str, Tensor], source: str | Path) -> dict[str, Any]:
    """The fields of `VQGANConfig` that the names and shapes of weights tell.

    Raises:
        ValueError: a part without which there is no telling.
    """
    num_levels = _count(weights, r"encoder\.down_blocks\.(\d+)\.")

    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"{source} has no {name}, expected all weights of encoder, decoder and quantizer")
        return weights[name].shape

    def with_attention(blocks: str) -> tuple[int, ...]:
        found = {int(m[1]) for name in weights if (m := re.match(rf"{blocks}\.(\d+)\.attentions\.", name))}
        return tuple(sorted(found))

    return {
        "num_channels": shape("encoder.conv_in.weight")[1],
        "channels": tuple(
            shape(f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in range(num_levels)
        ),
        "num_blocks": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_attention": with_attention(r"encoder\.down_blocks"),
        "up_attention": tuple(sorted(num_levels - 1 - level for level in with_attention(r"decoder\.up_blocks"))),
        "mid_attention": any(name.startswith("encoder.mid_block.attentions.") for name in weights),
        "latent_channels": shape("encoder.conv_out.weight")[0],
    }


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(m[1]) for name in weights if (m := re.match(pattern, name))), default=-1)


def assembled(config: VQGANConfig, weights: Mapping[str, Tensor], source: str | Path) -> VQGAN:
    """A model of weights whose encoder's and decoder's names are diffusers', whose quantizer's are ours; in eval mode.

    What a file has no word of (the quantizer's statistics, the likelihood's scale) is as in a new model, except that
    the quantizer counts one update: its codebook is there, so no first update may put another in its place.

    Raises:
        ValueError: weights that do not fit the config.
    """
    model = config.build()
    own = model.state_dict()
    given = {_within(name): tensor for name, tensor in weights.items()}
    statistics = {
        name: tensor
        for name, tensor in own.items()
        if name.startswith("likelihood.") or name.removeprefix("quantizer.") in ("traffic", "error", "num_updates")
    }
    safefolder.load_weights(model, {**statistics, **given}, source)
    assert isinstance(model.quantizer.num_updates, Tensor)
    model.quantizer.num_updates.fill_(1)
    return model.eval()


def _within(name: str) -> str:
    first = name.split(".", 1)[0]
    return name.replace(first, WITHIN[first], 1) if first in WITHIN else name
