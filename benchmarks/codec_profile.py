"""Where the time of decoding our files of bits goes, in one archive and one by one.

    python -m benchmarks codec_profile RUN [--source fashion-mnist] [--root FOLDER] [--num 512]

A run is a folder with `codebook` and `prior`, as `train.py` makes it; without one a small run of our own is trained. A
clock of CPU time runs for each group of functions, on one thread; it stops where a function of another group begins.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tyro.conf import Positional

from benchmarks import harness
from benchmarks.codec import codec_of
from vqvae.codec import Codec, Compression, integer_tables
from vqvae.codec.coder import RangeReader

# One image by itself takes so much longer that fewer are timed.
ALONE_OF = 16
QUICK = "--num 16 --num-steps 4"


class Clock:
    """CPU time of groups of functions: what one calls of another group counts for that one."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._stack = ["rest"]
        self._since = time.process_time()

    def change(self, group: str | None) -> None:
        """Begin a group, or end the one that is on."""
        now = time.process_time()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now
        self._stack.append(group) if group else self._stack.pop()

    def of(self, group: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function, timed; or one that gives an iterator, whose steps are."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.change(group)
            try:
                result = function(*args, **kwargs)
            finally:
                self.change(None)
            return self._steps(group, result) if isinstance(result, Iterator) else result

        return timed

    def _steps(self, group: str, steps: Iterator[Any]) -> Iterator[Any]:
        while True:
            self.change(group)
            try:
                step = next(steps)
            except StopIteration:
                return
            finally:
                self.change(None)
            yield step


def seconds_of(codec: Codec, files: list[bytes]) -> dict[str, float]:
    """CPU seconds of each group while these files are decoded."""
    coder = codec.coder
    parts: list[tuple[str, Any, str]] = [
        ("prior's walk", coder.prior, "walk"),
        ("decoder network", coder.model.decoder, "forward"),
        ("decoder network", coder.model, "vectors"),
        ("likelihood's context network", coder.likelihood, "_pixel_steps"),
        ("likelihood, the rest", coder.likelihood, "visit"),
        ("integer tables", integer_tables, "CodeTables"),
        ("integer tables", integer_tables.CodeTables, "widths"),
        *(("integer tables", integer_tables.LevelTables, name) for name in ("__init__", "high", "low")),
        ("coder", RangeReader, "get"),
        ("coder", RangeReader, "__init__"),
    ]
    with ExitStack() as patches:
        clock = Clock()
        for group, owner, name in parts:
            patches.enter_context(mock.patch.object(owner, name, clock.of(group, getattr(owner, name))))
        for file in files:
            codec.decompress(file)
        clock.change("end")
    return {group: clock.seconds[group] for group in [*dict.fromkeys(part[0] for part in parts), "rest"]}


def main(
    run: Positional[Path | None] = None,
    source: str = "fashion-mini",
    root: Path | None = None,
    num: int = 512,
    num_steps: int = 1000,
) -> None:
    """Decode the first `num` test images with clocks on; `num_steps` are of a run of our own."""
    torch.set_num_threads(1)
    codec = codec_of(harness.some_run(run, num_steps))
    images = harness.images(source, "test", num, root=root)
    alone = images[::ALONE_OF]
    archive = [codec.compress(images, options=Compression(verify=False))]
    single = [codec.compress(image[None], options=Compression(verify=False)) for image in alone]
    found = [(seconds_of(codec, files), num) for files, num in ((archive, len(images)), (single, len(alone)))]
    table = harness.Table("CPU time of decoding", f"an archive of {len(images):,}", f"{len(alone):,} one by one")
    for group in found[0][0]:
        table.row(group, *(f"{spent[group] / sum(spent.values()):.1%}" for spent, _ in found))
    table.row("ms an image", *(f"{1000 * sum(spent.values()) / num:.1f}" for spent, num in found))
