"""The `vqvae` command: train, look at what a run made, write images as bits and as codes, exchange models with others.

    vqvae train --run runs/fashion-mini
    vqvae reconstruct runs/fashion-mini
    vqvae sample runs/fashion-mini --label 7
    vqvae evaluate runs/fashion-mini
    vqvae compare runs/small runs/large
    vqvae report runs/fashion-mini
    vqvae compress runs/fashion-mini photos -o album.vq
    vqvae decompress runs/fashion-mini album.vq -o again
    vqvae info album.vq runs/fashion-mini
    vqvae dream runs/fashion-mini --seed 1
    vqvae demo
    vqvae tokenize runs/fashion-mini photos -o codes
    vqvae import amused/amused-256 --subfolder vqvae -o amused
    vqvae export runs/fashion-mini --to onnx -o exported
    vqvae push runs/fashion-mini owner/name

    measuring.py    reconstruct, evaluate
    comparing.py    compare
    reporting.py    report
    sampling.py     sample
    packing.py      compress
    unpacking.py    decompress
    describing.py   info
    dreaming.py     dream
    demonstrating.py, demo/   demo
    tokenizing.py   tokenize
    exporting.py    export, import
    pushing.py      push
    evaluating.py   the figures of one model, of bits and of the eye
    opening.py      what is named as a run or a model, opened, also while it trains
    image_choice.py which images: --data and --split
    whole.py        images as large as they are, in tiles
    inpainting.py   an image with a part to be sampled anew
    reading.py      the pixels of image files, exactly
    naming.py       names out of a file, which nobody vouches for, as places in a folder
    common.py       what commands share

Here is what answers without torch, which takes seconds to load: the list of the commands, and what is wrong with the
name of one. A command's module is loaded when it runs.

Exit status: 0; 1 where some of what was asked for could not be had, which is named on stderr; 2 for a mistake, in one
line; 130 after Ctrl-C. See `vqvae.exits`.
"""

import ast
import difflib
import functools
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

from vqvae import exits

# Where each command is. The first sentence of its docstring is what the help says of it.
COMMANDS = {
    "train": "vqvae.training.command:run_command",
    "reconstruct": "vqvae.cli.measuring:reconstruct",
    "sample": "vqvae.cli.sampling:sample",
    "evaluate": "vqvae.cli.measuring:evaluate",
    "compare": "vqvae.cli.comparing:compare",
    "report": "vqvae.cli.reporting:report",
    "compress": "vqvae.cli.packing:compress",
    "decompress": "vqvae.cli.unpacking:decompress",
    "info": "vqvae.cli.describing:info",
    "dream": "vqvae.cli.dreaming:dream",
    "demo": "vqvae.cli.demonstrating:demo",
    "tokenize": "vqvae.cli.tokenizing:tokenize",
    "import": "vqvae.cli.exporting:import_",
    "export": "vqvae.cli.exporting:export",
    "push": "vqvae.cli.pushing:push",
}


def main() -> None:
    """Entry point: whatever goes wrong is one line and exit status 2."""
    exits.run(_run, told=_told)


def _run() -> int | None:
    name, *words = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(_help())
    elif name == "--version":
        print(f"vqvae {_version()}")
    elif name in COMMANDS:
        return _run_command(name, words)
    else:
        raise ValueError(_no_command(name))
    return None


def _run_command(name: str, words: list[str]) -> int | None:
    import tyro

    from vqvae.allocator import keep_freed_memory

    keep_freed_memory()
    found = pkgutil.resolve_name(COMMANDS[name])
    if name == "train":  # whose options depend on each other
        found(words)
        return None
    command = _deferred(found)
    return exits.parsed(lambda: tyro.cli(command, prog=f"vqvae {name}", args=words))()


def _deferred(command: Callable[..., int | None]) -> Callable[..., Callable[[], int | None]]:
    @functools.wraps(command)
    def later(*args: Any, **options: Any) -> Callable[[], int | None]:
        return functools.partial(command, *args, **options)

    return later


def _help() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: vqvae COMMAND ...",
            "",
            *(f"  {name:<{width}}  {_sentence(place)}" for name, place in COMMANDS.items()),
            "",
            "`vqvae COMMAND --help` says what each takes; `vqvae --version` which version this is.",
        ]
    )


def _sentence(place: str) -> str:
    """The first line of a command's docstring, read from its source: to import the module would load torch."""
    module, _, function = place.partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    (node,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return (ast.get_docstring(node) or "").partition("\n")[0]


def _no_command(name: str) -> str:
    """What is wrong with a command line whose first word is no command."""
    like = difflib.get_close_matches(name, COMMANDS, 1)
    return (
        f"got {f'{name!r} for a command' if name else 'no command'}"
        f"{f'; perhaps you meant {like[0]}' if like else ''}; expected one of {', '.join(COMMANDS)}; see vqvae --help"
    )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vqvae-priors")
    except PackageNotFoundError as error:
        raise ValueError("this is a checkout that is not installed, which has no version") from error


def _told(error: Exception) -> str:
    # What has found a file damaged is loaded; a mistyped command is told without it.
    codec = sys.modules.get("vqvae.codec")
    if codec is not None and isinstance(error, codec.DamagedFile) and error.args[1] == codec.storage.RECOVER:
        return f"{error.args[0]}; `vqvae decompress --recover` gets what is whole"
    return str(error)
