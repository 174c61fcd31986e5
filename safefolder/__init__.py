"""Folders of a model, written so that nothing already saved is ever lost, and read here or from the hub.

A model is a folder: `config.json` (plain data) and `model.safetensors` (tensors; above a size several shards with an
index, as the Hugging Face libraries write them). Reading it runs no code. A repository on the Hugging Face hub is such
a folder, or has such folders inside it.

    files.py    files and folders written whole or not at all
    locks.py    one writer at a time
    options.py  what a config may hold, checked before it is made
    arrays.py   tensors of what people have in place of them
    tensors.py  weights in one file or several, and JSON
    folder.py   the format: saved, loaded, checked, pushed
    building.py a module out of a folder that somebody else may have written
    hub.py      to and from the Hugging Face hub
    cards.py    what a model's page on the hub says

This package is the one thing that `vqvae` and `priors` share; it imports neither.
"""

from safefolder.building import build
from safefolder.cards import PICTURES, card, import_line, loading, model_facts, public_name, python
from safefolder.files import replacing, write_text
from safefolder.folder import (
    BESIDE,
    CONFIG_NAME,
    FORMAT,
    has_part,
    load,
    load_weights,
    members,
    push,
    push_pretrained,
    read_config,
    save,
    stale_patterns,
)
from safefolder.hub import HubOptions, upload
from safefolder.locks import one_writer
from safefolder.options import Options
from safefolder.tensors import read_json

__all__ = [
    "BESIDE",
    "CONFIG_NAME",
    "FORMAT",
    "PICTURES",
    "HubOptions",
    "Options",
    "build",
    "card",
    "has_part",
    "import_line",
    "load",
    "load_weights",
    "loading",
    "members",
    "model_facts",
    "one_writer",
    "public_name",
    "push",
    "push_pretrained",
    "python",
    "read_config",
    "read_json",
    "replacing",
    "save",
    "stale_patterns",
    "upload",
    "write_text",
]
