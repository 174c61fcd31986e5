"""Folders of a model, written so that nothing already saved is ever lost.

A model is a folder: `config.json` (plain data) and `model.safetensors` (tensors). Reading it runs no code.
Every write goes to a new name beside the old one, is synced to the disk, and is then renamed over it, so a crash,
a full disk or a `kill -9` leaves either the whole old content or the whole new one.

This package is the one thing that `vqvae` and `priors` share; it imports neither.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

__all__ = ["FORMAT", "load", "load_weights", "replacing", "save", "scratch", "write_text"]

FORMAT = 1
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def scratch(path: Path) -> Path:
    """The name beside `path` that its next content is written to before it takes the place."""
    return _beside(Path(path), "writing")


def _beside(path: Path, what: str) -> Path:
    """A hidden sibling on the same file system, so that a rename is atomic."""
    return path.parent / f".{path.name}.{what}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Push a file, or a folder's files and then its own entries, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            _sync(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _recover(path: Path) -> None:
    """Finish a folder exchange that was cut between its two renames (see `replacing`)."""
    previous = _beside(path, "previous")
    if not path.exists() and previous.exists():
        os.replace(previous, path)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path` to write a file or a folder to; on success it takes `path`'s place.

    On any error the scratch is removed and what was at `path` stays. A folder cannot be renamed over a full one,
    so the old folder first steps aside to `.NAME.previous`; a reader that finds only that name takes it back.

    Raises:
        ValueError: the disk is full or the place cannot be written to; nothing already saved was touched.
    """
    path = Path(path)
    new = scratch(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _recover(path)
        _remove(new)
        yield new
        _sync(new)
        if path.is_dir():
            previous = _beside(path, "previous")
            _remove(previous)
            os.replace(path, previous)
            os.replace(new, path)
            _remove(previous)
        else:
            os.replace(new, path)
        _sync_entries(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove(new)
            _recover(path)
        if isinstance(error, OSError) or _is_write_failure(error):
            raise ValueError(_why(path, error)) from error
        raise


def _sync_entries(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_write_failure(error: BaseException) -> bool:
    # torch.save's zip writer and safetensors report a full disk through errors of their own.
    return isinstance(error, safetensors.SafetensorError) or (
        isinstance(error, RuntimeError) and ("PytorchStreamWriter" in str(error) or "file write" in str(error))
    )


def _why(path: Path, error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space is left on the disk"
    else:
        reason = str(error) or type(error).__name__
    return f"could not write {path}: {reason}; what was saved there before is untouched"


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into `folder`, both or neither."""
    # Weights of a compiled or strided module may share storage or be non-contiguous; a file holds plain copies.
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT, **config}, indent=2) + "\n"
    with replacing(Path(folder)) as scratch:
        scratch.mkdir()
        (scratch / CONFIG_NAME).write_text(text, encoding="utf-8")
        safetensors.torch.save_file(plain, scratch / WEIGHTS_NAME)


def _download(hub_id: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{hub_id!r} is no folder here; to read it from the Hugging Face hub: pip install 'vqvae-priors[hub]'"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except Exception as error:  # the hub's errors have many unrelated types; each becomes one line
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{hub_id!r} is neither a folder nor a model on the hub that can be read: {reason}") from error


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.startswith((".", "~")) and not Path(parts[0]).exists()


def load(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the config and the weights from a folder, or from a hub id `owner/name` where no such folder exists.

    Raises:
        ValueError: the folder is missing, incomplete, corrupt, foreign, or of a newer format.
    """
    folder = Path(source)
    _recover(folder)
    if not folder.exists():
        if isinstance(source, str) and _is_hub_id(source):
            folder = _download(source)
        else:
            raise ValueError(f"no model folder at {folder}")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: expected a folder that save_pretrained wrote")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_NAME} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict) or "format" not in config or "class" not in config:
        raise ValueError(f"{folder / CONFIG_NAME} is not of this library: it has no 'format' and 'class'")
    if config["format"] != FORMAT:
        raise ValueError(
            f"{folder} is of format {config['format']}, this version reads format {FORMAT}; upgrade vqvae-priors"
        )
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_NAME} is corrupt or no safetensors file: {error}") from error
    return config, tensors


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy `tensors` into `module`; every name and every shape must match.

    Raises:
        ValueError: names the first missing, extra and mis-shaped entries.
    """
    own = module.state_dict()
    problems = []
    if missing := sorted(own.keys() - tensors.keys()):
        problems.append(f"missing {_few(missing)}")
    if extra := sorted(tensors.keys() - own.keys()):
        problems.append(f"unknown {_few(extra)}")
    for name in sorted(own.keys() & tensors.keys()):
        if own[name].shape != tensors[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}")
            break
    if problems:
        raise ValueError(f"the weights in {source} do not fit its config: " + "; ".join(problems))
    with torch.no_grad():
        module.load_state_dict(dict(tensors))


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
