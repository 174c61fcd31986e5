"""LlamaGen's tokenizers, VQ-16 and VQ-8 (Sun et al. 2024, "Autoregressive Model Beats Diffusion"): `.pt` files.

VQGAN's networks with attention at the resolution of the codes alone; codes and features are compared as unit vectors
(`VectorQuantizer(normalize=True)`). All sizes are in the weights' shapes.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vqvae.interop.state_dicts import Tell, find_weights, read_checkpoint
from vqvae.interop.weight_names import NEAREST, Layout, assembled, sizes, to_diffusers
from vqvae.likelihoods import Normal
from vqvae.quantizers import VectorQuantizer
from vqvae.vqgan import VQGAN

LAYOUT = Layout(
    levels={"encoder": "conv_blocks", "decoder": "conv_blocks"}, block="res", middle=("0", "1", "2"), finest_first=False
)
KIND = "tokenizer of LlamaGen's"
# Codes that the last batches of training used.
STATISTICS = "quantize.codebook_used"


def import_llamagen(file: str | Path, *, image_size: int | tuple[int, int] = 256, tell: Tell | None = None) -> VQGAN:
    """VQ-16 or VQ-8 as a model of ours, in eval mode.

    It can be trained on: its codebook stays where it is until gradients move it.

    Args:
        file: the released `.pt`, or a trainer's own, of which the averaged weights are taken where it has some; read
            without running what is in it, see `vqvae.interop.pickles`.
        image_size: side, or height and width, any multiples of 2^(levels − 1).
        tell: called with a sentence where the weights lie elsewhere than they do in released files, or under names that
            others were put before; e.g. `print`.

    Raises:
        ValueError: missing, corrupt, or no tokenizer of LlamaGen's.
    """
    file = Path(file)
    return llamagen_model(find_weights(read_checkpoint(file), file, f"a {KIND}", tell), file, image_size)


def llamagen_model(weights: Mapping[str, Tensor], file: Path, image_size: int | tuple[int, int]) -> VQGAN:
    """What `import_llamagen` makes of weights that were found in a file."""
    weights = {name: tensor for name, tensor in weights.items() if name != STATISTICS}
    named = to_diffusers(weights, lambda name: LAYOUT.name(name, 0), NEAREST, file, KIND)
    num_codes, dim = named["quantizer.codebook"].shape
    found = sizes(named, file)
    return assembled(
        lambda: VQGAN.Config(
            image_size=image_size,
            likelihood=Normal.Config(),
            quantizer=VectorQuantizer.Config(num_codes=num_codes, dim=dim, normalize=True, revival="off"),
            **found,
        ),
        named,
        file,
    )
