"""Weights in PyTorch's pickled files (`.ckpt`, `.pt`, `.pth`, `.bin`), read without running what is in them.

A pickle can name any function and have it called. `torch.load(weights_only=True)` builds tensors and plain containers
and refuses every other name; to these come here, and only while a file is read:

- `argparse.Namespace`, in which trainers keep their arguments;
- numpy's scalars and their dtypes, which metrics come as;
- the names of Lightning's callbacks, for which a class without any behaviour stands in, so that a checkpoint whose
  callbacks left their state in it needs no Lightning to be read.
"""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safefolder.tensors import check_is_content


class StandIn:
    """What a name of Lightning's becomes: it takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass


CALLBACKS = tuple(
    f"{package}.{name}"
    for package in ("pytorch_lightning", "lightning.pytorch")
    for name in (
        "callbacks.model_checkpoint.ModelCheckpoint",
        "callbacks.early_stopping.EarlyStopping",
        "callbacks.lr_monitor.LearningRateMonitor",
    )
)
NUMPY_DTYPES = (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
_scalar = np.float64(0).__reduce__()[0]
# A name in a file and what it becomes; numpy's own module was renamed in its version 2.
ALLOWED: tuple[Any, ...] = (
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in NUMPY_DTYPES),
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    *((StandIn, name) for name in CALLBACKS),
)


def read_pickle(path: str | Path) -> Any:
    """What a pickled file holds, its tensors on the CPU, mapped from the file where its format allows.

    Raises:
        ValueError: missing, no such file, corrupt, or with a name in it that is not allowed.
    """
    path = Path(path)
    check_is_content(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(ALLOWED)):
            # Other libraries' pickles are of other protocols; what torch cannot follow it refuses.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if name := _refused(str(error)):
            raise ValueError(
                f"{path} holds {name}, which is not among the names that are safe to read; where you trust the file, "
                "load it with the library that wrote it and save its weights alone: "
                'torch.save({"state_dict": weights}, path)'
            ) from error
        raise ValueError(f"{path} is corrupt, or no file that torch.save wrote") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        # What a cut or altered file makes torch stumble over.
        raise ValueError(f"{path} is corrupt, or no file that torch.save wrote: {_first_line(error)}") from error


def _refused(message: str) -> str | None:
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"but got <class '([\w.]+)'>", message)
    return found.group(1).rstrip(".") if found else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
