"""Images out of arbitrary bits: dream."""

import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import vqvae.codec
from vqvae import pictures
from vqvae.cli.common import Model, at_least_one, load_codec, speed, tell
from vqvae.codec.dreaming import most_bytes
from vqvae.codec.storage import FileOnDisk, check_readable, file_to_write

_NUM_BYTES = 4096
_MOST_RANDOM = 1 << 40
_MOST_IMAGES = 1 << 14
# Bytes that are held.
_MOST_USED = 1 << 30


def dream(
    run_or_model: Model,
    bits: Path | None = None,
    seed: int | None = None,
    num_bytes: int | None = None,
    prior: str | None = None,
    num: int = 64,
    output: Path = Path("dream.png"),
) -> int:
    """Make images out of arbitrary bits, which nobody compressed.

    Evenly random bits give samples of the model; a text or a program gives something else. The images' symbols are then
    encoded again, which must give back the bytes to the last bit; the exit status is 1 if it does not.

    Example: vqvae dream runs/fashion-mini --seed 1 --num-bytes 20000 --output dream.png

    Args:
        run_or_model: a run's folder; or a tokenizer's folder or hub id, together with --prior.
        bits: the file to take for bits.
        seed: random bytes instead, 0 unless given; the same seed gives the same ones (numpy's PCG64).
        num_bytes: how many random bytes, 4096 unless given and at most 2^40. Those that the images do not get to are
            not made.
        prior: folder or hub id of the prior; the run's own unless given.
        num: how many images at most, 16,384 or fewer.
        output: the PNG file to write.
    """
    at_least_one(num, "--num")
    if num > _MOST_IMAGES:
        raise ValueError(f"--num must be at most {_MOST_IMAGES:,}, which make one picture, got {num:,}")
    if bits is not None and (seed is not None or num_bytes is not None):
        raise ValueError("--bits takes the bytes of a file, --seed and --num-bytes make some; give one or the other")
    if num_bytes is not None:
        at_least_one(num_bytes, "--num-bytes")
        if num_bytes > _MOST_RANDOM:
            raise ValueError(f"--num-bytes must be at most {_MOST_RANDOM:,}, got {num_bytes:,}")
    if seed is not None and seed < 0:
        raise ValueError(f"--seed must be at least 0, got {seed}")
    if bits is not None:
        check_readable(bits)
    file_to_write(output)
    codec, _ = load_codec(run_or_model, prior)
    size = (num_bytes or _NUM_BYTES) if bits is None else bits.stat().st_size
    # What lies further from the end is in no image. PCG64 makes eight bytes at a time.
    left_out = max(0, size - most_bytes(codec, num)) // 8 * 8
    if size - left_out > _MOST_USED:
        raise ValueError(
            f"{num:,} images of this model may take {size - left_out:,} bytes, expected at most {_MOST_USED:,}; "
            "give a smaller --num"
        )
    data = _random(seed or 0, left_out, size) if bits is None else _end_of(bits, left_out)
    start = time.perf_counter()
    with tqdm(total=num, desc="dream", unit="img", disable=None) as bar:
        dreamt = vqvae.codec.dream(codec, data, num, watch=bar.update)
    seconds = time.perf_counter() - start
    if not len(dreamt.images):
        needed = vqvae.codec.dreaming.bytes_for_an_image(codec)
        raise ValueError(
            f"{size:,} bytes are too few for an image, which may need up to {needed:,}; give at least {needed + 8:,}"
        )
    pictures.save_grid(output, dreamt.images, 8)
    same = vqvae.codec.dreaming.undream(codec, dreamt) == data
    num_images, used = len(dreamt.images), max(0, len(data) - len(dreamt.left))
    print(
        f"{output}: {num_images} images out of {used:,} of {size:,} bytes, "
        f"{8 * used / dreamt.images.numel():.4f} bits/dim; {speed(num_images, seconds)}; "
        f"encoded again they give {'the same' if same else 'other'} bytes"
    )
    if not same:
        tell("the bytes did not come back: this machine computes the model in two ways")
    return 0 if same else 1


def _random(seed: int, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of PCG64's; it gives eight at a time, and `start` is a multiple of that."""
    generator = np.random.PCG64(seed)
    generator.advance(start // 8)
    return np.random.Generator(generator).bytes(stop - start)


def _end_of(path: Path, start: int) -> bytes:
    file = FileOnDisk(path)
    try:
        return file.read(start, file.size - start)
    finally:
        file.close()
