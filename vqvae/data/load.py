"""`load_images`: one name or path to a set of images."""

from pathlib import Path
from types import ModuleType

from vqvae.data.builtin import cifar10, fashion_mini, fashion_mnist, refitted
from vqvae.data.folder import DEFAULT_SIZE, image_folder
from vqvae.data.images import Images, check_shape, check_split
from vqvae.data.tars import image_archives, is_archives

SOURCES = (
    '"fashion-mini", "fashion-mnist", "cifar10", "hf:OWNER/NAME", a .parquet file, a folder with '
    "train*.parquet files, a .tar file, a folder of them, NAME-{0000..0012}.tar, or a folder of images"
)


def load_images(
    source: str | Path,
    split: str = "train",
    *,
    size: int | None = None,
    channels: int | None = None,
    root: str | Path | None = None,
) -> Images:
    """The "train" or "test" images of a source.

        load_images("fashion-mini").shape                       # (1, 28, 28)
        load_images("photos", size=128, channels=3).shape       # (3, 128, 128)

    source: "fashion-mini" (20,000 + 2,000 images, inside the package); "fashion-mnist" or "cifar10"
    (downloaded, or from `root`, a folder that already holds the files); "hf:OWNER/NAME" from
    Hugging Face, or "hf:FOLDER"; a .parquet file; a folder with train*.parquet files; WebDataset archives,
    as a .tar file, a folder of them, or a pattern such as "photos-{0000..0012}.tar"; a folder of images of any size.
    size: scale and crop to `size` by `size`. By default sets keep theirs, parquet, archives and Hugging Face
    sets take their first image's, and folders take 64.
    channels: 1 or 3. By default sets keep theirs; of the other sources, 1 where the first image is
    grey, else 3.

    What each does in full: `fashion_mini`, `fashion_mnist`, `cifar10`, `image_folder`,
    `image_archives`, and `parquet` and `hugging_face` in `vqvae.data.table`.
    Raises ValueError for an unknown source or split, where images are missing or unreadable, and for a folder that
    holds archives and images besides.
    """
    check_split(split)
    check_shape((channels, size, size))
    source = str(source)
    if root is not None and source not in ("fashion-mnist", "cifar10"):
        raise ValueError(
            f'got root={str(root)!r} for {source}; it is only for "fashion-mnist" and "cifar10", '
            "elsewhere give the folder as the source"
        )
    if source == "fashion-mini":
        return refitted(fashion_mini(split), size, channels)
    if source == "fashion-mnist":
        return refitted(fashion_mnist(split, root=root), size, channels)
    if source == "cifar10":
        return refitted(cifar10(split, root=root), size, channels)
    if source.startswith("hf:"):
        name = source.removeprefix("hf:")
        return _table().hugging_face(name, split, size=size, channels=channels)
    if is_archives(source):
        return image_archives(source, split, size=size, channels=channels)
    path = Path(source).expanduser()
    if not path.exists():
        raise ValueError(f"{source} is no known source and does not exist; expected {SOURCES}")
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("train*.parquet"))):
        return _table().parquet(path, split, size=size, channels=channels)
    if not path.is_dir():
        raise ValueError(f"{source} is a file, but not a .parquet one or a .tar one; expected {SOURCES}")
    return image_folder(path, split, size=DEFAULT_SIZE if size is None else size, channels=channels)


def _table() -> ModuleType:
    try:
        from vqvae.data import table
    except ImportError as error:
        raise ValueError(
            f"parquet and Hugging Face sets need more packages ({error}): pip install 'vqvae-priors[parquet]'"
        ) from error
    return table
