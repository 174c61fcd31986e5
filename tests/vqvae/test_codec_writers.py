"""One writer of a file at a time: what a writer that ended well wrote is there, whoever else wrote at the same time."""

import multiprocessing
import os
import random
import signal
import threading
from collections import Counter

import pytest

from vqvae.codec import container
from vqvae.codec.container import Archive, DamagedFile, Header, Mode, append, destination, pack, varint, write
from vqvae.codec.recovery import recover

HEADER = Header(mode=Mode.LOSSY, fingerprint=b"12345678")
BUSY = "is being written by another process"


def block(name, size=20):
    content = varint(1) + name.encode().ljust(size, b".")
    return 1, content


def blocks_of(path):
    with Archive.open(path) as archive:
        return [(each.num_images, archive.content(i)) for i, each in enumerate(archive.blocks)]


def at_work(path, act, *, started, going_on, ended):
    """Write while `going_on` is not set; whether it ended well goes to `ended`."""

    def blocks():
        yield block("first")
        started.set()
        going_on.wait()
        yield block("second")

    act(path, HEADER, blocks())
    ended.append(True)


@pytest.fixture
def writer(tmp_path):
    """A thread that has begun to append to x.vq, which holds a block, and ends when it is told so."""
    path = tmp_path / "x.vq"
    write(path, HEADER, [block("old")])
    started, going_on, ended = threading.Event(), threading.Event(), []
    options = {"started": started, "going_on": going_on, "ended": ended}
    thread = threading.Thread(target=at_work, args=(path, append), kwargs=options)
    thread.start()
    started.wait()

    def finish():
        going_on.set()
        thread.join()
        assert ended == [True]

    yield path, finish
    going_on.set()
    thread.join()


@pytest.mark.parametrize("act", [write, append])
def test_case_06_a_second_writer_is_refused_before_it_works(writer, tmp_path, act):
    path, finish = writer
    asked = []

    def blocks():
        asked.append(1)
        yield block("other")

    (tmp_path / "link.vq").symlink_to("x.vq")
    for name in ("x.vq", "link.vq"):
        with pytest.raises(ValueError, match=f"{name} {BUSY}"):
            act(tmp_path / name, HEADER, blocks())
    assert not asked
    finish()
    assert blocks_of(path) == [block("old"), block("first"), block("second")]
    act(path, HEADER, blocks())
    assert blocks_of(path)[-1] == block("other")
    assert sorted(os.listdir(tmp_path)) == ["link.vq", "x.vq"]


def test_case_06_a_reader_meanwhile_sees_a_whole_file(writer):
    path, finish = writer
    with Archive.open(path) as before:
        assert blocks_of(path) == [block("old")]
        finish()
        assert before.content(0) == block("old")[1]
    assert len(blocks_of(path)) == 3


def test_case_06_what_is_there_stays_while_a_destination_is_held(tmp_path):
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
    with pytest.raises(ValueError, match="no file at"):
        append(tmp_path / "y.vq", HEADER, [])
    (tmp_path / "y.vq").write_text("what somebody wrote by hand, and no archive")
    with pytest.raises(DamagedFile):
        append(tmp_path / "y.vq", HEADER, [])
    assert sorted(os.listdir(tmp_path)) == ["new", "y.vq"]


def serve(path, orders):
    """A process that appends whatever it is told to, and answers whether it could."""
    for name, size, num in iter(orders.recv, None):
        try:
            append(path, HEADER, [block(f"{name}-{i}", size) for i in range(num)])
        except ValueError as error:
            orders.send(str(error))
        else:
            orders.send(None)


def start(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


@pytest.mark.slow
def test_case_06_what_ended_well_is_in_the_file(tmp_path):
    """Two processes append at random moments, both at once as often as not."""
    path, chance = tmp_path / "x.vq", random.Random(0)
    write(path, HEADER, [])
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    processes = [start(serve, path, theirs) for _, theirs in pipes]
    expected, refused = Counter(), 0
    for turn in range(100):
        orders = [(f"{turn}-{i}", chance.choice((30, 30, 100_000)), chance.randint(1, 4)) for i in range(2)]
        first = chance.randrange(2)
        for i in (first, 1 - first):
            pipes[i][0].send(orders[i])
        answers = [mine.recv() for mine, _ in pipes]
        refused += sum(answer is not None for answer in answers)
        assert all(BUSY in answer for answer in answers if answer is not None)
        assert None in answers
        for (name, size, num), answer in zip(orders, answers, strict=True):
            if answer is None:
                expected.update(block(f"{name}-{i}", size) for i in range(num))
    for mine, _ in pipes:
        mine.send(None)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert Counter(blocks_of(path)) == expected
    found = recover(path)
    assert found.damage == []
    assert path.read_bytes() == pack(HEADER, found.blocks)
    assert refused
    assert os.listdir(tmp_path) == ["x.vq"]


def hang(path, pipe):
    def blocks():
        yield block("half", 100_000)
        pipe.send("writing")
        signal.pause()

    append(path, HEADER, blocks())


def test_case_06_a_writer_that_is_killed_leaves_the_old_file_and_no_lock(tmp_path):
    path = tmp_path / "x.vq"
    write(path, HEADER, [block("old")])
    mine, theirs = multiprocessing.Pipe()
    process = start(hang, path, theirs)
    assert mine.recv() == "writing"
    with pytest.raises(ValueError, match=BUSY):
        append(path, HEADER, [block("too soon")])
    process.kill()
    process.join()
    assert blocks_of(path) == [block("old")]
    append(path, HEADER, [block("new")])
    assert blocks_of(path) == [block("old"), block("new")]
    # What it left is gone with the next writer.
    assert os.listdir(tmp_path) == ["x.vq"]


def test_case_06_another_header_is_refused_before_any_block(tmp_path):
    write(tmp_path / "x.vq", HEADER, [block("old")])

    def blocks():
        raise AssertionError
        yield

    other = Header(mode=Mode.LOSSLESS, fingerprint=b"12345678")
    with pytest.raises(ValueError, match="write them to a file of their own"):
        container.append(tmp_path / "x.vq", other, blocks())
