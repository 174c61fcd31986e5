"""Folders of a model, written so that nothing already saved is ever lost, and read here or from the hub.

A model is a folder: `config.json` (plain data) and `model.safetensors` (tensors; above a size several shards with an
index, as the Hugging Face libraries write them). Reading it runs no code. A repository on the Hugging Face hub is such
a folder, or has such folders inside it.

    files.py    files and folders written whole or not at all
    locks.py    one writer at a time
    options.py  what a config may hold, checked before it is made
    messages.py values in the messages of errors
    configured.py  classes whose options are the signature of their constructor
    model.py    what every model is that can be saved
    fingerprint.py  which weights a file belongs to
    arrays.py   tensors of what people have in place of them
    tensors.py  weights in one file or several, and JSON
    folder.py   the format: saved, loaded, checked, pushed
    building.py a module out of a folder that somebody else may have written
    packaged.py models that come with the package, by name
    hub.py      to and from the Hugging Face hub
    cards.py    what a model's page on the hub says

This package is the one thing that `vqvae` and `priors` share; it imports neither.
"""

from safefolder.folder import load, push, save
from safefolder.hub import HubOptions
from safefolder.model import SavedModel
from safefolder.options import Options

__all__ = [
    "HubOptions",
    "Options",
    "SavedModel",
    "load",
    "push",
    "save",
]
