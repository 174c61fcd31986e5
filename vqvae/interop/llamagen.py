"""LlamaGen's tokenizers, VQ-16 and VQ-8 (Sun et al. 2024, "Autoregressive Model Beats Diffusion"): `.pt` files.

VQGAN's networks with attention at the resolution of the codes alone; codes and features are compared as unit vectors
(`VectorQuantizer(normalize=True)`). All sizes are in the weights' shapes.
"""

import re
from pathlib import Path

from torch import Tensor

from vqvae.interop.layout import ATTENTION, RESNET, assembled, sizes, to_diffusers
from vqvae.interop.pickles import read_pickle
from vqvae.likelihoods import NormalConfig
from vqvae.quantizers import VectorQuantizerConfig
from vqvae.vqgan import VQGAN, VQGANConfig

CODEBOOK = "quantize.embedding.weight"
# Codes that the last batches of training used.
STATISTICS = "quantize.codebook_used"


def import_llamagen(file: str | Path, *, image_size: int = 256) -> VQGAN:
    """VQ-16 or VQ-8 as a model of ours, in eval mode.

    It can be trained on: its codebook stays where it is until gradients move it.

    Args:
        file: the released `.pt`, or a trainer's own, of which the averaged weights are taken where it has some; read
            without running what is in it, see `vqvae.interop.pickles`.
        image_size: height and width, any multiple of 2^(levels − 1).

    Raises:
        ValueError: missing, corrupt, or no tokenizer of LlamaGen's.
    """
    file = Path(file)
    held = read_pickle(file)
    parts = [held[name] for name in ("ema", "model", "state_dict") if name in held] if isinstance(held, dict) else []
    state = parts[0] if parts else held
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f"{file} has no weights under model, expected a tokenizer of LlamaGen's")
    names = {CODEBOOK: "quantizer.codebook"}
    named = to_diffusers(
        {name: tensor for name, tensor in state.items() if name != STATISTICS},
        lambda name: names.get(name) or _name(name),
        file,
        "tokenizer of LlamaGen's",
    )
    if "quantizer.codebook" not in named:
        raise ValueError(f"{file} has no {CODEBOOK}, expected a tokenizer of LlamaGen's")
    num_codes, dim = named["quantizer.codebook"].shape
    config = VQGANConfig(
        image_size=image_size,
        likelihood=NormalConfig(),
        quantizer=VectorQuantizerConfig(num_codes=num_codes, dim=dim, normalize=True, revival="off"),
        **sizes(named, file),
    )
    return assembled(config, named, file)


def _name(name: str) -> str | None:
    """A weight's name in diffusers' layout, whose order of levels is LlamaGen's; None for one that it has not."""
    start, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if start in ("quant_conv", "post_quant_conv"):
        return name
    net, _, place = start.partition(".")
    if net not in ("encoder", "decoder"):
        return None
    if place in ("conv_in", "conv_out", "norm_out"):
        return f"{net}.{'conv_norm_out' if place == 'norm_out' else place}.{leaf}"
    if (m := re.fullmatch(r"mid\.([012])\.(\w+)", place)) is not None:
        new = (ATTENTION if m[1] == "1" else RESNET).get(m[2])
        return new and f"{net}.mid_block.{('resnets.0', 'attentions.0', 'resnets.1')[int(m[1])]}.{new}.{leaf}"
    levels, resample = ("down", "downsample") if net == "encoder" else ("up", "upsample")
    if (m := re.fullmatch(rf"conv_blocks\.(\d+)\.{resample}\.conv", place)) is not None:
        return f"{net}.{levels}_blocks.{m[1]}.{resample}rs.0.conv.{leaf}"
    if (m := re.fullmatch(r"conv_blocks\.(\d+)\.(res|attn)\.(\d+)\.(\w+)", place)) is None:
        return None
    names, parts = (RESNET, "resnets") if m[2] == "res" else (ATTENTION, "attentions")
    new = names.get(m[4])
    return new and f"{net}.{levels}_blocks.{m[1]}.{parts}.{m[3]}.{new}.{leaf}"
