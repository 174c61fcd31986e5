"""Weights in PyTorch's pickled files (`.ckpt`, `.pt`, `.pth`, `.bin`), read without running what is in them.

    zip         data.pkl, which says what there is, and a stored member for each storage; mapped from the file
    legacy      of torch before 1.6: the same pickle behind three others, then the storages one after another

`vqvae.interop.pickle_machine` works out what the pickle says. What a file claims is held against the file first: a
member is there in full, unpacked, under its checksum; a storage is as large as the numbers that the pickle says it
has. So nothing is allocated that the file does not hold, and a file that is damaged is not taken for a whole one.
"""

import io
import os
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from safefolder.tensors import check_is_content, in_short
from vqvae.interop.pickle_machine import STORAGES, UNTYPED, Machine, Name, RefusedError, Storage

ZIP = b"PK\x03\x04"
# Of a trainer's checkpoint it has some hundred kilobytes.
MOST_PICKLE_BYTES = 32 << 20
# Of the list of a zip's members.
MOST_LIST_BYTES = 16 << 20
LOCAL_HEADER = struct.Struct("<4s22xHH")
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_pickle(path: str | Path) -> Any:
    """What a pickled file holds, its tensors on the CPU, mapped from the file where its format allows.

    Tensors, texts, numbers, lists, tuples and dicts are what they are; so are a `Namespace` of arguments and numpy's
    numbers. What else trainers leave behind is there as a `StandIn`.

    Raises:
        ValueError: missing, corrupt, no such file, or with a name in it that is not allowed.
    """
    path = Path(path)
    check_is_content(path)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP)) == ZIP
            file.seek(0)
            return _read_zip(path) if is_zip else _read_legacy(file)
    except RefusedError as error:
        raise ValueError(f"{path} {_refused(error)}") from error
    except Exception as error:  # what is no pickle and no zip makes their readers stumble in many ways
        raise ValueError(f"{path} is corrupt, or no file that torch.save wrote: {in_short(error)}") from error


def refusal(error: BaseException) -> str:
    """Why `torch.load(weights_only=True)` refused a file, in one short line of our own.

    Torch's own tells how to run what is in the file. Where it was something else, the error's own words in one line.
    """
    text = str(error)
    for pattern in (r"GLOBAL (\S+)", r"but got <class '([\w.]+)'>", r"unrecognized function <[a-z- ]*?([\w.]+)[ >]"):
        if found := re.search(pattern, text):
            return f"it holds {found[1].rstrip('.')[:100]}, which is neither weights nor plain values"
    if "weights_only" in text or "WeightsUnpickler" in text:
        return "it holds what is neither weights nor plain values"
    return " ".join(text.split())[:300] or type(error).__name__


def _refused(error: RefusedError) -> str:
    if error.name is None:
        return f"is corrupt, or no file that torch.save wrote: {error}"
    module, _, kind = error.name.rpartition(".")
    if module.startswith(("vqvae.", "priors.")) and hasattr(sys.modules.get(module), kind):  # others are called so too
        return (
            f"holds a whole {kind} of this library, pickled: save it by save_pretrained, and "
            "read that folder by VQVAE.from_pretrained, or a prior's by Prior.from_pretrained"
        )
    return (
        f"holds {error.name.removeprefix('builtins.')}, which is not among the names that are safe to read; where you "
        "trust the file, load it with the library that wrote it and save its weights alone: "
        'torch.save({"state_dict": weights}, path)'
    )


