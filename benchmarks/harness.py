"""What all programs share: interleaved rounds, medians, clocks, processes, tables, kept results, pictures, images."""

import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

import safefolder
from vqvae import load_images

# Where a program that takes `device` does its work.
Device = Literal["cpu", "cuda"]
Key = TypeVar("Key")
Result = TypeVar("Result")

ROOT = Path(__file__).parents[1]
# Where results and pictures go unless a program is told otherwise; git ignores it.
OUT = ROOT / "runs" / "benchmarks"


class ProcessError(Exception):
    """A process ended with another status than it should have."""


# ------------------------------------------------------------------------------------------------------------- rounds


def interleaved(
    jobs: Mapping[Key, Callable[[], Result]], rounds: int, budget: float = math.inf
) -> dict[Key, list[Result]]:
    """What each job gives in each round. Jobs take turns, in every second round from the last to the first.

    Args:
        jobs: what takes turns, by name.
        rounds: how many times.
        budget: seconds after which no further round begins.
    """
    found: dict[Key, list[Result]] = {key: [] for key in jobs}
    began = time.perf_counter()
    with tqdm(total=rounds * len(jobs), desc="rounds", disable=None, leave=False) as bar:
        for number in range(rounds):
            if number and time.perf_counter() - began >= budget:
                break
            for key in reversed(list(jobs)) if number % 2 else list(jobs):
                found[key].append(jobs[key]())
                bar.update()
    return found


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over rounds."""
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def ratio(new: Iterable[float], old: Iterable[float]) -> float:
    """The median of the rounds' own ratios, which what slowed a whole round down does not touch."""
    return statistics.median(one / other for one, other in zip(new, old, strict=True))


class Spent(NamedTuple):
    """Seconds: `counted` are CPU time on one thread of a CPU, which others on the machine change less; else `wall`."""

    counted: float
    wall: float


def check_device(device: str) -> None:
    """Refuse a GPU that is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "got --device cuda, but torch.cuda.is_available() is False here; expected a machine with a GPU"
        )


def now(device: str = "cpu") -> Spent:
    """The clocks, once the device has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter()
    return Spent(time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else wall, wall)


def timed(job: Callable[[], object], device: str = "cpu") -> Spent:
    """What a job takes."""
    start = now(device)
    job()
    end = now(device)
    return Spent(end.counted - start.counted, end.wall - start.wall)


def peak_bytes(device: str = "cpu") -> int:
    """The most memory of this process so far: resident, or on a GPU that of torch's allocator."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def machine() -> str:
    """The machine in a line that does not name it, with its noise: how the times of one short loop differ."""
    times = sorted(timed(lambda: sum(range(50_000))).wall for _ in range(100))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    facts = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, {memory:.0f} GiB, {gpu}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    middle, most = times[len(times) // 2] / times[0], times[-1] / times[0]
    noise = f"load {os.getloadavg()[0]:.1f}, a short loop takes {middle:.2f} (at most {most:.1f}) times its fastest"
    return f"{facts}; {versions}; {noise}"


# ---------------------------------------------------------------------------------------------------------- processes

# Packages come from the checkout that the process runs in, the programs from this one.
_CHILD = """
import sys
import priors, safefolder, vqvae
sys.path.insert(0, sys.argv[1])
from benchmarks import harness
harness.answer(*sys.argv[2:])
"""


def _environment(checkout: Path, threads: int | None, **more: str) -> dict[str, str]:
    threads_of = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, "PYTHONPATH": str(checkout), **threads_of, **more}


class Child:
    """A function of a program at work in a process of its own.

    Args:
        function: at the top of a module of this package; gives something that JSON can hold.
        arguments: what it is called with; JSON again, paths as strings.
        checkout: whose packages it uses.
        threads: of arithmetic; as many as there are cores where None.
        more: variables of its environment.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        checkout: Path = ROOT,
        threads: int | None = 1,
        **more: str,
    ):
        self.name = f"{function.__module__}.{function.__name__}"
        words = [str(ROOT), function.__module__, function.__name__, json.dumps(arguments, default=str)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *words],
            cwd=checkout,
            env=_environment(checkout, threads, **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self) -> Any:
        """What the function gave."""
        written, errors = self.process.communicate()
        if self.process.returncode:
            raise ProcessError(f"{self.name} failed: {errors[-2000:]}")
        return json.loads(written.splitlines()[-1])


