"""The page of public names, docs/names.md: what each package offers, with the first sentence that is said of it.

    python docs/names.py > docs/names.md

A name that leaves this list is somebody's broken program. What a module has beside these is for this project's own
rooms and may change; [architecture](architecture.md) says where it is.
"""

import importlib
import inspect
import re
from typing import Any

PACKAGES = (
    "vqvae",
    "vqvae.quantizers",
    "vqvae.likelihoods",
    "vqvae.em",
    "vqvae.looks",
    "vqvae.data",
    "vqvae.tokens",
    "vqvae.interop",
    "vqvae.codec",
    "priors",
    "safefolder",
)
# What has no docstring of its own.
CONSTANTS = {
    "MASKED": "The code of a position that a mask takes out.",
    "Given": "The annotation of an option that is decided by what stands around the part.",
}


def page() -> str:
    """The text of docs/names.md."""
    parts = ["# Public names", (inspect.getdoc(inspect.getmodule(page)) or "").rpartition("\n\n")[2]]
    for package in PACKAGES:
        module = importlib.import_module(package)
        rows = [f"| `{name}` | {sentence(name, getattr(module, name))} |" for name in sorted(module.__all__)]
        parts.append("\n".join([f"## {package}", "", "| name | what it is |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def sentence(name: str, value: Any) -> str:
    """The first sentence of a docstring, as one line."""
    if name in CONSTANTS:
        return CONSTANTS[name]
    first = " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split())
    return re.split(r"(?<=[^.][^.]\.)\s", first)[0].replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
