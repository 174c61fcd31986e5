"""Files of weights that are downloaded once, into torch's cache."""

import hashlib
import os
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor


def downloaded(url: str, of: str) -> dict[str, Tensor]:
    """The state dict at a URL, from the cache if there; its name ends in digits of its SHA-256, which are checked.

    Raises:
        ValueError: it is not in the cache and cannot be had.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), _digits(path.name), progress=False)
    except (OSError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the weights of {of} are not at {path} and could not be had from {url} ({reason}); put them there"
        ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(_digits(path.name)):
        raise ValueError(f"{path} is not the file of {url}: its SHA-256 begins with {found[:8]}; remove it")
    return from_file(path)


def _digits(name: str) -> str:
    """The digits of its SHA-256 that a file's name ends in."""
    return name.rpartition("-")[2].partition(".")[0]


def from_file(path: Path) -> dict[str, Tensor]:
    """A state dict that torch wrote, read without running code.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"got {path} for a file of weights, but there is no such file") from error
    except Exception as error:  # whatever a damaged file makes torch raise
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no file of weights written by torch: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__} instead of named tensors")
    return dict(state)
