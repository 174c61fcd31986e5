"""Reading a tokenized set: memory-mapped, in any order, from any number of processes.

A batch is gathered from the mapped shards without a copy of anything else, so memory is that of the rows that are
asked for, and what the operating system keeps of the files anyway.

Of damage to a file, what would be no code is noticed in each batch; the rest by the checksums, when a shard is read
whole (`CodeDataset.shard`) or `vqvae tokenize` is run again. To compare them when a shard is opened would mean to read
all of a set before the first batch of a shuffle.
"""

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from vqvae import fingerprint
from vqvae.data import index_batches
from vqvae.tokens.layout import Tokenizer, code_dtype
from vqvae.tokens.shards import holds_its_bytes, read_header, read_index

# Linux allows 65,530 maps to a process, some of which are others'.
_MAX_OPEN = 50_000


class CodeBatch(NamedTuple):
    """Codes with what belongs to them.

    codes: int64, "b *grid".
    labels: int64, "b"; None where the set has no labels.
    """

    codes: Int64[Tensor, "b *grid"]
    labels: Int64[Tensor, " b"] | None


class _Opened(NamedTuple):
    """What is mapped of a shard: bytes of codes, labels (none where the set has none), bytes of keys and their ends."""

    codes: memoryview
    labels: memoryview
    keys: memoryview
    ends: np.ndarray