def answer(module: str, name: str, arguments: str) -> None:
    """In a child: call the function, and print what it gives as the last line."""
    found = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    print(f"\n{json.dumps(found)}")


def in_child(function: Callable[..., Any], *arguments: Any, **how: Any) -> Any:
    """What a function gives in a process of its own, see `Child`."""
    return Child(function, *arguments, **how).answer()


class Ran(NamedTuple):
    """What a command took with all its processes: seconds, and GiB of the largest of them."""

    wall: float
    cpu: float
    peak: float


def command(*words: object, checkout: Path = ROOT, threads: int | None = 1, status: int = 0, quiet: bool = True) -> Ran:
    """Run Python with these words in a checkout; `ProcessError` if it ends with another status."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=checkout,
        env=_environment(checkout, threads),
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
    )
    errors = ""
    if process.stderr is not None:
        with process.stderr:
            errors = process.stderr.read()
    _, ended, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(ended)
    if process.returncode != status:
        raise ProcessError(f"{' '.join(map(str, words))} ended with {process.returncode}: {errors[-2000:]}")
    # Linux counts memory in KiB, macOS in bytes.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return Ran(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)


def train(folder: Path, *options: object, **how: Any) -> Ran:
    """Run `train.py` in a folder, as `command` does."""
    return command("train.py", "--run", folder.resolve(), *options, **how)


def steps(codebook: int, prior: int) -> tuple[str, ...]:
    """The options of `train.py` for so many steps."""
    return "--codebook-fit.num-steps", str(codebook), "--prior-fit.num-steps", str(prior)


def elbo_of(run: Path) -> dict[str, Any]:
    """What a run reached."""
    return json.loads((run / "elbo.json").read_text())


def some_run(given: Path | None, num_steps: int) -> Path:
    """The run that was given, or one of our own on the embedded images, trained once and kept."""
    if given is not None:
        return given
    run = OUT / f"run-of-{num_steps}-steps"
    if not (run / "elbo.json").exists():
        resume = ["--resume"] if run.exists() else []
        train(run, *resume, *steps(num_steps, max(1, num_steps // 2)))
    return run


# ------------------------------------------------------------------------------------------------- results and images


class Table:
    """A markdown table, printed row by row as the figures come."""

    def __init__(self, *heads: object):
        self._line(heads)
        self._line(["---"] * len(heads))

    def row(self, *cells: object) -> None:
        self._line(cells)

    def _line(self, cells: Iterable[object]) -> None:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


class Kept:
    """Results in a JSON file; what is there is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        self._writing = threading.Lock()
        self._found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def fill(self, jobs: Mapping[str, Callable[[], Any]], beside: int = 1) -> dict[str, Any]:
        """The results of these jobs, run so many beside each other where missing, each written at once."""

        def one(name: str) -> None:
            result = jobs[name]()
            with self._writing:
                self._found[name] = result
                safefolder.files.write_text(self.path, json.dumps(self._found, indent=1) + "\n")

        missing = [name for name in jobs if name not in self._found]
        with ThreadPoolExecutor(beside) as pool:
            list(tqdm(pool.map(one, missing), desc=self.path.stem, total=len(missing), disable=None))
        return {name: self._found[name] for name in jobs}


def pick(choices: Mapping[str, Result], names: Sequence[str]) -> dict[str, Result]:
    """The choices of these names; all where none is given."""
    if unknown := set(names) - set(choices):
        raise ValueError(f"got {', '.join(sorted(unknown))}, expected names among {', '.join(choices)}")
    return {name: choices[name] for name in names or choices}


@contextmanager
def picture(path: Path, rows: int = 1, columns: int = 1, **how: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes to draw on, saved as PNG at the end."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, **how)
    yield figure, axes
    with safefolder.files.replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)
    print(f"\n{path}")


def images(
    source: str = "fashion-mini", split: str = "test", num: int | None = None, **options: Any
) -> UInt8[Tensor, "b c h w"]:
    """The first images of the embedded set, of a folder, or of whatever else `load_images` takes, with its options."""
    return load_images(source, split, **options)[:num].images
