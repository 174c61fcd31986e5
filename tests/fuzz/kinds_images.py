"""What is read as images: PNGs, archives, parquet files, which go the way that a user's do, through `load_images`."""

import contextlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
from fuzz_files import Kind
from PIL import Image, PngImagePlugin

from vqvae.data import Images, load_images, table
from vqvae.data.tar_index import index_of

_RNG = np.random.default_rng(0)


def _levels(*shape: int) -> np.ndarray:
    return _RNG.integers(0, 256, shape, np.uint8)


def _encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, kind, **options)
    return stream.getvalue()


def _image(kind: str = "PNG") -> bytes:
    return _encoded(_levels(6, 6, 3), kind)


def _pngs(folder: Path) -> Sequence[bytes]:
    text = PngImagePlugin.PngInfo()
    text.add_text("title", "a picture", zip=True)
    text.add_itxt("author", "nobody")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.fromarray(_levels(5, 5, 3)) for _ in range(3)]
    return [
        _encoded(_levels(20, 30, 3)),
        _encoded(_levels(9, 7), pnginfo=text),
        _encoded(_levels(9, 7, 4), exif=exif),
        _encoded(_levels(9, 7, 2)),
        _encoded(_levels(9, 7) > 127),
        _encoded(_RNG.integers(0, 65536, (9, 7), np.uint16)),
        _encoded(Image.fromarray(_levels(9, 7, 3)).quantize(8), transparency=3),
        _encoded(frames[0], save_all=True, append_images=frames[1:]),
    ]


def _see(images: Images) -> None:
    """Every image and label, in both ways of asking for them."""
    for at in range(len(images)):
        with contextlib.suppress(ValueError):
            images[at]
    batch = images[:]
    assert len(batch) + len(batch.skipped) == len(images)
    assert images.num_classes is None or (batch.labels < images.num_classes).all()
    images.digest(range(len(images)))
    images.digest(range(len(images)), times=False)


def _read(path: Path) -> None:
    """A file, and what can be seen of it in both splits; refused if it is in one."""
    refused = None
    for split in ("train", "test"):
        try:
            _see(load_images(path, split))
        except ValueError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def _read_tar(path: Path) -> None:
    # It is told from the one before by its time of change, which is too coarse for that.
    index_of.cache_clear()
    _read(path)


def _read_folder(path: Path) -> None:
    _see(load_images(path.parent))


def _tar(folder: Path, members: Sequence[tuple[str, bytes]], **options: object) -> bytes:
    path = folder / "made.tar"
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        links = {"hard.png": tarfile.LNKTYPE, "soft.png": tarfile.SYMTYPE, "folder": tarfile.DIRTYPE}
        for name, kind in links.items() if options else ():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, members[0][0]
            archive.addfile(member)
    return path.read_bytes()


def _tars(folder: Path) -> Sequence[bytes]:
    numbered = [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", _image()), ("cls", b"%d" % i))]
    named = [(f"a/{i}.{kind}", data) for i in range(2) for kind, data in (("JPG", _image("JPEG")), ("CLS", b"cat\n"))]
    described = [
        part
        for i, label in enumerate((0, "cat", None))
        for part in ((f"{i}.webp", _image("WEBP")), (f"{i}.json", json.dumps({"label": label}).encode()))
    ]
    frames = [*((f"clip.frame{i}.png", _image()) for i in range(3)), ("clip.cls", b"1")]
    depth = [("0.png", _image()), ("0.depth.png", _image()), ("1.png", _image()), (".hidden.png", b"")]
    long = [("long/" * 60 + "ä.png", _image()), ("long/" * 60 + "ä.cls", b"0")]
    return [
        _tar(folder, numbered),
        _tar(folder, named, format=tarfile.GNU_FORMAT),
        _tar(folder, described, format=tarfile.PAX_FORMAT, pax_headers={"comment": "all of them"}),
        _tar(folder, frames),
        _tar(folder, depth),
        _tar(folder, long, format=tarfile.PAX_FORMAT),
        _tar(folder, long, format=tarfile.GNU_FORMAT),
    ]


def _parquets(folder: Path) -> Sequence[bytes]:
    num = 12
    structs = [{"bytes": _image(), "path": f"{i}.png"} for i in range(num)]
    structs[3] = {"bytes": None, "path": "elsewhere.png"}
    plain = [_encoded(_levels(6, 6)) for _ in range(num)]
    noted = {"info": {"features": {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}
    words = ["cat", "dog", "cat", ""] * (num // 4)
    structured = pyarrow.table({"image": structs, "label": [0, 1] * (num // 2)})
    numbers = pyarrow.array(words).dictionary_encode()
    found = []
    for made, options in (
        (structured.replace_schema_metadata({"huggingface": json.dumps(noted)}), {}),
        (pyarrow.table({"image": plain, "label": words}), {"compression": "none", "use_dictionary": False}),
        (pyarrow.table({"image": plain, "labels": numbers}), {"row_group_size": 5}),
        (pyarrow.table({"image": structs, "label": [0.5] * num}), {"compression": "zstd", "data_page_version": "2.0"}),
        (pyarrow.table({"image": plain, "label": [[1]] * num}), {"compression": "gzip", "write_page_checksum": True}),
    ):
        pyarrow.parquet.write_table(made, folder / "made.parquet", **options)
        found.append((folder / "made.parquet").read_bytes())
    return found


def _read_parquet(path: Path) -> None:
    """Held in memory, or as by its row groups if it were large: pyarrow aborts when it measures some damaged ones."""
    with contextlib.ExitStack() as stack:
        if path.stat().st_size % 2:
            stack.enter_context(mock.patch.object(table, "HELD_BYTES", 0))
            stack.enter_context(mock.patch.object(table, "_num_bytes", return_value=1))
        _read(path)


KINDS = {
    "png": Kind(good=_pngs, read=_read_folder, name="x.png"),
    "tar": Kind(good=_tars, read=_read_tar, name="x.tar"),
    "parquet": Kind(good=_parquets, read=_read_parquet, name="x.parquet"),
}
