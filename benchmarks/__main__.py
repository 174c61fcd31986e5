"""List the programs, run one of them, or all.

    python -m benchmarks                       # what there is
    python -m benchmarks NAME [options]        # --help says which; --quick takes tiny settings, options win over them
    python -m benchmarks all [--quick]         # one after the other; exit status 1 if any failed
    python -m benchmarks --device cuda         # those that work on a GPU, there: `all` of what has the option `device`

A program is a module of this package with a function `main`, whose arguments are its options. What has no default must
be given: such programs are left out where all are run, as are those that a package is missing for; each says why.
"""

import ast
import functools
import importlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from benchmarks import harness

# The exit status of a program that a package is missing for.
MISSING = 3


@dataclass(frozen=True)
class Program:
    """A program as it stands in its file, without importing it."""

    name: str
    line: str
    needs: tuple[str, ...]
    has_device: bool = False


def programs(folder: Path = Path(__file__).parent) -> list[Program]:
    """The modules of a folder that have a `main`."""
    found = []
    for path in sorted(folder.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                line = (ast.get_docstring(tree) or "").partition("\n")[0]
                names = [word.arg for word in (*node.args.posonlyargs, *node.args.args)]
                needs = tuple(names[: len(names) - len(node.args.defaults)])
                found.append(Program(path.stem, line, needs, "device" in names))
    return found


def joined(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Options of which the second win, and then what both have after `--`."""
    found: tuple[list[str], list[str]] = ([], [])
    for words in (first, second):
        end = list(words).index("--") if "--" in words else len(words)
        found[0].extend(words[:end])
        found[1].extend(words[end + 1 :])
    return [*found[0], *(["--", *found[1]] if found[1] else [])]


def parse(name: str, words: Sequence[str]) -> functools.partial[None]:
    """A program with its options, not yet run."""
    import tyro

    module = importlib.import_module(f"benchmarks.{name}")
    if "--quick" in words:
        words = joined(module.QUICK.split(), [word for word in words if word != "--quick"])

    @functools.wraps(module.main)
    def later(*args: Any, **options: Any) -> functools.partial[None]:
        return functools.partial(module.main, *args, **options)

    prog = f"python -m benchmarks {name}"
    return tyro.cli(later, prog=prog, description=module.__doc__, args=words, config=[tyro.conf.FlagCreatePairsOff])


def main(words: Sequence[str]) -> int:
    """The exit status."""
    found = {program.name: program for program in programs()}
    if not words or words[0] in ("-h", "--help"):
        print("python -m benchmarks NAME [--quick] [options], or `all`, or --device cuda; NAME --help says more\n")
        for program in found.values():
            print(f"{program.name:20} {program.line}")
        return 0
    if words[0] == "all":
        return run_all(list(found.values()), words[1:])
    if words[0] == "--device":
        return run_all(list(found.values()), words)
    if words[0] not in found:
        print(f"error: there is no program {words[0]}, only {', '.join(found)}, and all", file=sys.stderr)
        return 2
    try:
        job = parse(words[0], words[1:])
        harness.check_device(job.keywords.get("device", "cpu"))
        print(harness.machine(), end="\n\n", flush=True)
        job()
        print(f"\n{harness.machine()}")
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install -e '.[dev]' brings what is compared", file=sys.stderr)
        return MISSING
    except (ValueError, OSError, harness.ProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run_all(found: Sequence[Program], words: Sequence[str]) -> int:
    """Each program that needs no argument, in a process of its own; with --device, each that has that option."""
    rest = [word for word in words if word != "--quick"]
    devices = get_args(harness.Device)
    if rest and (len(rest) != 2 or rest[0] != "--device" or rest[1] not in devices):
        expected = f"--quick and --device {' or '.join(devices)}"
        print(f"error: got {' '.join(words)}, expected at most {expected} where all are run", file=sys.stderr)
        return 2
    try:
        harness.check_device(rest[1] if rest else "cpu")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed, missing = [], []
    for program in found:
        print(f"\n## {program.name}: {program.line}\n", flush=True)
        if program.needs or (rest and not program.has_device):
            reason = f"it needs {', '.join(program.needs)}" if program.needs else "it has no option `device`"
            print(f"left out: {reason}", flush=True)
            continue
        command = [sys.executable, "-m", "benchmarks", program.name, *words]
        status = subprocess.run(command, cwd=harness.ROOT, check=False).returncode
        if status == MISSING:
            print("left out: it needs the package that is named above", flush=True)
            missing.append(program.name)
        elif status:
            failed.append(program.name)
    if missing:
        print(f"\nleft out for want of a package: {', '.join(missing)}")
    print(f"\nfailed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