class CodeDataset(Dataset):
    """The codes that `vqvae tokenize` wrote to a folder.

        codes = CodeDataset("codes/train")
        codes[0]                                                # (int64 "*grid", label or None)
        codes.__getitems__([5, 3]).codes                        # int64 "2 *grid"
        DataLoader(codes, 64, shuffle=True, collate_fn=codes.collate)

    Shards are opened when first asked for. A copy in another process opens its own.

    Attributes:
        grid, num_codes: of the tokenizer.
        dtype: of the codes on the disk.
        num_classes, class_names: None where the set has no labels, or labels without names.
        tokenizer: its class, config, fingerprint, and the source that it was loaded from.
        source, split: of the images.
        unreadable: (key, reason) of the images that could not be read, which are no rows here.

    Raises:
        ValueError: no such folder, or one that is not whole.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = read_index(self.folder)
        try:
            self.grid = tuple(int(length) for length in index["grid"])
            self.num_codes = int(index["num_codes"])
            self.num_classes: int | None = index["num_classes"]
            self.class_names = None if index["class_names"] is None else tuple(index["class_names"])
            self.tokenizer: dict[str, Any] = dict(index["tokenizer"])
            self.source: str = index["source"]
            self.split: str = index["split"]
            self.unreadable = tuple((each["key"], each["reason"]) for each in index["unreadable"])
            self.dtype = np.dtype(index["dtype"])
            self._files = [str(shard["file"]) for shard in index["shards"]]
            rows = np.array([shard["rows"] for shard in index["shards"]], np.int64)
            fits = sum(rows) == index["num_rows"] and self.dtype == code_dtype(self.num_codes)
            if not fits or "fingerprint" not in self.tokenizer or (rows < 0).any():
                raise ValueError("its numbers contradict each other")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"the index of {self.folder} is damaged ({error}); remove it and run `vqvae tokenize` again"
            ) from error
        self._ends = np.cumsum(rows)
        self._starts = self._ends - rows
        self._open: dict[int, _Opened] = {}
        row_bytes = prod(self.grid) * self.dtype.itemsize
        for name, num in zip(self._files, rows.tolist(), strict=True):
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < num * row_bytes:
                raise ValueError(
                    f"{path} is {'cut' if path.is_file() else 'missing'}; run `vqvae tokenize` again to mend it"
                )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> tuple[Int64[Tensor, "*grid"], int | None]:
        batch = self.__getitems__([range(len(self))[index]])
        return batch.codes[0], None if batch.labels is None else int(batch.labels[0])

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> CodeBatch:
        """The rows at `indices`, in that order.

        Raises:
            IndexError: one that is not there.
            ValueError: a file that is damaged, as it holds what is no code.
        """
        chosen = np.asarray(indices, np.int64)
        shards, rows = self._places(chosen)
        # Slices of bytes, joined: twice as fast as rows of arrays, and as fast for rows of many shards as of one.
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
        """Batches in the order of `vqvae.data.batches`: shuffled without end with a seed, else one pass in order.

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

    def check_tokenizer(self, model: Tokenizer) -> None:
        """Raise ValueError unless the codes are those of `model`."""
        found = fingerprint.of_tokenizer(model)
        if found != self.tokenizer["fingerprint"]:
            of = self.tokenizer.get("source") or f"a {self.tokenizer.get('class')}"
            raise ValueError(
                f"the codes of {self.folder} are of another tokenizer ({of}, {self.tokenizer['fingerprint'][:12]}), "
                f"this one is {found[:12]}; load that one, or tokenize the images with this one"
            )

    def _places(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and row of each index."""
        if len(indices) and (indices.min() < 0 or indices.max() >= len(self)):
            raise IndexError(f"got indices from {indices.min()} to {indices.max()}; expected 0 to {len(self) - 1}")
        shards = np.searchsorted(self._ends, indices, side="right")
        return shards, indices - self._starts[shards]

    @property
    def num_shards(self) -> int:
        return len(self._files)

    def shard(self, shard: int) -> tuple[np.ndarray, np.ndarray | None, list[bytes]]:
        """Codes, labels and keys of one shard, as they lie on the disk.

        Raises:
            ValueError: a shard that is damaged, by its checksums too.
        """
        arrays = self._map(shard)
        path = self.folder / self._files[shard]
        try:
            sound = holds_its_bytes(path, read_header(path))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not sound:
            raise self._damaged(shard, "is damaged, its checksums differ")
        return arrays["codes"], arrays.get("labels"), self.keys(shard)

    def _shard(self, shard: int) -> _Opened:
        found = self._open.get(shard)
        if found is None:
            if len(self._open) >= _MAX_OPEN:
                self._open.clear()
            arrays = self._map(shard)
            found = self._open[shard] = _Opened(
                codes=arrays["codes"].reshape(-1).view(np.uint8).data,
                labels=arrays.get("labels", np.empty(0, np.int64)).data,
                keys=arrays["key_bytes"].data,
                ends=arrays["key_ends"],
            )
        return found

    def keys(self, shard: int) -> list[bytes]:
        """What the source called the images of one shard, in bytes: UTF-8, save for names of files that are none."""
        found = self._shard(shard)
        ends, text = found.ends.tolist(), bytes(found.keys)
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _map(self, shard: int) -> dict[str, np.ndarray]:
        """The arrays of one shard, mapped."""
        path = self.folder / self._files[shard]
        try:
            header = read_header(path)
            # numpy's and Python's own maps keep a file open each, of which a process may have 1,024; torch's does not.
            mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        arrays = {}
        for name, (kind, shape, start) in header.tensors.items():
            dtype = np.dtype({"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I64": np.int64}[kind])
            length = prod(shape) * dtype.itemsize
            arrays[name] = mapped[start : start + length].view(dtype).reshape(shape)
        rows = int(self._ends[shard] - self._starts[shard])
        if (
            arrays["codes"].shape != (rows, *self.grid)
            or arrays["codes"].dtype != self.dtype
            or ("labels" in arrays) != (self.num_classes is not None)
            or header.about.get("tokenizer") != self.tokenizer["fingerprint"]
        ):
            raise self._damaged(shard, f"is not the shard that the index of {self.folder} says")
        return arrays

    def _damaged(self, shard: int, what: str) -> ValueError:
        return ValueError(f"{self.folder / self._files[shard]} {what}; run `vqvae tokenize` again to mend it")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}
