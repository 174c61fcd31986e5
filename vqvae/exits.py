"""How a program ends: one line for whoever uses it, whatever went wrong, and an exit status.

    0      done; also where nobody reads the output any more (`vqvae info album.vq | head`)
    2      a mistake, a damaged file, a full disk, too little memory, a fault of the program: one line on stderr
    130    Ctrl-C

What is foreseen is a ValueError (or an OSError) and says what to do. All else is caught here, as the last resort, and
told with the name of the exception; with `--debug` among the words of the command its traceback comes first.
"""

import contextlib
import io
import os
import re
import select
import sys
import traceback
from collections.abc import Callable
from typing import TypeVar

DEBUG = "--debug"
# What a terminal shows of an error: some quote what they could not read.
_MOST = 1000
_FRAME = "╭╮╰╯│─ "
Parsed = TypeVar("Parsed")


def run(
    program: Callable[[], int | None],
    *,
    told: Callable[[Exception], str] = str,
    interrupted: Callable[[], str] = lambda: "interrupted",
) -> None:
    """Run a program, and end the process unless all went well.

    Args:
        program: its exit status comes back, None is 0.
        told: what to say of an error that was foreseen.
        interrupted: what to say after Ctrl-C.
    """
    # Who closes one of them (`>&-`) does not want to hear of it; all that writes expects something to write to.
    sys.stdout, sys.stderr = (each or open(os.devnull, "w") for each in (sys.stdout, sys.stderr))  # noqa: SIM115
    debug, asked = DEBUG in sys.argv, False
    sys.argv[1:] = [word for word in sys.argv[1:] if word != DEBUG]
    try:
        if "" in sys.argv[1:]:
            raise ValueError("got an empty word, as of a shell variable that is not set; expected a name or a value")
        status = program() or 0
        sys.stdout.flush()
    except SystemExit as stop:
        status, asked = stop.code, True
        if isinstance(status, str):
            status = fail(status)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(interrupted(), file=sys.stderr)
        status = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            status = 0
        else:
            if debug:
                traceback.print_exc()
            status = fail(_sentence(error, told))
    if _nobody_reads():
        # What is left in the buffer would be an error again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status or asked:
        sys.exit(status)


def fail(text: str) -> int:
    """Say what is wrong, in one line; the exit status for it."""
    line = " ".join(text.split())
    line = line if len(line) <= _MOST else f"{line[:_MOST]}..."
    with contextlib.suppress(OSError):
        print(f"error: {line}", file=sys.stderr, flush=True)
    return 2


def _sentence(error: Exception, told: Callable[[Exception], str]) -> str:
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return f"there is not enough memory ({_first_line(error)}); ask for less at once, or for a smaller model"
    if isinstance(error, RecursionError):
        return "what was given is nested too deeply to be read"
    if isinstance(error, ValueError | OSError):
        return told(error) or type(error).__name__
    return (
        f"{type(error).__name__}: {_first_line(error)} (not foreseen, and so a fault of this program: "
        f"add {DEBUG} to see where)"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is how torch says that there is no memory, on a CPU or a GPU."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text or "not enough memory" in text
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    try:
        descriptor = sys.stdout.fileno()
        poll = select.poll()
    except (AttributeError, OSError, ValueError):  # no descriptor, or a system without poll
        return False
    poll.register(descriptor, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parsed(parse: Callable[[], Parsed]) -> Parsed:
    """What a command line comes to, read by tyro, whose frames of many lines become one sentence.

    Raises:
        ValueError: an option that there is not, with the one most like it, or a value that is none.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit as stop:
        if stop.code != 2:
            sys.stderr.write(said.getvalue())
            raise
    if "error: " in said.getvalue():  # of argparse
        raise ValueError(said.getvalue().partition("error: ")[2])
    text, _, rest = " ".join(line.strip(_FRAME) for line in said.getvalue().splitlines()[1:]).partition("Perhaps you")
    text = re.split("For full helptext", text)[0]
    # Of an options object, whose sentence says it all; the frame is of dashes where a terminal has no other.
    if whole := re.search(r"Error parsing (?!-)\S+: (.*?)[-\s]*$", text):
        raise ValueError(whole[1])
    like = re.search(r"--[\w.-]+", rest.partition("For full helptext")[0])
    where = re.search(r"\b(?!run |see )\S+( [a-z]+)? --help", said.getvalue().rpartition("For full helptext")[2])
    # Another command may have the very option.
    hint = f"; perhaps you meant {like[0]}" if like and like[0] not in text.split() else ""
    raise ValueError(f"{text.strip(' .')}{hint}; see {where[0] if where else '--help'}")
