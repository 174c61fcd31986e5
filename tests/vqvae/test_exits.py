"""How programs end: one line and a status, whatever happens."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqvae.cli
from vqvae import exits

ROOT = Path(__file__).parents[2]


def raising(error: BaseException):
    def program() -> int:
        raise error

    return program


@pytest.fixture
def ends(monkeypatch, capsys):
    """Run a program under these words; its exit status, and what it said on stderr."""

    def call(program, *words):
        monkeypatch.setattr(sys, "argv", ["vqvae", *words])
        try:
            program()
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return call


class OddError(Exception):
    """What nobody foresaw."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("got 3,\n  expected 4"), "error: got 3, expected 4"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "No space left on device"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OddError("strange\nsecond line"), "error: OddError: strange (not foreseen"),
        (AssertionError(), "AssertionError"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (ValueError("x" * 5000), "xxx..."),
        (ValueError(), "error: ValueError"),
    ],
)
def test_case_22_whatever_is_raised_is_one_line_and_status_2(ends, error, words):
    status, said = ends(lambda: exits.run(raising(error)), "info")
    assert (status, said.count("\n")) == (2, 1)
    assert words in said
    assert len(said) < 1100


def test_the_traceback_is_there_for_who_asks(ends):
    _, said = ends(lambda: exits.run(raising(OddError("strange"))), "info", "--debug", "x")
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: OddError: strange")
    assert sys.argv == ["vqvae", "info", "x"]


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (raising(KeyboardInterrupt()), 130),
        (raising(SystemExit(7)), 7),
        (raising(SystemExit(0)), 0),
        (lambda: None, 0),
        (lambda: 1, 1),
    ],
)
def test_other_ends_keep_their_status(ends, program, status):
    assert ends(lambda: exits.run(program)) == (status, "interrupted\n" if status == 130 else "")


def test_an_empty_word_is_a_variable_that_was_not_set(ends):
    status, said = ends(lambda: exits.run(lambda: None), "compress", "run", "", "-o", "x.vq")
    assert status == 2
    assert "an empty word" in said


MANY_LINES = "from vqvae import exits; exits.run(lambda: [print('line', n) for n in range(100_000)] and None)"


@pytest.mark.parametrize(
    "words",
    [
        ["-c", MANY_LINES],
        ["-u", "-c", MANY_LINES],
        ["-m", "vqvae", "--help"],
        pytest.param(["train.py", "--help"], marks=pytest.mark.slow),
    ],
)
def test_case_22_a_reader_that_has_seen_enough_is_no_error(words):
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert (errors, process.returncode) == (b"", 0)


@pytest.mark.parametrize("closed", [("stdout",), ("stderr",), ("stdout", "stderr")], ids="+".join)
def test_case_22_a_stream_that_was_closed_is_written_to_nobody(monkeypatch, ends, closed):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert ends(lambda: exits.run(lambda: print("said", file=sys.stderr)))[0] == 0
    assert ends(lambda: exits.run(raising(ValueError("wrong"))))[0] == 2
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "name", None) == os.devnull:
            stream.close()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("sample", "x", "--numm", "3"), ("--numm", "perhaps you meant --num;")),
        (("sampel", "x"), ("sampel", "perhaps you meant sample;", "sample, evaluate")),
        (("sample",), ("run's folder", "vqvae sample --help")),
        ((), ("reconstruct", "vqvae --help")),
        (("sample", "x", "--precision", "half"), ("--precision", "float32")),
        (("sample", "run", "--num", "abc"), ("Error parsing --num: ", "abc")),
        (("train", "--prior.width", "abc"), ("Error parsing --prior.width: ",)),
        (("sample", "run", "--temperature", "-1"), ("error: got temperature=-1.0, expected",)),
        (("train", "--prior.width", "5"), ("error: got width=5 with num_heads=4, expected",)),
        # A hint names another option than was given.
        (("evaluate", "run", "--batch-size", "9"), ("--batch-size", "see vqvae")),
    ],
)
def test_case_33_what_is_mistyped_is_one_line_that_names_it(ends, args, words):
    status, said = ends(vqvae.cli.main, *args)
    assert (status, said.count("\n")) == (2, 1)
    for word in words:
        assert word in said
    assert ("perhaps" in said) == any("perhaps" in word for word in words)
