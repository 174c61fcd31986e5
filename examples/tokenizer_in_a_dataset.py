"""A tokenizer inside a plain torch Dataset: your pipeline, with codes in place of pixels.

    python examples/tokenizer_in_a_dataset.py RUN_OR_MODEL_FOLDER IMAGE_FOLDER

Encoding wants batches, so the tokenizer stands in the loader's `collate_fn` and not in `__getitem__`; with workers it
is sent to each of them. For a set that you go through more than once, `vqvae tokenize` writes the codes once instead.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from vqvae import VQVAE


class YourImages(Dataset):
    """Any Dataset whose items are an image and what belongs to it."""

    def __init__(self, folder: Path, size: int, num_channels: int):
        self.paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        self.mode = "L" if num_channels == 1 else "RGB"
        self.transform = v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert(self.mode)), self.paths[index].name


class Tokenized:
    """A `collate_fn` that gives codes, int64 "b *grid", where the Dataset gives images, uint8 "c h w"."""

    def __init__(self, model: VQVAE):
        self.model = model

    def __call__(self, items: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str]]:
        images, names = zip(*items, strict=True)
        return self.model.encode(torch.stack(images)), list(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    args = parser.parse_args()

    codebook = args.model / "codebook"
    model = VQVAE.from_pretrained(codebook if codebook.is_dir() else args.model)
    images = YourImages(args.images, model.config.image_size, model.config.num_channels)
    for codes, names in DataLoader(images, batch_size=32, collate_fn=Tokenized(model)):
        first = codes[0].flatten()[:8].tolist()
        print(f"{len(names)} images, codes {tuple(codes.shape)}; {names[0]} begins with {first}")
        decoded = model.decode(codes)  # and back: uint8 "b c h w"
        assert decoded.shape[1:] == (model.config.num_channels, *model.size)


if __name__ == "__main__":
    main()
