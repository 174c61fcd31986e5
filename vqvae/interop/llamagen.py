"""LlamaGen's tokenizers, VQ-16 and VQ-8 (Sun et al. 2024, "Autoregressive Model Beats Diffusion"): `.pt` files.

VQGAN's networks with attention at the resolution of the codes alone; codes and features are compared as unit vectors
(`VectorQuantizer(normalize=True)`). All sizes are in the weights' shapes.
"""

from pathlib import Path

from vqvae.interop.layout import Layout, assembled, sizes, to_diffusers, weights_of
from vqvae.interop.pickles import read_pickle
from vqvae.likelihoods import NormalConfig
from vqvae.quantizers import VectorQuantizerConfig
from vqvae.vqgan import VQGAN, VQGANConfig

LAYOUT = Layout(
    levels={"encoder": "conv_blocks", "decoder": "conv_blocks"}, block="res", middle=("0", "1", "2"), finest_first=False
)
KIND = "tokenizer of LlamaGen's"
QUANTIZER = {"quantize.embedding.weight": "quantizer.codebook"}
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
    state = weights_of(read_pickle(file), ("ema", "model", "state_dict"), file, f"a {KIND}")
    weights = {name: tensor for name, tensor in state.items() if name != STATISTICS}
    named = to_diffusers(weights, lambda name: LAYOUT.name(name, 0), QUANTIZER, file, KIND)
    num_codes, dim = named["quantizer.codebook"].shape
    found = sizes(named, file)
    return assembled(
        lambda: VQGANConfig(
            image_size=image_size,
            likelihood=NormalConfig(),
            quantizer=VectorQuantizerConfig(num_codes=num_codes, dim=dim, normalize=True, revival="off"),
            **found,
        ),
        named,
        file,
    )
