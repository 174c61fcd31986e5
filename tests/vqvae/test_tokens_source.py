"""Tokenized sets and their source: what was changed since is noticed, and what cannot be read now is never left out."""

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from image_files import noise, save
from PIL import Image
from token_worlds import contents, photos, tokenize, tokenizer

from vqvae.data import Images, ImageTensors, load_images
from vqvae.tokens import CodeDataset, Tokenized

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
SIZES = {"batch_size": 4, "shard_size": 9}
CHANGED = r"holds codes-0000\d.safetensors of other images than .* has now, by their names, labels, sizes or times of"


def run(images: Images | Path, folder: Path, **options) -> Tokenized:
    images = images if isinstance(images, Images) else load_images(images, size=8, channels=3)
    return tokenize(tokenizer(), images, folder, **{**SIZES, **options})


def encoded(seed: int) -> bytes:
    stream = io.BytesIO()
    levels = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(seed)).byte()
    Image.fromarray(levels.numpy()).save(stream, "BMP")  # all of one size
    return stream.getvalue()


def archive(folder: Path, seeds: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, part in (("train", seeds), ("test", [0])):
        with tarfile.open(folder / f"{name}.tar", "w") as file:
            for number, seed in enumerate(part):
                member = tarfile.TarInfo(f"{number:03}.bmp")
                member.size = len(encoded(seed))
                file.addfile(member, io.BytesIO(encoded(seed)))
    return folder


def table(folder: Path, seeds: list[int]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    for name, part in (("train", seeds), ("test", [0])):
        rows = pyarrow.table({"image": [encoded(seed) for seed in part]})
        parquet.write_table(rows, folder / f"{name}.parquet", row_group_size=5)
    return folder


def files(folder: Path, seeds: list[int]) -> Path:
    for number, seed in enumerate(seeds):
        path = folder / "train" / f"{number:03}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != encoded(seed):
            path.write_bytes(encoded(seed))
    save(folder / "test" / "0.png", noise(8, 8, 3))
    return folder


MAKERS: dict[str, Callable[[Path, list[int]], Path]] = {"files": files, "archive": archive, "table": table}


@pytest.mark.parametrize("kind", [*MAKERS, "lazy table"])
def test_other_images_of_equal_size_are_refused_and_moved_ones_are_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if kind == "lazy table":
        pytest.importorskip("pyarrow")
        monkeypatch.setattr("vqvae.data.table.HELD_BYTES", 0)
    make, seeds = MAKERS[kind.removeprefix("lazy ")], list(range(20))
    source = make(tmp_path / "source", seeds)
    run(source, tmp_path / "codes")
    (tmp_path / "codes" / "codes-00001.safetensors").unlink()

    # The same set elsewhere, by another spelling: what is missing is made, and all is as it was.
    before = contents(tmp_path / "codes")
    source = source.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert run(Path("moved"), tmp_path / "codes").num_images == 9
    made = contents(tmp_path / "codes")
    assert {name: made[name] for name in before} == before

    (tmp_path / "codes" / "codes-00001.safetensors").unlink()
    (tmp_path / "codes" / "index.json").unlink()
    before = contents(tmp_path / "codes")
    make(source, [*seeds[:3], 99, *seeds[4:]])
    with pytest.raises(ValueError, match=CHANGED) as caught:
        run(source, tmp_path / "codes")
    assert "have the source as it was" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "codes") == before


def test_a_file_that_was_renamed_or_took_anothers_place_is_noticed(tmp_path: Path):
    source = photos(tmp_path / "photos", num=20)
    run(source, tmp_path / "codes")
    renamed, moved, touched = (shutil.copytree(source, tmp_path / name) for name in ("renamed", "moved", "touched"))
    # One removed and one added: as many as there were, and all between them one place on.
    (renamed / "train" / "a" / "000.png").rename(renamed / "train" / "b" / "999.png")
    (moved / "train" / "a" / "009.png").rename(moved / "train" / "b" / "009.png")  # the order stays, the label changes
    os.utime(touched / "train" / "b" / "015.png", ns=(0, 0))
    for has_index in (True, False):
        if not has_index:
            (tmp_path / "codes" / "index.json").unlink()
        for changed in (renamed, moved, touched):
            with pytest.raises(ValueError, match=CHANGED):
                run(changed, tmp_path / "codes")
    copied = shutil.copytree(source, tmp_path / "copied")
    assert run(copied, tmp_path / "codes").num_images == 0


def test_tensors_are_told_apart_by_pixels_labels_and_classes(tmp_path: Path):
    pixels = torch.randint(0, 256, (20, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.arange(20) % 2
    run(ImageTensors(pixels, labels, ("a", "b")), tmp_path / "codes")
    other = pixels.clone()
    other[13, 0, 0, 0] ^= 1
    assert run(ImageTensors(pixels.clone(), labels, ("a", "b"), name="new"), tmp_path / "codes").num_images == 0
    (tmp_path / "codes" / "index.json").unlink()
    for changed in (
        ImageTensors(other, labels, ("a", "b")),
        ImageTensors(pixels, 1 - labels, ("a", "b")),
        ImageTensors(pixels, labels, ("a", "c")),
    ):
        with pytest.raises(ValueError, match=CHANGED):
            run(changed, tmp_path / "codes")
    with pytest.raises(ValueError, match="num_classes 2, expected 3"):
        run(ImageTensors(pixels, labels, ("a", "b", "c")), tmp_path / "codes")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES, errno.ENOENT])
def test_an_image_that_cannot_be_had_ends_the_run_and_is_no_unreadable_row(
    number: int, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = photos(tmp_path / "photos", num=30, broken=(2,))
    images = load_images(source, size=8)
    opened = Path.open

    def fails(self: Path, *args, **options):
        if self.name == "025.png":
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fails)
        with pytest.raises(ValueError, match=rf"b/025\.png of .* cannot be read: {os.strerror(number)}; .*") as caught:
            run(images, tmp_path / "codes", num_workers=num_workers)
        assert "\n" not in str(caught.value)
        # For training it is an image that is not there today.
        assert [key for key, _ in images.__getitems__(range(30)).skipped] == ["a/002.png", "b/025.png"]
    assert set(contents(tmp_path / "codes")) == {"codes-00000.safetensors", "codes-00001.safetensors"}
    assert run(images, tmp_path / "codes").num_images == 12
    run(images, tmp_path / "undisturbed")
    assert contents(tmp_path / "codes") == contents(tmp_path / "undisturbed")
    assert [key for key, _ in CodeDataset(tmp_path / "codes").unreadable] == ["a/002.png"]


def test_a_source_that_goes_away_while_it_is_read(tmp_path: Path):
    source = photos(tmp_path / "photos", num=30)
    images = load_images(source, size=8)
    gone: list[Path] = []

    def unmount(done: int, total: int) -> None:
        if done >= 9 and not gone:
            gone.append(source.rename(tmp_path / "unmounted"))

    with pytest.raises(ValueError, match=r"\.png of .* cannot be read: No such file or directory; "):
        run(images, tmp_path / "codes", progress=unmount)
    gone[0].rename(source)
    assert run(images, tmp_path / "codes").unreadable == ()


def test_a_link_to_nothing_is_named_before_any_work(tmp_path: Path):
    source = photos(tmp_path / "photos", num=30)
    (source / "train" / "b" / "030.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"b/030\.png of .* cannot be read: No such file.*take it out of the source"):
        run(source, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


def test_a_row_that_names_a_file_which_is_not_there_ends_the_run(tmp_path: Path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"bytes": encoded(0), "path": None}, {"bytes": b"broken", "path": "a"}, {"bytes": None, "path": "gone.png"}]
    parquet.write_table(pyarrow.table({"image": rows[:2]}), tmp_path / "train.parquet")
    parquet.write_table(pyarrow.table({"image": rows}), tmp_path / "test.parquet")
    for split, message in (("train", ""), ("test", r"row 2 \(gone\.png\) of .* cannot be read: No such file")):
        images = load_images(tmp_path, split, size=8)
        if message:
            with pytest.raises(ValueError, match=message):
                run(images, tmp_path / "codes" / split)
        else:
            assert len(run(images, tmp_path / "codes" / split).unreadable) == 1


def test_an_archive_that_shrinks_ends_the_run(tmp_path: Path):
    source = archive(tmp_path / "set", list(range(20)))
    images = load_images(source, size=8)

    def cut(done: int, total: int) -> None:
        with (source / "train.tar").open("r+b") as file:
            file.truncate(600)

    with pytest.raises(ValueError, match=r"train\.tar/\d+\.bmp of .* cannot be read: the archive has become shorter"):
        run(images, tmp_path / "codes", progress=cut)
