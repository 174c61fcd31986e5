"""Reading a tokenized set: memory-mapped, in any order, from any number of processes.

A batch is gathered from the mapped shards without a copy of anything else, so memory is that of the rows that are
asked for, and what the operating system keeps of the files anyway.

Nothing is given of a shard before all of it was held against its checksums, and these against the index: when it is
first touched, once in each process. A shuffle touches all shards within its first batches, and so reads the set once
before it goes on at random.
"""

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from math import prod
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqvae import fingerprint
from vqvae.data.batching import index_batches
from vqvae.tokens import headers, origins
from vqvae.tokens.batch import CodeBatch, Row, as_indices, is_one
from vqvae.tokens.index import read_index
from vqvae.tokens.layout import Tokenizer, shard_name
from vqvae.tokens.plain import DamagedError, ForeignError, is_inside

# Linux allows 65,530 maps to a process, some of which are others'.
_MAX_OPEN = 50_000


class _Opened(NamedTuple):
    """What is mapped of a shard: bytes of codes, labels (none where the set has none), bytes of keys and their ends."""

    codes: memoryview
    labels: memoryview
    keys: memoryview
    ends: np.ndarray


class CodeDataset(Dataset[Any]):
    """The codes that `vqvae tokenize` wrote to a folder.

        codes = CodeDataset("codes/train")
        codes[0]                                                # (int64 "*grid", label); without labels ("*grid",)
        codes[:8].codes, codes[[5, 3]].labels                   # int64 "8 *grid", "2"; of a `CodeBatch`
        DataLoader(codes, 64, shuffle=True)                     # gives [codes, labels], or [codes]
        DataLoader(codes, 64, shuffle=True, collate_fn=codes.collate)   # gives a `CodeBatch`, and is much faster

    Shards are opened when first asked for. A copy in another process opens its own.

    Attributes:
        grid, num_codes: of the tokenizer.
        dtype: of the codes on the disk.
        num_classes, class_names: None where the set has no labels, or labels without names.
        tokenizer: its class, config, fingerprint, and the source that it was loaded from; None where that is unknown.
        source: what loads the images, if they lie where they lay when the set was made, or in the same place beside
            it; None where that is unknown.
        source_name: what to call that.
        split: of the images.
        unreadable: (key, reason) of the images that could not be read, which are no rows here.

    Raises:
        ValueError: no such folder, or one that is not whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = self._index = read_index(self.folder)
        self.grid, self.num_codes, self.dtype = index.grid, index.num_codes, index.dtype
        self.num_classes, self.class_names = index.num_classes, index.class_names
        images = origins.origin(index.source, self.folder)
        model = origins.origin(index.tokenizer["source"], self.folder)
        assert images is not None
        self.source, self.source_name, self.split = images.source, images.name, index.split
        self.tokenizer: dict[str, Any] = {**index.tokenizer, "source": None if model is None else model.source}
        self._model_name = f"a {index.tokenizer['class']}" if model is None else model.name
        self.unreadable = index.unreadable
        self._ends = np.cumsum(np.array(index.rows, np.int64))
        self._starts = self._ends - index.rows
        self._open: dict[int, _Opened] = {}
        self._sound: set[int] = set()
        row_bytes = prod(self.grid) * self.dtype.itemsize
        for shard, num in enumerate(index.rows):
            self._check_file(shard, num * row_bytes)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Row: ...  # pyrefly: ignore
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | Tensor) -> CodeBatch: ...  # pyrefly: ignore
    def __getitem__(self, index: Any) -> Any:
        """One row; of a slice, or of a list, an array or a tensor of indices, a batch of them.

        Raises:
            IndexError: a row that is not there.
            ValueError: a file that is damaged; or what are no indices.
        """
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        if is_one(index):
            return self.__getitems__([range(len(self))[index]])[0]
        chosen = as_indices(index)
        return self.__getitems__(np.where(chosen < 0, chosen + len(self), chosen))

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> CodeBatch:
        """The rows at `indices`, from 0, in that order.

        Raises:
            IndexError: one that is not there.
            ValueError: a file that is damaged, by its checksums, or as it holds what is no code; or no indices.
        """
        chosen = as_indices(indices)
        shards, rows = self._places(chosen)
        # Slices of bytes, joined: faster than rows of arrays, and as fast for rows of many shards as of one.
        size = prod(self.grid) * self.dtype.itemsize
        found = [self._shard(shard) for shard in shards.tolist()]
        starts = (rows * size).tolist()
        data = b"".join([shard.codes[at : at + size] for shard, at in zip(found, starts, strict=True)])
        codes = np.frombuffer(data, self.dtype)
        if codes.max(initial=0) >= self.num_codes:
            row = int((codes >= self.num_codes).argmax()) // prod(self.grid)
            raise self._damaged(int(shards[row]), f"holds the code {codes.max()}, expected 0 to {self.num_codes - 1}")
        codes = codes.astype(np.int64).reshape(len(chosen), *self.grid)
        labels = None
        if self.num_classes is not None:
            known = [shard.labels[row] for shard, row in zip(found, rows.tolist(), strict=True)]
            labels = torch.tensor(known, dtype=torch.int64)
        return CodeBatch(torch.from_numpy(codes), labels)

    @staticmethod
    def collate(batch: CodeBatch) -> CodeBatch:
        """For a DataLoader, whose batches are whole already."""
        return batch

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None = None,
        start: int = 0,
        epochs: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool | None = None,
    ) -> Iterator[CodeBatch]:
        """Batches in the order of `vqvae.data.batching`: shuffled without end with a seed, else one pass in order.

        Raises:
            ValueError: numbers out of range, or fewer rows than ranks with a seed.
        """
        order = index_batches(
            len(self),
            batch_size,
            seed=seed,
            start=start,
            epochs=epochs,
            rank=rank,
            world_size=world_size,
            drop_last=drop_last,
        )
        return map(self.__getitems__, order)

    def key(self, index: int) -> str:
        """What the source called the image of row `index`; bytes that are no UTF-8 as `os.fsdecode` gives them."""
        (shard,), (row,) = self._places(np.array([range(len(self))[index]]))
        found = self._shard(int(shard))
        start = int(found.ends[row - 1]) if row else 0
        return bytes(found.keys[start : int(found.ends[row])]).decode("utf-8", "surrogateescape")

    def digest(self) -> str | None:
        """32 hexadecimal digits that change where the set has other codes; None where its index has no checksums."""
        if None in self._index.checksums:
            return None
        return blake2b(repr((self._index.rows, self._index.checksums)).encode(), digest_size=16).hexdigest()

    def check_tokenizer(self, model: Tokenizer) -> None:
        """Raise ValueError unless the codes are those of `model`."""
        found = fingerprint.of_tokenizer(model)
        if found != self.tokenizer["fingerprint"]:
            of = self.tokenizer["source"] or self._model_name
            raise ValueError(
                f"the codes of {self.folder} are of another tokenizer ({of}, {self.tokenizer['fingerprint'][:12]}), "
                f"this one is {found[:12]}; load that one, or tokenize the images with this one"
            )
        if (self.num_codes, self.grid) != (model.num_codes, tuple(model.grid)):
            raise ValueError(
                f"the index of {self.folder} says {self.num_codes} codes in a grid {self.grid}, and its tokenizer has "
                f"{model.num_codes} in {tuple(model.grid)}; remove it and run `vqvae tokenize` again"
            )

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each index."""
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"got indices from {indices.min()} to {indices.max()}; expected 0 to {len(self) - 1}")
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - self._starts[shards]

    @property
    def num_shards(self) -> int:
        return self._index.num_shards

    def shard(self, shard: int) -> tuple[np.ndarray, np.ndarray | None, list[bytes]]:
        """Codes, labels and keys of one shard, as they lie on the disk.

        Raises:
            ValueError: a shard that is damaged, by its checksums too.
        """
        found = self._shard(range(self.num_shards)[shard])
        codes = np.frombuffer(found.codes, self.dtype).reshape(-1, *self.grid)
        labels = None if self.num_classes is None else np.asarray(found.labels)
        return codes, labels, self.keys(shard)

    def keys(self, shard: int) -> list[bytes]:
        """What the source called the images of one shard, in bytes: UTF-8, save for names of files that are none."""
        found = self._shard(range(self.num_shards)[shard])
        ends, text = found.ends.tolist(), bytes(found.keys)
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _shard(self, shard: int) -> _Opened:
        found = self._open.get(shard)
        if found is None:
            arrays = self._map(shard)
            if len(self._open) >= _MAX_OPEN:
                self._open.clear()
            found = self._open[shard] = _Opened(
                codes=arrays["codes"].reshape(-1).view(np.uint8).data,
                labels=arrays.get("labels", np.empty(0, np.int64)).data,
                keys=arrays["key_bytes"].data,
                ends=arrays["key_ends"],
            )
        return found

    def _map(self, shard: int) -> dict[str, np.ndarray]:
        """The arrays of one shard, mapped, and what they are by their checksums if nobody looked yet."""
        path = self._file(shard)
        try:
            is_known = shard in self._sound
            header, is_sound = headers.read_header(path, check=not is_known)
            self._check_header(shard, header)
            # numpy's and Python's own maps keep a file open each, of which a process may have 1,024; torch's does not.
            mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
        except (DamagedError, ForeignError) as error:
            raise self._damaged(shard, f"is no whole shard of codes: {error}") from error
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not is_sound:
            raise self._damaged(shard, "is damaged, its checksums differ")
        arrays = {}
        for name, (kind, shape, start) in header.tensors.items():
            dtype = headers.DTYPES[kind]
            length = prod(shape) * dtype.itemsize
            found = mapped[start : start + length].view(dtype).reshape(shape)
            arrays[name] = found if found.flags.aligned else found.copy()  # as other writers may place it
        if not is_known:
            self._check_values(shard, arrays)
            self._sound.add(shard)
        return arrays

    def _file(self, shard: int) -> Path:
        return self.folder / shard_name(shard)

    def _check_file(self, shard: int, num_bytes: int) -> None:
        """Raise ValueError where a shard is no file of the folder, or cannot hold the codes that it is to have."""
        path = self._file(shard)
        try:
            status = os.lstat(path)
            if S_ISLNK(status.st_mode):
                status = os.stat(path)
                if not is_inside(path):
                    raise self._damaged(shard, "is a link to a file outside its folder")
        except OSError as error:
            raise self._damaged(shard, "is missing") from error
        if not S_ISREG(status.st_mode):
            raise self._damaged(shard, "is no regular file")
        if status.st_size < num_bytes:
            raise self._damaged(shard, "is cut")

    def _check_header(self, shard: int, header: headers.Header) -> None:
        """Raise ValueError for the shard of something else, or of another place."""
        index = self._index
        kind, shape, _ = header.tensors["codes"]
        if (
            index.checksums[shard] not in (None, header.crc32)
            or any(header.about.get(name) != value for name, value in index.of_shard(shard).items())
            or shape != (index.rows[shard], *self.grid)
            or headers.DTYPES[kind] != self.dtype
            or ("labels" in header.tensors) != index.has_labels
        ):
            raise self._damaged(shard, f"is not the shard that the index of {self.folder} says")

    def _check_values(self, shard: int, arrays: dict[str, np.ndarray]) -> None:
        """Raise ValueError for what the writer never wrote, in a shard whose checksums somebody made fit."""
        ends, num_bytes = arrays["key_ends"], len(arrays["key_bytes"])
        if np.diff(ends, prepend=0, append=num_bytes).min() < 0 or (len(ends) and ends[-1] != num_bytes):
            raise self._damaged(shard, "has keys that do not follow one another")
        for name, most in (("codes", self.num_codes - 1), ("labels", (self.num_classes or 1) - 1)):
            found = arrays.get(name, np.empty(0, np.int64))
            low = found.min(initial=0) if found.dtype.kind == "i" else 0
            if low < 0 or found.max(initial=0) > most:
                wrong = low if low < 0 else found.max()
                raise self._damaged(shard, f"holds the {name[:-1]} {wrong}, expected 0 to {most}")

    def _damaged(self, shard: int, what: str) -> ValueError:
        return ValueError(f"{self._file(shard)} {what}; run `vqvae tokenize` again to mend it")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_sound": set()}


def check_same_origin(train: CodeDataset, test: CodeDataset) -> None:
    """Raise ValueError unless two parts of one set are of the same tokenizer, source and classes."""
    ours, theirs = (origins.Origin(each.source_name, each.source) for each in (train, test))
    found: list[tuple[str, Any, Any, bool | None]] = [
        ("tokenizers", *(each.tokenizer["fingerprint"][:12] for each in (train, test)), None),
        ("sources", ours.source or ours.name, theirs.source or theirs.name, origins.same(ours, theirs)),
        ("numbers of classes", train.num_classes, test.num_classes, None),
        ("classes", train.class_names, test.class_names, None),
    ]
    for what, mine, other, is_same in found:
        if not (mine == other if is_same is None else is_same):
            raise ValueError(
                f"{train.folder} and {test.folder} are of different {what} ({_short(mine)} and {_short(other)}); "
                "expected two parts of one set: tokenize both of one source with one tokenizer. If they are, and the "
                "source was moved between, remove their index.json and run `vqvae tokenize` again"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."
