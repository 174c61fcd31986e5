"""`vqvae compress`, `decompress`, `info` and `dream`: files, names nobody vouches for, damage, and exit statuses."""

import csv
import errno
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_worlds import in_empty_folder
from image_files import chw, noise, save
from PIL import Image

from priors import TransformerPrior, UnigramPrior
from vqvae import VQVAE, GaussianVAE
from vqvae.cli import packing
from vqvae.cli.common import load_codec
from vqvae.cli.naming import Places
from vqvae.cli.reading import read_exactly
from vqvae.codec import Archive, Codec, Compression, Mode, write
from vqvae.quantizers import StochasticVectorQuantizer, VectorQuantizer

SIZE = 8
call = pytest.fixture(in_empty_folder)


def save_run(folder: Path, seed: int, quantizer=VectorQuantizer, channels=1) -> Path:
    torch.manual_seed(seed)
    sizes = {"image_size": SIZE, "num_channels": channels, "width": 4, "num_blocks": 1}
    model = VQVAE(**sizes, quantizer=quantizer.Config(num_codes=8, dim=4))
    # Narrow components, one of them at mid-grey, so that `smooth` pictures are worth coding.
    k = model.config.likelihood.num_components * channels
    with torch.no_grad():
        model.decoder.layers[-1].bias.view(-1, model.likelihood.num_features)[:, 5 + k : 5 + 2 * k] -= 2.5
    model.save_pretrained(folder / "codebook")
    prior = TransformerPrior(num_codes=8, grid=model.grid, width=8, depth=1, num_heads=1)
    prior.save_pretrained(folder / "prior")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of grey images, of random weights."""
    return save_run(tmp_path_factory.mktemp("runs") / "grey", 0)


@pytest.fixture(scope="module")
def colour(run):
    return save_run(run.parent / "colour", 1, channels=3)


@pytest.fixture(scope="module")
def stochastic(run):
    return save_run(run.parent / "stochastic", 2, StochasticVectorQuantizer)


@pytest.fixture(scope="module")
def codec(run):
    return load_codec(str(run), None)[0]


def smooth(*shape: int) -> np.ndarray:
    """Something that even an untrained model codes in fewer than 8 bits a pixel."""
    return (np.indices(shape).sum(0) % 3 + 126).astype(np.uint8)


def photos(folder: Path) -> dict[str, np.ndarray]:
    """Grey, colour and odd sizes, some in folders."""
    pictures = {
        "a.png": smooth(SIZE, SIZE),
        "b.png": noise(SIZE, SIZE),
        "in/c.png": smooth(11, 5, 3),
        "in/deep/d.png": noise(3, 17, 3),
        "one.png": smooth(1, 1),
    }
    for name, pixels in pictures.items():
        save(folder / name, pixels)
    return pictures


def tree(folder: Path) -> dict[str, np.ndarray]:
    return {
        path.relative_to(folder).as_posix(): np.array(Image.open(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def levels(folder: Path) -> dict[str, int]:
    """The first pixel of each image."""
    return {name: int(pixels[0, 0]) for name, pixels in tree(folder).items()}


def assert_same(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert mine.keys() == theirs.keys()
    for name, pixels in mine.items():
        assert np.array_equal(pixels, theirs[name]), name


@pytest.mark.parametrize("kind", ["run", "colour"])
def test_a_folder_comes_back_bit_for_bit(call, request, tmp_path, kind):
    model = request.getfixturevalue(kind)
    pictures = photos(tmp_path / "photos")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    save(tmp_path / "photos" / ".hidden" / "x.png", noise(2, 2))
    out, err = call("compress", model, "photos", "-o", "x.vq", "--images-per-block", "2")
    assert f"x.vq: 5 images written, lossless, in {Path('x.vq').stat().st_size:,} bytes" in out
    assert "img/s" in out
    assert err == ""  # no bar where nobody watches
    out, err = call("decompress", model, "x.vq", "--output", "again")
    assert "again: 5 images" in out
    assert err == ""
    assert_same(pictures, tree(tmp_path / "again"))
    with Archive.open("x.vq") as archive:
        assert [block.num_images for block in archive.blocks] == [2, 2, 1]
        fingerprint = archive.header.fingerprint.hex()
    size, dims = Path("x.vq").stat().st_size, sum(pixels.size for pixels in pictures.values())
    out = call("info", "x.vq").out
    for said in (f"5 in 3 blocks, {dims:,} pixels", f"{size:,} bytes, {8 * size / dims:.4f} bits/dim", fingerprint):
        assert said in out
    # The file's bytes say nothing of where it was made.
    assert str(tmp_path).encode() not in Path("x.vq").read_bytes()


def test_single_files_keep_their_own_name_or_none(call, run, tmp_path):
    pictures = photos(tmp_path / "photos")
    files = (tmp_path / "photos" / "in" / "c.png", Path("photos/b.png"))
    for options, names in (((), ("c.png", "b.png")), (("--no-names", "--no-verify"), ("000000.png", "000001.png"))):
        call("compress", run, *files, "-o", "x.vq", "--force", *options)
        call("decompress", run, "x.vq", "-o", names[0])
        expected = dict(zip(names, (pictures["in/c.png"], pictures["b.png"]), strict=True))
        assert_same(expected, tree(tmp_path / names[0]))


def test_what_the_machine_cannot_verify_is_stored_and_said(call, run, tmp_path, monkeypatch):
    pictures = photos(tmp_path / "photos")
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "_comes_back", lambda *_: False)
        _, err = call("compress", run, "photos", "-o", "x.vq", "--images-per-block", "3")
    # The other block is noise, which is stored in any case.
    assert [line.startswith("note: a block did not come back") for line in err.splitlines()] == [True]
    call("decompress", run, "x.vq", "-o", "y")
    assert_same(pictures, tree(tmp_path / "y"))
    assert "images the file stores other tiles" in call("info", "x.vq", run).out


def test_a_folder_that_cannot_be_read_is_named(call, run, tmp_path, monkeypatch):
    photos(tmp_path / "photos")

    def refusing(plain):
        def read(path="."):
            if not isinstance(path, int) and Path(path).name == "in":
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return plain(path)

        return read

    with monkeypatch.context() as patch:
        for name in ("scandir", "listdir"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        out, err = call("compress", run, "photos", "-o", "x.vq", code=1)
    assert "3 images written" in out
    assert err == "skipped photos/in: Permission denied\n"


def test_a_named_set_or_a_folder_at_the_models_size(call, run, tmp_path):
    for i in range(4):
        save(tmp_path / "set" / ("test" if i else "train") / f"{i}.png", noise(20, 30, 3))
    (tmp_path / "set" / "test" / "0.png").write_bytes(b"\x89PNG")
    out, err = call("compress", run, "--data", "set", "--num", "2", "-o", "x.vq", code=1)
    assert "2 images written" in out
    assert "skipped 0.png" in err
    call("decompress", run, "x.vq", "-o", "y")
    shapes = {name: pixels.shape for name, pixels in tree(tmp_path / "y").items()}
    assert shapes == dict.fromkeys(("000000.png", "000001.png"), (SIZE, SIZE))
    assert "1 images written" in call("compress", run, "--data", "set", "--split", "train", "-o", "z.vq").out


def test_what_cannot_be_read_is_named_and_the_rest_written(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_TILES", 9)
    pictures = photos(tmp_path / "photos")
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "photos" / "in" / "empty.jpg").write_bytes(b"")
    save(tmp_path / "photos" / "clear.png", noise(4, 4, 4))
    save(tmp_path / "photos" / "large.png", noise(40, 40))
    (tmp_path / "none").mkdir()
    out, err = call("compress", run, "photos", "nowhere.png", "none", "-o", "x.vq", code=1)
    assert "5 images written" in out
    reasons = {
        "photos/broken.png": "",
        "photos/in/empty.jpg": "the file is empty",
        "photos/clear.png": "transparent",
        "photos/large.png": "too many for this model's tiles",
        "nowhere.png": "No such file",
        "none": "holds no images",
    }
    lines = dict(line.removeprefix("skipped ").split(": ", 1) for line in err.splitlines())
    assert lines.keys() == reasons.keys()
    assert all(reason in lines[name] for name, reason in reasons.items())
    call("decompress", run, "x.vq", "-o", "y")
    assert_same(pictures, tree(tmp_path / "y"))
    assert "nothing was written" in call.refused("compress", run, "photos/broken.png", "-o", "y.vq")
    assert not (tmp_path / "y.vq").exists()


def test_append(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_BYTES", 100)  # large images make blocks of fewer
    pictures = photos(tmp_path / "photos")
    call("compress", run, "photos/a.png", "-o", "x.vq", "--append")
    assert "2 images added" in call("compress", run, "photos/in", "-o", "x.vq", "--append").out
    with Archive.open("x.vq") as archive:
        assert [block.num_images for block in archive.blocks] == [1, 1, 1]
    call("decompress", run, "x.vq", "-o", "y")
    expected = {"a.png": "a.png", "c.png": "in/c.png", "deep/d.png": "in/deep/d.png"}
    assert_same({name: pictures[of] for name, of in expected.items()}, tree(tmp_path / "y"))


def test_an_output_that_exists_is_not_replaced_unless_asked(call, run, tmp_path):
    photos(tmp_path / "photos")
    (tmp_path / "x.vq").write_text("mine")
    assert "x.vq is there already" in call.refused("compress", run, "photos", "-o", "x.vq")
    assert (tmp_path / "x.vq").read_text() == "mine"
    call("compress", run, "photos", "-o", "x.vq", "--force")
    save(tmp_path / "y" / "b.png", smooth(2, 2))
    assert "b.png is there already" in call.refused("decompress", run, "x.vq", "-o", "y")
    assert list(tree(tmp_path / "y")) == ["b.png"]
    call("decompress", run, "x.vq", "-o", "y", "--force")
    assert tree(tmp_path / "y")["b.png"].shape == (SIZE, SIZE)


def test_ctrl_c_and_a_full_disk_leave_the_old_file(call, run, tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    call("compress", run, "photos", "-o", "x.vq")
    before = (tmp_path / "x.vq").read_bytes()
    blocks = Codec.blocks

    def interrupted(self, *args, **options):
        yield from blocks(self, *args, **options)
        raise KeyboardInterrupt

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    writing = [("compress", run, "photos", "-o", "x.vq", option) for option in ("--force", "--append")]
    with monkeypatch.context() as patch:
        patch.setattr(Codec, "blocks", interrupted)
        for args in writing:
            assert call(*args, code=130).err.strip() == "interrupted"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for args in (
            *writing,
            ("decompress", run, "x.vq", "-o", "y"),
            ("dream", run, "--num", "1"),
            ("info", "x.vq", run, "--csv", "x.csv"),
        ):
            assert "no space is left on the disk" in call.refused(*args)
    assert (tmp_path / "x.vq").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["photos", "x.vq", "y"]
    assert os.listdir(tmp_path / "y") == []


HOSTILE = [
    *("/etc/passwd", "../../out.png", "C:\\Windows\\x.png", "a/../../b.jpg", "", ".", "..", "/", "a.jpg", "a.png"),
    *("A.PNG", "a-1.png", "new\nline\x1b[2J.png", "x" * 3000 + ".png", "é" * 150 + ".gif", "d/" * 1500 + "e"),
    *("f.png/g", "f.png", "v1.2", " ", "...", "trailing. ", "nul|<>", "same", "same", "same", ".hidden", "q/r.png"),
    "q",
]


def test_names_from_a_file_never_lead_out_of_the_folder(call, run, codec, tmp_path):
    images = [torch.full((1, 2, 2), i, dtype=torch.uint8) for i in range(len(HOSTILE))]
    write(Path("x.vq"), codec.header(Mode.LOSSLESS), codec.blocks(images, names=HOSTILE))
    call("decompress", run, "x.vq", "-o", "deep/out")
    written = levels(tmp_path / "deep" / "out")
    assert sorted(os.listdir(tmp_path)) == ["deep", "x.vq"]
    assert os.listdir(tmp_path / "deep") == ["out"]
    # Each is there once, and nothing else is.
    assert sorted(written.values()) == list(range(len(HOSTILE)))
    where = {level: name for name, level in written.items()}
    assert [where[i] for i, name in enumerate(HOSTILE) if name == "same"] == ["same.png", "same-1.png", "same-2.png"]
    named = {name: where[i] for i, name in enumerate(HOSTILE)}
    for name, expected in {
        "/etc/passwd": "etc/passwd.png",
        "../../out.png": "out.png",
        "C:\\Windows\\x.png": "Windows/x.png",
        "a/../../b.jpg": "a/b.png",
        "": "000004.png",
        "a.jpg": "a.png",
        "a.png": "a-1.png",
        "A.PNG": "A-2.png",
        "a-1.png": "a-1-1.png",
        "v1.2": "v1.2.png",
    }.items():
        assert named[name] == expected
    for name in written:
        assert name.isprintable()
        assert len({*name} & {*'\\<>:"|?*'}) == 0
        assert all(len(part.encode()) <= 210 for part in name.split("/"))


def test_many_equal_names_are_no_trap():
    places = Places()
    assert len({str(places.place("x" * 500, i)) for i in range(1000)}) == 1000


def test_nothing_is_written_through_a_link(call, run, codec, tmp_path):
    image = [torch.zeros(1, 2, 2, dtype=torch.uint8)]
    write(Path("x.vq"), codec.header(Mode.LOSSLESS), codec.blocks(image, names=["sub/a.png"]))
    decompress = ("decompress", run, "x.vq", "-o", "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    place = tmp_path / "out" / "sub" / "a.png"
    place.parent.symlink_to(tmp_path / "elsewhere")
    for option in ((), ("--force",)):
        assert "is no folder of its own" in call.refused(*decompress, *option)
    assert os.listdir(tmp_path / "elsewhere") == []
    place.parent.unlink()
    place.parent.mkdir()
    # A link at the place itself is replaced if anything is, and what it leads to stays.
    (tmp_path / "mine").write_text("mine")
    place.symlink_to(tmp_path / "mine")
    assert "is there already" in call.refused(*decompress)
    call(*decompress, "--force")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not place.is_symlink()
    # Nor is a folder removed to make place.
    place.unlink()
    (place / "kept").mkdir(parents=True)
    assert "is a folder" in call.refused(*decompress, "--force")
    assert (place / "kept").is_dir()
    assert "is no folder" in call.refused("decompress", run, "x.vq", "-o", "mine")


@pytest.fixture
def blocks_of_two(codec, tmp_path):
    """The bytes of a file, x.vq, of four blocks of two images, each image of one level."""
    images = [torch.full((1, SIZE, SIZE), i, dtype=torch.uint8) for i in range(8)]
    path = tmp_path / "x.vq"
    write(path, codec.header(Mode.LOSSLESS), codec.blocks(images, options=Compression(images_per_block=2)))
    return path.read_bytes()


@pytest.mark.usefixtures("blocks_of_two")
def test_images_by_number_read_their_blocks_alone(call, run, tmp_path, monkeypatch):
    read = []
    content = Archive.content
    monkeypatch.setattr(Archive, "content", lambda self, i: read.append(i) or content(self, i))
    assert "2 images" in call("decompress", run, "x.vq", "-o", "y", "--images", "7", "2", "2").out
    assert levels(tmp_path / "y") == {"000002.png": 2, "000007.png": 7}
    assert set(read) == {1, 3}
    for wrong in ("8", "-1"):
        said = call.refused("decompress", run, "x.vq", "-o", "z", f"--images={wrong}")
        assert f"got image {wrong}, expected 0 to 7" in said
    assert not (tmp_path / "z").exists()


def test_a_damaged_file_and_what_is_left_of_it(call, run, tmp_path, blocks_of_two):
    with Archive.open("x.vq") as archive:
        offset = archive.blocks[1].offset
    data = bytearray(blocks_of_two)
    data[offset + 3] ^= 1
    Path("y.vq").write_bytes(data)
    line = call.refused("decompress", run, "y.vq", "-o", "y")
    assert "block 1" in line
    assert "`vqvae decompress --recover` gets what is whole" in line
    assert not (tmp_path / "y").exists()
    out, err = call("decompress", run, "y.vq", "-o", "y", "--recover", code=1)
    assert "6 images" in out
    assert err.startswith("lost: y.vq: block 1")
    # The images are those of their numbers.
    assert levels(tmp_path / "y") == {f"{i:06}.png": i for i in (0, 1, 4, 5, 6, 7)}
    # Cut short, and with its header gone: what is whole comes back all the same.
    for name, rest, left in (
        ("cut", data[:-60], [0, 1, 4, 5]),
        ("headless", b"xxxx" + data[4:], [0, 1, 4, 5, 6, 7]),
    ):
        Path(f"{name}.vq").write_bytes(rest)
        call("decompress", run, f"{name}.vq", "-o", name, "--recover", code=1)
        assert list(levels(tmp_path / name).values()) == left
    assert call("decompress", run, "x.vq", "-o", "whole", "--recover").err == ""
    assert len(tree(tmp_path / "whole")) == 8


@pytest.mark.parametrize("mode", ["lossless", "lossy", "bits-back"])
def test_modes_come_back_and_info_adds_up(call, stochastic, tmp_path, mode):
    pictures = photos(tmp_path / "photos")
    if mode == "bits-back":  # enough to be worth the bits that it begins with
        more = {f"s{i}.png": smooth(SIZE, SIZE) for i in range(12)}
        pictures |= more
        for name, pixels in more.items():
            save(tmp_path / "photos" / name, pixels)
    in_block = "100" if mode == "bits-back" else "3"
    call("compress", stochastic, "photos", "-o", "x.vq", "--mode", mode, "--images-per-block", in_block)
    call("decompress", stochastic, "x.vq", "-o", "x")
    # Also where the header is lost.
    Path("y.vq").write_bytes(b"xxxx" + Path("x.vq").read_bytes()[4:])
    call("decompress", stochastic, "y.vq", "-o", "y", "--recover", code=1)
    assert_same(tree(tmp_path / "x"), tree(tmp_path / "y"))
    out, err = call("info", "x.vq", stochastic, "--csv", "x.csv")
    assert err == ""
    numbers = {name: int(each.replace(",", "")) for name, each in re.findall(r"^ *([a-z ]+?)  +([\d,]+)", out, re.M)}
    assert numbers["container"] + numbers["contents"] == numbers["size"] == Path("x.vq").stat().st_size
    assert sum(numbers[name] for name in ("streams", "stored", "names", "the rest")) == numbers["contents"]
    assert numbers["weights"] > 1000
    rows = list(csv.DictReader(io.StringIO(Path("x.csv").read_text())))
    assert [row["image"] for row in rows] == sorted(pictures)
    assert all(row["image"] in out for row in rows)
    total = sum(float(row["total"]) for row in rows)
    for row in rows:
        assert float(row["total"]) == pytest.approx(float(row["rate"]) + float(row["distortion"]), abs=1e-6)
    paid = 8 * (numbers["streams"] + numbers["stored"])
    if mode == "bits-back":
        assert numbers["initial bits"] > 0
        assert "most probable codes" in out
    else:
        # The figures are those of the file, to the ends of its two streams.
        assert total <= paid + 1 < total + 2 * 33
    if mode == "lossy":
        assert {float(row["distortion"]) for row in rows} == {0.0}
        back = tree(tmp_path / "x")
        assert {name: pixels.shape for name, pixels in back.items()} == {n: p.shape for n, p in pictures.items()}
        assert not np.array_equal(back["b.png"], pictures["b.png"])
    else:
        assert_same(pictures, tree(tmp_path / "x"))
        [png] = [float(row["PNG bits/dim"]) for row in rows if row["image"] == "b.png"]
        buffer = io.BytesIO()
        Image.fromarray(pictures["b.png"]).save(buffer, format="png", optimize=True)
        assert png == pytest.approx(8 * buffer.tell() / SIZE**2)


def test_info_shows_the_first_and_writes_all(call, run, codec):
    """And keeps a hostile name off the terminal."""
    images = [torch.zeros(1, 2, 2, dtype=torch.uint8)] * 25
    names = ["\x1b[2J\nall 9", *(f"{i:06}" for i in range(1, 25))]
    write(Path("x.vq"), codec.header(Mode.LOSSLESS), codec.blocks(images, names=names))
    out = call("info", "x.vq", run, "--csv", "x.csv").out
    for said in ("?[2J?all 9", "000019", "and 5 more", "all 25"):
        assert said in out
    for hidden in ("\x1b", "000020"):
        assert hidden not in out
    assert len(list(csv.reader(io.StringIO(Path("x.csv").read_text())))) == 26


def test_dream(call, run, monkeypatch):
    few = ("dream", run, "--num", "2")
    out = call(*few).out
    for said in ("2 images out of", "of 4,096 bytes", "give the same bytes"):
        assert said in out
    first = Path("dream.png").read_bytes()
    call(*few, "--seed", "4", "--output", "other.png")
    assert Path("other.png").read_bytes() != first
    call(*few, "--seed", "0", "--num-bytes", "4096", "--output", "again.png")
    assert Path("again.png").read_bytes() == first
    monkeypatch.setattr("vqvae.codec.dreaming.undream", lambda codec, dreamt: b"other")
    out, err = call(*few, code=1)
    assert "other bytes" in out
    assert "did not come back" in err


def test_too_few_bits_for_a_dream(call, run):
    Path("empty").write_bytes(b"")
    said = call.refused("dream", run, "--bits", "empty")
    assert "0 bytes are too few for an image" in said
    enough = int(re.search(r"give at least (\d+)", said)[1])
    assert "too few" in call.refused("dream", run, "--num-bytes", enough // 2)
    assert not Path("dream.png").exists()
    assert "1 images" in call("dream", run, "--num-bytes", enough, "--num", "1").out


def test_mistakes_are_one_line(call, run, colour, tmp_path, monkeypatch):
    photos(tmp_path / "photos")
    GaussianVAE(image_size=SIZE, width=4, num_blocks=1, dim=3).save_pretrained(tmp_path / "gaussian")
    UnigramPrior(num_codes=9, grid=(2, 2)).save_pretrained(tmp_path / "nine")
    call("compress", colour, "photos", "-o", "x.vq")
    Path("text").write_text("what somebody wrote by hand, not an archive at all")
    before = sorted(os.listdir(tmp_path))
    compress = ("compress", run, "-o", "y.vq")
    for args, message in (
        (compress, "one of the two"),
        ((*compress, "photos", "--num", "3"), "belong to --data"),
        ((*compress, "--data", "photos", "--num", "0"), "--num must be at least 1"),
        ((*compress, "--data", "nothing-known"), "nothing-known"),
        ((*compress, "photos", "--images-per-block", "0"), "images_per_block=0"),
        ((*compress, "photos", "--append", "--force"), "give one of them"),
        (("compress", run, "photos", "-o", "photos", "--force"), "no plain file"),
        (("compress", run / "codebook", "photos", "-o", "y.vq"), "has no prior"),
        ((*compress, "photos", "--prior", "nine"), "num_codes=9"),
        ((*compress, "photos", "--mode", "bits-back"), "posterior"),
        (("compress", "gaussian", "photos", "--prior", run / "prior", "-o", "y.vq"), "a model with codes"),
        (("decompress", run, "text", "-o", "y"), "is no file of this codec"),
        (("decompress", run, "x.vq", "-o", "y", "--recover"), "was written with the model and prior"),
        (("decompress", colour, "x.vq", "-o", "y", "--images", "0", "--recover"), "give one of them"),
        (("info", "x.vq", "--csv", "x.csv"), "need the model"),
        (("dream", run, "--bits", "text", "--seed", "1"), "one or the other"),
        (("dream", run, "--seed", "-1"), "--seed must be at least 0"),
        (("dream", run, "--num-bytes", "0"), "--num-bytes must be at least 1"),
        (("dream", run, "--num", "0"), "--num must be at least 1"),
    ):
        assert message in call.refused(*args)
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert "pip install 'vqvae-priors[codec]'" in call.refused(*compress, "photos")
    assert sorted(os.listdir(tmp_path)) == before


# ------------------------------------------------------------------------------------------------------------- reading


def palette(colours: np.ndarray) -> Image.Image:
    """A picture of the first sixteen."""
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), mode="L").convert("P")
    image.putpalette(colours.astype(np.uint8).tobytes())
    return image


def test_pictures_are_read_as_they_lie(tmp_path):
    """Palettes, bilevel, opaque and turned pictures, and formats that could have more bits."""
    imagecodecs = pytest.importorskip("imagecodecs")
    colours, greys, bits, pixels = noise(256, 3), noise(256, 1), noise(5, 9) > 127, noise(12, 16, 3)
    opaque, first, exif = noise(4, 4, 4), np.arange(16).reshape(4, 4), Image.Exif()
    opaque[..., 3] = 255
    exif[0x0112] = 6
    for name, image, expected, options in (
        ("p.png", palette(colours), colours[first], {}),
        ("grey.gif", palette(np.repeat(greys, 3, 1)), greys[first], {}),
        ("bits.png", Image.fromarray(bits), bits.astype(np.uint8) * 255, {}),
        ("opaque.png", Image.fromarray(opaque), opaque[..., :3], {}),
        ("la.png", Image.fromarray(opaque[..., ::3].copy()), opaque[..., 0], {}),
        ("turned.png", Image.fromarray(pixels), pixels, {"exif": exif}),
        ("x.tif", Image.fromarray(pixels), pixels, {}),
        ("x.webp", Image.fromarray(pixels), pixels, {"lossless": True}),
    ):
        image.save(tmp_path / name, **options)
        assert torch.equal(read_exactly(tmp_path / name), chw(expected)), name
    (tmp_path / "x.jp2").write_bytes(imagecodecs.jpeg2k_encode(pixels, level=0))
    assert torch.equal(read_exactly(tmp_path / "x.jp2"), chw(pixels))
    (tmp_path / "x.avif").write_bytes(imagecodecs.avif_encode(pixels))
    assert read_exactly(tmp_path / "x.avif").shape == (3, 12, 16)
    with Image.open(save(tmp_path / "x.jpg", pixels)) as image:
        assert torch.equal(read_exactly(tmp_path / "x.jpg"), chw(np.array(image)))


def test_what_8_bits_cannot_hold_is_refused(tmp_path):
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = np.random.default_rng(0).integers(0, 1 << 16, (12, 16, 3), np.uint16)
    for name, data in (
        ("rgb.ppm", b"P6 2 2 65535\n" + bytes(24)),
        ("plain.ppm", b"P3 2 1 1000\n 1 2 3 4 5 6\n"),
        ("grey.pgm", b"P5 2 2 65535\n" + bytes(8)),
        ("rgb.png", imagecodecs.png_encode(deep)),
        ("grey.png", imagecodecs.png_encode(deep[..., 0].copy())),
        ("rgb.jp2", imagecodecs.jpeg2k_encode(deep)),
        ("rgb.avif", imagecodecs.avif_encode(deep >> 6, bitspersample=10)),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="expected 8-bit grey or RGB"):
            read_exactly(tmp_path / name)
    Image.new("CMYK", (3, 3)).save(tmp_path / "cmyk.jpg")
    first, second = (Image.fromarray(noise(4, 4)) for _ in range(2))
    first.save(tmp_path / "two.gif", save_all=True, append_images=[second])
    for name, message in (("cmyk.jpg", "mode CMYK"), ("two.gif", "it has 2 pictures")):
        with pytest.raises(ValueError, match=message):
            read_exactly(tmp_path / name)
