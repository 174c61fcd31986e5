"""`load_images`: one name or path to a set of images."""

import os
from pathlib import Path
from types import ModuleType

from vqvae.data.builtin import cifar10, fashion_mini, fashion_mnist, refitted
from vqvae.data.files import check_regular, shown
from vqvae.data.folder import DEFAULT_SIZE, images_of
from vqvae.data.images import Images, Size, check_split, wanted
from vqvae.data.splits import layout
from vqvae.data.tars import archives_of, image_archives
from vqvae.data.transformed import Transform, TransformedImages

SOURCES = (
    '"fashion-mini", "fashion-mnist", "cifar10", "hf:OWNER/NAME", a folder of images, of .parquet files or of .tar '
    "files, one .parquet or .tar file, or NAME-{0000..0012}.tar"
)


def load_images(
    source: str | Path,
    split: str = "train",
    *,
    size: Size | None = None,
    channels: int | None = None,
    root: str | Path | None = None,
    transform: Transform | None = None,
) -> Images:
    """The "train" or "test" images of a source.

        load_images("fashion-mini").shape                       # (1, 28, 28)
        load_images("photos", size=128, channels=3).shape       # (3, 128, 128)
        load_images("photos")[:8].images                        # uint8 (8, c, 64, 64)
        load_images("photos", "test").split, load_images("photos").class_names
        load_images("photos").original_size(0)                  # (height, width) of the file
        load_images("photos", size=96, transform=v2.RandomCrop(64))     # of torchvision.transforms

    source: "fashion-mini" (20,000 + 2,000 images, inside the package); "fashion-mnist" or "cifar10"
    (downloaded, or from `root`, a folder that already holds the files); "hf:OWNER/NAME" from
    Hugging Face, or "hf:FOLDER"; a .parquet file; a WebDataset archive, as a .tar file, or several by a pattern such as
    "photos-{0000..0012}.tar"; or a folder that holds images of any size, or parquet files, or archives, at any depth.
    Which part of a folder is for which split its names say, as train/ and test/, or train-0.parquet and
    test-0.parquet. A part named for validation stands for test, and is left aside where there is one for test too. All
    names are in `vqvae.data.splits`. Where nothing is named for test, about one image in ten is held out for it.
    size: scale and crop to this side, or to (height, width). By default sets keep theirs, parquet,
    archives and Hugging Face sets take their first image's, and folders of images take 64.
    channels: 1 or 3. By default sets keep theirs; of the other sources, 1 where the first image is
    grey, else 3.
    transform: a function of each image, uint8 "c h w" as the set has it without, which gives uint8 "c h w" of one
    shape, as those of torchvision.transforms.v2 do (`vqvae.data.transformed`). To train on random crops, flips and
    turns, `batches(images, ..., augment=Augment(crop=0.5, flip=True))` cuts them out of the whole picture.

    What each does in full: `fashion_mini`, `fashion_mnist`, `cifar10`, `image_folder`,
    `image_archives`, and `parquet` and `hugging_face` in `vqvae.data.table`.
    Raises ValueError for an unknown source or split, where images are missing or unreadable, for a transform that
    gives something else, and for a folder that can be read in two ways, as one that holds archives and images besides.
    Labels that are there and can't be used are no error: `Images.label_note` says why.
    """
    images = _loaded(source, split, size, channels, root)
    return images if transform is None else TransformedImages(images, transform)


def _loaded(source: str | Path, split: str, size: Size | None, channels: int | None, root: str | Path | None) -> Images:
    check_split(split)
    sides, channels = wanted(size, channels)
    source = str(source)
    if not source.strip():
        raise ValueError(f"got no source of images; expected {SOURCES}")
    if root is not None and source not in ("fashion-mnist", "cifar10"):
        raise ValueError(
            f'got root={str(root)!r} for {source}; it is only for "fashion-mnist" and "cifar10", '
            "elsewhere give the folder as the source"
        )
    if source == "fashion-mini":
        return refitted(fashion_mini(split), sides, channels)
    if source == "fashion-mnist":
        return refitted(fashion_mnist(split, root=root), sides, channels)
    if source == "cifar10":
        return refitted(cifar10(split, root=root), sides, channels)
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        return _table().hugging_face(name, split, size=sides, channels=channels)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        return _of_folder(path, split, sides, channels)
    if path.suffix.lower() == ".tar":
        return image_archives(source, split, size=sides, channels=channels)
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise ValueError(f"{shown(source)} is no known source and does not exist; expected {SOURCES}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ValueError(f"{shown(source)} can't be read: {reason}; expected {SOURCES}") from error
    if path.suffix.lower() != ".parquet":
        raise ValueError(f"{source} is a file, but not a .parquet one or a .tar one; expected {SOURCES}")
    return _table().parquet(path, split, size=sides, channels=channels)


def _of_folder(folder: Path, split: str, size: Size | None, channels: int | None) -> Images:
    found = layout(folder)
    kinds = found.kinds
    if "archives" in kinds:
        return archives_of(found, split, size=size, channels=channels)
    if "parquet files" in kinds:
        return _table().tables_of(found, split, size=size, channels=channels)
    return images_of(found, split, size=DEFAULT_SIZE if size is None else size, channels=channels)


def _table() -> ModuleType:
    try:
        from vqvae.data import table
    except ImportError as error:
        raise ValueError(
            f"parquet and Hugging Face sets need more packages ({error}): pip install 'vqvae-priors[parquet]'"
        ) from error
    return table
