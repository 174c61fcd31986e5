"""The commands of archives on what is no plain file, on files that claim too much, and beside another writer."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_worlds import in_empty_folder
from codec_worlds import claiming, images_of, model_of, transformer_of, uniform_of
from image_files import noise, save
from PIL import Image

from safefolder.locks import one_writer
from vqvae.cli import describing, dreaming, naming, packing, unpacking
from vqvae.cli.common import load_codec
from vqvae.codec import Archive, Compression, Mode, dream, storage, write
from vqvae.codec.coder import BadStream
from vqvae.codec.container import MAX_IMAGES
from vqvae.codec.dreaming import most_bytes

SIZE = 8
call = pytest.fixture(in_empty_folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "grey"
    model = model_of()
    model.save_pretrained(folder / "codebook")
    transformer_of(model).save_pretrained(folder / "prior")
    return folder


@pytest.fixture(scope="module")
def codec(run):
    return load_codec(str(run), None)[0]


@pytest.fixture
def place(tmp_path, monkeypatch, codec):
    """A folder to stand in, with an archive, an image, and what is no plain file under any name."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.png", noise(SIZE, SIZE))
    images = images_of(model_of(), 2)
    write("x.vq", codec.header(Mode.LOSSLESS), codec.blocks(images, options=Compression(verify=False)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    os.mkfifo("pipe")
    for name, target in (("loop", "loop"), ("dangling", "nowhere"), ("to-pipe", "pipe")):
        Path(name).symlink_to(target)
    Path("text").write_text("what somebody wrote by hand, and no archive at all")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket")
    yield tmp_path
    listening.close()


@pytest.fixture
def refused(call, monkeypatch):
    """A command that is refused in one line, before a model is loaded; what it says."""

    def refused_command(*args, loads=False):
        with monkeypatch.context() as patch:
            for module in () if loads else (packing, unpacking, dreaming, describing):
                patch.setattr(module, "load_codec", None)
            line = call.refused(*args)
        assert len(line) < 600
        return line

    return refused_command


def contents(folder):
    """Everything in a folder, and what is in its files."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


ODD = {
    "pipe": "a named pipe",
    "to-pipe": "a named pipe",
    "loop": "a link that leads in a circle",
    "dangling": "a link that leads nowhere",
    "socket": "a socket",
    "/dev/null": "a device",
    "n" * 5000: "File name too long",
    "loop/x": "a link that leads in a circle",
}
NO_FILES = ODD | {"folder": "a folder", "text/x": "no file at text/x"}
NO_OUTPUTS = ODD | {"folder": "a folder", "text/x": "is no folder", "y/" * 1900 + "x": "folders on the way are missing"}


def reading(run, name):
    """Commands that read a file."""
    decompress = ("decompress", run, name, "-o", "out")
    return decompress, (*decompress, "--recover"), ("info", name), ("info", name, run), ("dream", run, "--bits", name)


def writing(run, name):
    """Commands that write a file."""
    compress = ("compress", run, "a.png", "-o", name)
    others = (("dream", run, "--output", name), ("info", "x.vq", run, "--csv", name))
    return compress, (*compress, "--force"), (*compress, "--append"), *others


def test_case_20_what_is_no_plain_file_is_refused(place, run, refused):
    before = contents(place)
    for name, kind in NO_FILES.items():
        for args in reading(run, name):
            assert kind in refused(*args)
    for name, kind in NO_OUTPUTS.items():
        for args in writing(run, name):
            assert kind in refused(*args)
        if name != "folder":
            assert kind in refused("decompress", run, "x.vq", "-o", name)
    assert contents(place) == before


def test_case_22_places_without_permission(place, run, refused, monkeypatch):
    access, before = os.access, contents(place)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path).name != "folder" and access(path, mode))
        decompress = ("decompress", run, "x.vq", "-o")
        for args in (
            *writing(run, "folder/x"),
            *writing(run, "folder/new/x"),
            *((*decompress, "folder"), (*decompress, "folder/new")),
        ):
            assert "permission denied in" in refused(*args)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "x.vq" and access(path, mode))
    for args in reading(run, "x.vq"):
        assert "could not read x.vq: permission denied" in refused(*args)
    assert contents(place) == before


def test_case_20_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(place, monkeypatch):
    """Between the look at a file and its opening."""
    monkeypatch.setattr(storage, "check_readable", lambda path: None)
    before = len(os.listdir("/proc/self/fd"))
    for name in ("pipe", "to-pipe"):
        with pytest.raises(ValueError, match="it is no file any more"):
            Archive.open(name)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links_to_files_are_followed(place, run, call, codec):
    Path("link.vq").symlink_to("x.vq")
    call("compress", run, "a.png", "-o", "link.vq", "--append")
    assert Path("link.vq").is_symlink()
    with Archive.open("x.vq") as archive:
        assert archive.num_images == 3
    call("decompress", run, "link.vq", "-o", "out")
    assert len(os.listdir("out")) == 3
    Path("linked").symlink_to("folder")
    call("decompress", run, "link.vq", "-o", "linked")
    assert len(os.listdir("folder")) == 4


# ---- another writer


def test_case_06_a_second_compress_is_refused_before_it_works(place, run, refused):
    before = contents(place)
    for name, options in (("x.vq", ["--append"]), ("x.vq", ["--force"]), ("new.vq", [])):
        with one_writer(name):
            assert f"{name} is being written" in refused("compress", run, "a.png", "-o", name, *options)
    assert contents(place) == before


def test_case_06_a_file_that_comes_in_the_meantime_is_not_replaced(place, run, refused, monkeypatch):
    """Whether a file is there is asked for by the one who may write it."""
    exists = packing.destination

    def late(path):
        Path(path).write_text("another's")
        return exists(path)

    monkeypatch.setattr(packing, "destination", late)
    # What came is added to, or refused as no archive; it is not replaced.
    for name, options, message in (("new.vq", [], "is there already"), ("newer.vq", ["--append"], "no file of this")):
        assert message in refused("compress", run, "a.png", "-o", name, *options)
        assert Path(name).read_text() == "another's"


def test_append_to_what_does_not_fit_changes_nothing(place, run, refused, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    model = model_of(seed=5)
    model.save_pretrained(other / "codebook")
    uniform_of(model).save_pretrained(other / "prior")
    Path("cut.vq").write_bytes(Path("x.vq").read_bytes()[:-5])
    before = contents(place)
    for folder, name, options, message, loads in (
        (run, "text", [], "is no file of this codec", False),
        (run, "cut.vq", [], "is cut short", False),
        (other, "x.vq", [], "write them to a file of their own", True),
        (run, "x.vq", ["--mode", "lossy"], "mode LOSSLESS", True),
    ):
        assert message in refused("compress", folder, "a.png", "-o", name, "--append", *options, loads=loads)
    assert contents(place) == before


# ---- files that claim too much


def test_case_16_commands_stop_where_a_stream_does(place, run, codec, refused, call, monkeypatch):
    decoded, decode_codes = [], codec.coder.decode_codes.__func__

    def counted(self, sources, labels, offsets):
        decoded.append(len(offsets))
        return decode_codes(self, sources, labels, offsets)

    monkeypatch.setattr(type(codec.coder), "decode_codes", counted)
    Path("many.vq").write_bytes(claiming(codec, MAX_IMAGES))
    before = contents(place)
    decompress = ("decompress", run, "many.vq", "-o", "out")
    for args in (decompress, ("info", "many.vq", run), (*decompress, "--recover")):
        decoded.clear()
        if "--recover" in args:
            assert "lost: block 0: the stream has ended" in call(*args, code=1).err
        else:
            assert "the stream has ended before its images have" in refused(*args, loads=True)
        assert sum(decoded) <= 2 * codec.coder.group_size
    assert contents(place) == before


def test_case_16_many_blocks_that_claim_many_images_each(place, run, codec, refused, call, monkeypatch):
    """70 kB claim 65 million images. No names are made for them, and they are not added up one by one."""

    def ends(self, sources, labels, offsets):
        raise BadStream("the stream has ended")

    monkeypatch.setattr(codec.coder.__class__, "decode_codes", ends)
    Path("many.vq").write_bytes(claiming(codec, MAX_IMAGES, num_blocks=1000))
    planned, placed = [], naming.Places.place
    monkeypatch.setattr(naming.Places, "place", lambda self, *args: planned.append(1) or placed(self, *args))
    num = 1000 * MAX_IMAGES
    assert f"{num:,} in 1,000 blocks, {num * SIZE**2:,} pixels" in call("info", "many.vq").out
    assert "ended" in refused("decompress", run, "many.vq", "-o", "out", loads=True)
    assert not planned
    save(Path("full") / "a.png", noise(2, 2))
    monkeypatch.setattr(unpacking, "_MOST_AHEAD", 500)
    assert "ended" in refused("decompress", run, "many.vq", "-o", "full", loads=True)
    Path("some.vq").write_bytes(claiming(codec, MAX_IMAGES, num_blocks=20))
    assert call("decompress", run, "some.vq", "-o", "out", "--recover", code=1).err.count("lost: ") == 20
    assert len(planned) == 500


# ---- numbers without bounds


def test_case_22_numbers_beyond_the_most(place, run, refused, monkeypatch):
    huge = 10**18
    compress = ("compress", run, "a.png", "-o", "y.vq")
    for args, message, loads in (
        ((*compress, "--images-per-block", huge), "expected 1 to 65535", False),
        (("dream", run, "--num", huge), "--num must be at most 16,384", False),
        (("dream", run, "--num-bytes", huge), "--num-bytes must be at most 1,099,511,627,776", False),
        (("decompress", run, "x.vq", "-o", "out", "--images", huge), f"got image {huge}, expected 0 to 1", True),
    ):
        assert message in refused(*args, loads=loads)
    assert not Path("out").exists()
    monkeypatch.setattr(dreaming, "_MOST_USED", 2000)
    said = refused("dream", run, "--num", "9", "--num-bytes", "3000", loads=True)
    assert "may take 3,000 bytes, expected at most 2,000; give a smaller --num" in said


def test_case_22_no_more_bytes_are_made_than_images_can_use(place, run, codec, call, monkeypatch):
    """Of ten thousand million: the picture is that of their end, as if all had been made."""
    made, tail = [], dreaming._random
    monkeypatch.setattr(dreaming, "_random", lambda seed, *ends: made.append(ends) or tail(seed, *ends))
    out = call("dream", run, "--num", "2", "--num-bytes", "10000000000", "--output", "far.png").out
    assert "of 10,000,000,000 bytes" in out
    assert "give the same bytes" in out
    [(start, stop)] = made
    assert stop == 10**10
    assert stop - start <= most_bytes(codec, 2) + 8
    # The same where it can be seen: of so many that all can be made.
    whole = np.random.Generator(np.random.PCG64(3)).bytes(20_011)
    assert dreaming._random(3, 16_000, 20_011) == whole[16_000:]
    call("dream", run, "--num", "2", "--num-bytes", "20011", "--seed", "3", "--output", "near.png")
    assert made[-1][0] > 0
    Path("bits").write_bytes(whole)
    call("dream", run, "--num", "2", "--bits", "bits", "--output", "bits.png")
    expected = dream(codec, whole, 2).images
    for name in ("near.png", "bits.png"):
        picture = torch.from_numpy(np.array(Image.open(name)))[..., 0]
        shown = torch.stack([picture[2 + 4 : 66 : SIZE, 2 + 66 * i + 4 : 66 + 66 * i : SIZE] for i in range(2)])
        assert torch.equal(shown, expected[:, 0])
