"""Bits/dim of PNG and WebP, each image its own file, on the test images that a preset is evaluated on.

    python benchmarks/lossless.py SOURCE [--channels 3] [--size 32] [--root FOLDER]

PNG with Pillow's `optimize`; WebP lossless with quality 100 and method 6. Whole files are counted, headers included, as
somebody who stores one image would pay for them.
"""

import argparse
import io
import math
from typing import Any

from einops import rearrange
from PIL import Image
from tqdm import tqdm

from vqvae import load_images
from vqvae.data import batches

FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "png", "optimize": True},
    "WebP": {"format": "webp", "lossless": True, "quality": 100, "method": 6, "exact": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--channels", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--root")
    options = parser.parse_args()
    images = load_images(options.source, "test", size=options.size, channels=options.channels, root=options.root)
    sizes = dict.fromkeys(FORMATS, 0)
    count = 0
    with tqdm(total=len(images), unit="img", disable=None) as bar:
        for batch in batches(images, 100):
            for levels in rearrange(batch.images, "b c h w -> b h w c").numpy():
                picture = Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)
                for name, how in FORMATS.items():
                    file = io.BytesIO()
                    picture.save(file, **how)
                    sizes[name] += file.tell()
                count += 1
            bar.update(len(batch.images))
    dims = math.prod(images.shape)
    print("| format | bits/dim | images |\n|---|---|---|")
    for name, size in sizes.items():
        print(f"| {name} | {size * 8 / count / dims:.3f} | {count} |")


if __name__ == "__main__":
    main()