class _Bounded(io.FileIO):
    """A zip whose list of members is read in one piece that is not too large."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(MOST_LIST_BYTES + 1 if size is None or size < 0 else min(size, MOST_LIST_BYTES + 1)) or b""
        if len(data) > MOST_LIST_BYTES:
            raise RefusedError(f"its list of members is over {MOST_LIST_BYTES:,} bytes")
        return data


def _read_zip(path: Path) -> Any:
    with _Bounded(path) as file, zipfile.ZipFile(file) as archive:  # pyrefly: ignore
        members = {member.filename: member for member in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise RefusedError("it has two members of one name")
    pickles = [name for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
        raise RefusedError(f"it is a zip with {len(pickles)} files called data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise RefusedError("it is a program of TorchScript, expected weights")
    size = path.stat().st_size
    whole: Any = torch.UntypedStorage.from_file(str(path), False, size)
    content = _bytes(whole)
    known: dict[str, torch.UntypedStorage] = {}

    def member(name: str) -> torch.UntypedStorage:
        """A member's bytes, mapped."""
        if name in known:
            return known[name]
        if (info := members.get(name)) is None:
            raise RefusedError(f"it has no {name[:100]}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
            raise RefusedError(f"its {name[:100]} is compressed or encrypted, which torch.save does not do")
        if info.header_offset < 0:
            raise RefusedError(f"its {name[:100]} begins before the file")
        sign, *lengths = LOCAL_HEADER.unpack_from(content, info.header_offset)
        start = info.header_offset + LOCAL_HEADER.size + sum(lengths)
        if sign != ZIP or start + info.file_size > size:
            raise RefusedError(f"it claims {info.file_size:,} bytes for {name[:100]}, and has fewer")
        # 0 is what torch writes for "not computed".
        if info.CRC and zlib.crc32(content[start : start + info.file_size]) != info.CRC:
            raise RefusedError(f"its {name[:100]} is not what its checksum says")
        known[name] = held = whole[start : start + info.file_size]
        return held

    if f"{root}byteorder" in members and bytes(_bytes(member(f"{root}byteorder"))) != b"little":
        raise RefusedError("its numbers are those of a big-endian machine; save it anew on another")

    def storage_of(saved: Any) -> Storage:
        dtype, name, num_bytes, _ = _saved(saved, 5)
        held = member(f"{root}data/{name}")
        if num_bytes > held.nbytes():
            raise RefusedError(f"it claims {num_bytes:,} bytes for the storage {name[:100]}, and has {held.nbytes():,}")
        if dtype is not None and held.data_ptr() % dtype.itemsize:
            known[f"{root}data/{name}"] = held = held.clone()
        return Storage(held, dtype)

    if members[pickles[0]].file_size > MOST_PICKLE_BYTES:
        raise RefusedError(f"its pickle is over {MOST_PICKLE_BYTES:,} bytes")
    return Machine(storage_of).run(io.BytesIO(_bytes(member(pickles[0]))))


def _bytes(storage: torch.UntypedStorage) -> memoryview:
    return memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())  # pyrefly: ignore


def _read_legacy(file: io.BufferedReader) -> Any:
    start = io.BytesIO(file.read(MOST_PICKLE_BYTES))
    left = os.fstat(file.fileno()).st_size
    known: dict[str, tuple[torch.UntypedStorage, int]] = {}

    def storage_of(saved: Any) -> Storage:
        nonlocal left
        dtype, name, num_bytes, view = _saved(saved, 6)
        if dtype is None:
            raise RefusedError("it has a storage without a type")
        if name not in known:
            left -= num_bytes
            if left < 0:
                raise RefusedError(f"it claims {num_bytes:,} bytes for the storage {name[:100]}, and has fewer")
            known[name] = torch.UntypedStorage(num_bytes), dtype.itemsize
        held, itemsize = known[name]
        if num_bytes > held.nbytes() or itemsize != dtype.itemsize:
            raise RefusedError(f"it has the storage {name[:100]} in two sizes")
        if view is not None:
            _, offset, num = view
            if not (type(offset) is type(num) is int and 0 <= offset <= offset + num <= held.nbytes() // itemsize):
                raise RefusedError(f"it has a part of the storage {name[:100]} that lies outside")
            held = held[offset * itemsize : (offset + num) * itemsize]
        return Storage(held, dtype)

    machine = Machine(storage_of)
    if machine.run(start) != MAGIC or machine.run(start) != PROTOCOL:
        raise RefusedError("it does not begin as one")
    system = machine.run(start)
    if not isinstance(system, dict) or system.get("little_endian", True) is not True:
        raise RefusedError("its numbers are those of a big-endian machine; save it anew on another")
    held, names = machine.run(start), machine.run(start)
    if not isinstance(names, list) or {*map(str, names)} != known.keys() or len(names) != len(known):
        raise RefusedError("it has other storages than its tensors need")
    file.seek(start.tell())
    for name in names:
        storage, itemsize = known[name]
        if int.from_bytes(file.read(8), "little") * itemsize != storage.nbytes():
            raise RefusedError(f"it claims {storage.nbytes():,} bytes for the storage {name[:100]}, and has others")
        if file.readinto(_bytes(storage)) != storage.nbytes():
            raise RefusedError(f"it ends within the storage {name[:100]}")
    return held


def _saved(saved: Any, num: int) -> tuple[torch.dtype | None, str, int, Any]:
    """What a persistent id says: type, name and bytes of a storage, and which part of it."""
    if type(saved) is not tuple or len(saved) not in (5, num) or saved[0] != "storage":
        raise RefusedError("it has something else where storages are named")
    _, kind, name, _, numel, *view = saved
    if type(kind) is not Name or (kind.name != UNTYPED and kind.name not in STORAGES):
        raise RefusedError("it has a storage of a type that is not known")
    if type(name) is not str or type(numel) is not int or numel < 0:
        raise RefusedError("it has a storage without a name and a size")
    dtype = STORAGES.get(kind.name)
    return dtype, name, numel * (1 if dtype is None else dtype.itemsize), view[0] if view else None
