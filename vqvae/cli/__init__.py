"""The `vqvae` command: look at what a run made, write images as bits and as codes, and exchange models with others.

    vqvae reconstruct runs/fashion-mini
    vqvae sample runs/fashion-mini --label 7
    vqvae evaluate runs/fashion-mini
    vqvae compress runs/fashion-mini photos -o album.vq
    vqvae decompress runs/fashion-mini album.vq -o again
    vqvae info album.vq runs/fashion-mini
    vqvae dream runs/fashion-mini --seed 1
    vqvae tokenize runs/fashion-mini photos -o codes
    vqvae import amused/amused-256 --subfolder vqvae -o amused
    vqvae export runs/fashion-mini --to onnx -o exported
    vqvae push runs/fashion-mini owner/name

    look.py         reconstruct, evaluate
    sampling.py     sample
    packing.py      compress
    unpacking.py    decompress
    figures.py      info
    dreaming.py     dream
    tokenizing.py   tokenize
    exporting.py    export, import
    pushing.py      push
    inpainting.py   an image with a part to be drawn anew
    reading.py      the pixels of image files, exactly
    naming.py       names out of a file, which nobody vouches for, as places in a folder
    common.py       what commands share

Exit status: 0; 1 where some of what was asked for could not be had, which is named on stderr; 2 for a mistake, in one
line; 130 after Ctrl-C. See `vqvae.exits`.
"""

import functools
from collections.abc import Callable
from typing import Any

import tyro

from vqvae import exits
from vqvae.allocator import keep_freed_memory
from vqvae.cli.dreaming import dream
from vqvae.cli.exporting import export, import_
from vqvae.cli.figures import info
from vqvae.cli.look import evaluate, reconstruct
from vqvae.cli.packing import compress
from vqvae.cli.pushing import push
from vqvae.cli.sampling import sample
from vqvae.cli.tokenizing import tokenize
from vqvae.cli.unpacking import decompress
from vqvae.codec import DamagedFile
from vqvae.codec.container import RECOVER


def main() -> None:
    """Entry point: whatever goes wrong is one line and exit status 2."""
    keep_freed_memory()
    exits.run(_run, told=_told)


def _run() -> int | None:
    return exits.parsed(_parse)()


def _parse() -> Callable[[], int | None]:
    """The command that was asked for, with its options, not yet run."""
    commands: dict[str, Callable[..., int | None]] = {
        "reconstruct": reconstruct,
        "sample": sample,
        "evaluate": evaluate,
        "compress": compress,
        "decompress": decompress,
        "info": info,
        "dream": dream,
        "tokenize": tokenize,
        "import": import_,
        "export": export,
        "push": push,
    }
    return tyro.extras.subcommand_cli_from_dict(
        {name: _deferred(command) for name, command in commands.items()},
        prog="vqvae",
        description="Look at what a run made, write images as bits or as codes with it, and exchange models with "
        "other software. RUN_OR_MODEL is a run's folder, a saved model's folder, or a hub id.",
    )


def _deferred(command: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    @functools.wraps(command)
    def later(*args: Any, **options: Any) -> Callable[[], int | None]:
        return functools.partial(command, *args, **options)

    return later


def _told(error: Exception) -> str:
    if isinstance(error, DamagedFile) and error.args[1] == RECOVER:
        return f"{error.args[0]}; `vqvae decompress --recover` gets what is whole"
    return str(error)
