"""How programs end: one line and a status, whatever happens."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from vqvae import exits


def raising(error: BaseException):
    def program() -> int:
        raise error

    return program


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
        (
            OddError("strange\nsecond line"),
            "error: OddError: strange (not foreseen, and so a fault of this program: add --debug",
        ),
        (KeyError("name"), "error: KeyError: 'name' (not foreseen"),
        (AssertionError(), "AssertionError"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
        (ValueError("x" * 5000), "xxx..."),
        (ValueError(), "error: ValueError"),
    ],
)
def test_case_22_whatever_is_raised_is_one_line_and_status_2(monkeypatch, capsys, error, words):
    monkeypatch.setattr(sys, "argv", ["vqvae", "info"])
    with pytest.raises(SystemExit) as stopped:
        exits.run(raising(error))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert len(said) < 1100


def test_the_traceback_is_there_for_who_asks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vqvae", "info", "--debug", "x"])
    with pytest.raises(SystemExit):
        exits.run(raising(OddError("strange")))
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("error: OddError: strange")
    assert sys.argv == ["vqvae", "info", "x"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (SystemExit(7), 7), (SystemExit(0), 0)])
def test_other_ends_keep_their_status(monkeypatch, capsys, error, status):
    monkeypatch.setattr(sys, "argv", ["vqvae"])
    with pytest.raises(SystemExit) as stopped:
        exits.run(raising(error))
    assert stopped.value.code == status
    assert capsys.readouterr().err == ("interrupted\n" if status == 130 else "")


def test_a_program_that_is_done_just_returns(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vqvae"])
    exits.run(lambda: None)
    exits.run(lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        exits.run(lambda: 1)
    assert stopped.value.code == 1


MANY_LINES = "from vqvae import exits; exits.run(lambda: [print('line', n) for n in range(100_000)] and None)"


@pytest.mark.parametrize("unbuffered", [False, True])
def test_case_22_a_reader_that_has_seen_enough_is_no_error(unbuffered):
    words = [sys.executable, *(["-u"] if unbuffered else []), "-c", MANY_LINES]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(100)
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("sample", "x", "--numm", "3"), ("--numm", "perhaps you meant --num;")),
        (("sampel", "x"), ("sampel", "sample, evaluate")),
        (("sample",), ("run's folder", "vqvae sample --help")),
        (("sample", "x", "--num", "three"), ("--num", "three")),
        (("sample", "x", "--precision", "half"), ("--precision", "float32")),
        ((), ("reconstruct", "vqvae --help")),
    ],
)
def test_case_33_a_mistyped_option_is_one_line_that_names_the_nearest(monkeypatch, capsys, args, words):
    import vqvae.cli

    monkeypatch.setattr(sys, "argv", ["vqvae", *args])
    with pytest.raises(SystemExit) as stopped:
        vqvae.cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for word in words:
        assert word in said


@pytest.mark.slow
@pytest.mark.parametrize("args", [["-m", "vqvae", "--help"], ["train.py", "--help"]])
def test_case_22_help_into_a_pipe_that_is_closed(args):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    process = subprocess.Popen([sys.executable, *args], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    _, errors = process.communicate(timeout=120)
    assert errors == b""
    assert process.returncode == 0


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
def test_case_22_a_stream_that_was_closed_is_written_to_nobody(monkeypatch, closed):
    for name in ("stdout", "stderr"):
        if closed in (name, "both"):
            monkeypatch.setattr(sys, name, None)
    monkeypatch.setattr(sys, "argv", ["vqvae"])
    exits.run(lambda: print("said", file=sys.stderr))
    with pytest.raises(SystemExit) as stopped:
        exits.run(raising(ValueError("wrong")))
    assert stopped.value.code == 2
    for stream in (sys.stdout, sys.stderr):
        if stream.name == os.devnull:
            stream.close()


def test_an_empty_word_is_a_variable_that_was_not_set(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vqvae", "compress", "run", "", "-o", "x.vq"])
    with pytest.raises(SystemExit) as stopped:
        exits.run(lambda: None)
    assert stopped.value.code == 2
    assert "an empty word" in capsys.readouterr().err


def test_case_33_a_hint_names_another_option_than_was_given(monkeypatch, capsys):
    import vqvae.cli

    monkeypatch.setattr(sys, "argv", ["vqvae", "evaluate", "run", "--batch-size", "9"])
    with pytest.raises(SystemExit):
        vqvae.cli.main()
    said = capsys.readouterr().err
    assert "--batch-size" in said
    assert "perhaps" not in said
    assert "see vqvae" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "run", "--num", "abc"], "Error parsing --num: "),
        (["train", "--prior.width", "abc"], "Error parsing --prior.width: "),
        (["sample", "run", "--temperature", "-1"], "error: got temperature=-1.0, expected"),
        (["train", "--prior.width", "5"], "error: got width=5 with num_heads=4, expected"),
    ],
)
def test_a_value_that_cannot_be_read_is_told_with_its_option(words, message, monkeypatch, capsys):
    import vqvae.cli

    monkeypatch.setattr(sys, "argv", ["vqvae", *words])
    with pytest.raises(SystemExit) as stopped:
        vqvae.cli.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
