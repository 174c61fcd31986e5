"""A diffusers user's way in and out: their VQModel with our metrics, prior and codec, and back to diffusers.

    python examples/diffusers_in_and_out.py [VQMODEL_FOLDER_OR_HUB_ID] [--subfolder vqvae] [--output out]

Needs diffusers. Without a name it builds a small VQModel with random weights, so that the way can be tried offline.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import VQModel

from priors import TransformerPrior
from vqvae import VQVAE, load_images
from vqvae.bound import elbo
from vqvae.interop import compare_codes, export_diffusers, fit_scale, import_diffusers
from vqvae.metrics import psnr


def random_vqmodel(folder: Path) -> str:
    """A VQModel that nobody trained."""
    torch.manual_seed(0)
    VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(32, 32, 64),
        latent_channels=16,
        num_vq_embeddings=64,
    ).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--subfolder")
    parser.add_argument("--output", type=Path, default=Path("out"))
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        source = args.source or random_vqmodel(Path(temporary) / "vqmodel")
        options = {} if args.subfolder is None else {"subfolder": args.subfolder}
        theirs = VQModel.from_pretrained(source, **options).eval()
        # In: images of any size that the networks can halve.
        model = import_diffusers(source, image_size=32, **options)
    images = load_images("fashion-mini", "test", size=32, channels=3)[:32].images

    # The same codes, but where two are equally near; the same pictures.
    with torch.no_grad():
        latents = theirs.encode(images / 127.5 - 1).latents
        codes = theirs.quantize(latents)[2][2].reshape(len(images), *model.grid)
        picture = theirs.decode(latents).sample
    print(f"codes beside theirs: {compare_codes(model, images, codes)}")
    own = model.decode(model.encode(images))
    levels = ((picture + 1) * 127.5).round().clamp(0, 255).byte()
    print(f"largest difference of a pixel: {(own.int() - levels.int()).abs().max()} level")

    # What a VQModel has not: a likelihood, and so bits; any of our priors; a codec.
    fit_scale(model, images)
    prior = TransformerPrior(num_codes=model.num_codes, grid=model.grid, width=32, depth=1, num_heads=2)
    with torch.no_grad():
        bits = elbo(model, prior, images).bits_per_dim(model.num_dims).mean()
    print(f"PSNR {psnr(images, own).mean():.2f} dB, {bits:.3f} bits/dim with a prior that nobody trained")

    # Out: as ours, and as diffusers' own.
    model.save_pretrained(args.output / "ours")
    assert torch.equal(VQVAE.from_pretrained(args.output / "ours").encode(images), model.encode(images))
    export_diffusers(model, args.output / "diffusers")
    again = VQModel.from_pretrained(args.output / "diffusers").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())
    print(f"{args.output}: ours/ and diffusers/, whose weights are those that came in, to the bit")


if __name__ == "__main__":
    main()
