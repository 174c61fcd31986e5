"""Images out of arbitrary bits: dream."""

import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import vqvae.codec
from vqvae import pictures
from vqvae.cli.common import Model, at_least_one, load_codec, speed, tell


def dream(
    run_or_model: Model,
    bits: Path | None = None,
    seed: int | None = None,
    num_bytes: int | None = None,
    prior: str | None = None,
    num: int = 64,
    output: Path = Path("dream.png"),
) -> int:
    """Decompress what nobody compressed: make images out of arbitrary bits, and the bits out of the images again.

    Evenly random bits give samples of the model; a text or a program gives something else. The images' symbols are then
    encoded again, which must give back the bytes to the last bit; the exit status is 1 if it does not.

    Example: vqvae dream runs/fashion-mini --seed 1 --num-bytes 20000 --output dream.png

    Args:
        run_or_model: a run's folder; or a tokenizer's folder or hub id, together with --prior.
        bits: the file to take for bits.
        seed: random bytes instead, 0 unless given; the same seed gives the same ones (numpy's PCG64).
        num_bytes: how many random bytes, 4096 unless given.
        prior: folder or hub id of the prior; the run's own unless given.
        num: how many images at most.
        output: the PNG file to write.
    """
    at_least_one(num, "--num")
    if bits is not None and (seed is not None or num_bytes is not None):
        raise ValueError("--bits takes the bytes of a file, --seed and --num-bytes make some; give one or the other")
    if num_bytes is not None:
        at_least_one(num_bytes, "--num-bytes")
    if seed is not None and seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    if bits is not None and not bits.is_file():
        raise ValueError(f"no file at {bits}; name one with --bits, or take random bytes with --seed")
    codec, _ = load_codec(run_or_model, prior)
    if bits is not None:
        data = bits.read_bytes()
    else:
        data = np.random.Generator(np.random.PCG64(seed or 0)).bytes(num_bytes or 4096)
    start = time.perf_counter()
    with tqdm(total=num, desc="dream", unit="img", disable=None) as bar:
        dreamt = vqvae.codec.dream(codec, data, num, watch=bar.update)
    seconds = time.perf_counter() - start
    if not len(dreamt.images):
        needed = vqvae.codec.bytes_for_an_image(codec)
        raise ValueError(
            f"{len(data):,} bytes are too few for an image, which may need up to {needed:,}; "
            f"give at least {needed + 8:,}"
        )
    pictures.save_grid(output, dreamt.images, 8)
    same = vqvae.codec.awake(codec, dreamt) == data
    num_images, used = len(dreamt.images), max(0, len(data) - len(dreamt.left))
    print(
        f"{output}: {num_images} images out of {used:,} of {len(data):,} bytes, "
        f"{8 * used / dreamt.images.numel():.4f} bits/dim; {speed(num_images, seconds)}; "
        f"encoded again they give {'the same' if same else 'other'} bytes"
    )
    if not same:
        tell("the bytes did not come back: this machine computes the model in two ways")
    return 0 if same else 1
