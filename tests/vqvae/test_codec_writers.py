"""One writer of a file at a time: what a writer that ended well wrote is there, whoever else wrote at the same time."""

import multiprocessing
import os
import signal

import pytest

from vqvae.codec.archive import Archive, append, destination, write
from vqvae.codec.container import Header, Mode, pack, varint

HEADER = Header(mode=Mode.LOSSY, fingerprint=b"12345678")
BUSY = "is being written by another process"


def block(name, size=20):
    return 1, varint(1) + name.encode().ljust(size, b".")


def blocks_of(path):
    with Archive.open(path) as archive:
        return [(each.num_images, archive.content(i)) for i, each in enumerate(archive.blocks)]


def never():
    raise AssertionError
    yield


@pytest.mark.parametrize("act", [write, append])
def test_a_second_writer_is_refused_and_a_reader_sees_a_whole_file(tmp_path, act):
    path = tmp_path / "x.vq"
    write(path, HEADER, [block("old")])
    (tmp_path / "link.vq").symlink_to("x.vq")

    def blocks():
        yield block("first")
        for name in ("x.vq", "link.vq"):
            with pytest.raises(ValueError, match=f"{name} {BUSY}"):
                act(tmp_path / name, HEADER, never())
        assert blocks_of(path) == [block("old")]
        yield block("second")

    with Archive.open(path) as before:
        append(path, HEADER, blocks())
        assert before.content(0) == block("old")[1]
    assert blocks_of(path) == [block("old"), block("first"), block("second")]
    act(path, HEADER, [block("other")])
    assert blocks_of(path)[-1] == block("other")
    assert sorted(os.listdir(tmp_path)) == ["link.vq", "x.vq"]


def test_what_is_there_stays_while_a_destination_is_held(tmp_path):
    path = tmp_path / "new" / "x.vq"
    with destination(path) as place:
        assert not place.exists()
        with pytest.raises(ValueError, match=BUSY), destination(path):
            pass
        place.write(HEADER, [block("a")])
        place.append(HEADER, [block("b")])
        assert place.exists()
        with place.open() as archive:
            assert archive.num_images == 2
    assert os.listdir(tmp_path / "new") == ["x.vq"]
    with pytest.raises(KeyboardInterrupt), destination(tmp_path / "other" / "y.vq"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["new"]


def test_what_cannot_be_appended_to_is_refused_before_any_block(tmp_path):
    path = tmp_path / "x.vq"
    with pytest.raises(ValueError, match="no file at"):
        append(path, HEADER, never())
    other = pack(Header(mode=Mode.LOSSLESS, fingerprint=HEADER.fingerprint), [block("old")])
    for data, message in ((other, "LOSSLESS .* LOSSY .* file of their own"), (other[:-1], "cut short")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            append(path, HEADER, never())
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["x.vq"]


def hang(path, pipe):
    def blocks():
        yield block("half", 100_000)
        pipe.send("writing")
        signal.pause()

    append(path, HEADER, blocks())


def test_a_writer_that_is_killed_leaves_the_old_file_and_no_lock(tmp_path):
    path = tmp_path / "x.vq"
    write(path, HEADER, [block("old")])
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hang, args=(path, theirs))
    process.start()
    assert mine.recv() == "writing"
    with pytest.raises(ValueError, match=BUSY):
        append(path, HEADER, [block("too soon")])
    process.kill()
    process.join()
    assert blocks_of(path) == [block("old")]
    append(path, HEADER, [block("new")])
    assert blocks_of(path) == [block("old"), block("new")]
    assert os.listdir(tmp_path) == ["x.vq"]  # what it left is gone with the next writer
