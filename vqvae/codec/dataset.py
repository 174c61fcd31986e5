"""A compressed file as a dataset of torch."""

import operator
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from vqvae.codec.archive import Archive
from vqvae.codec.codec import Codec, DecodedBlock

# Decoded blocks that are kept: enough for a reader that goes through the file, or for a batch's neighbours.
_KEPT = 4


class CompressedImages(Dataset[Any]):
    """The images of a file, decoded when they are asked for.

    An item is an image, uint8 "c h w", or a tuple of an image and its label, an int, where the file has labels. To get
    one image its block is decoded, so compress with few images a block for random access (`images_per_block=1` decodes
    nothing else), and ask for many at once: a `DataLoader` does, by `__getitems__`, and blocks that are asked for
    together are decoded together.

    A `DataLoader` makes batches of it, uint8 "b c h w" or [that, int64 "b"], with any number of workers, shuffled or
    not. Images of several shapes do not make a batch: torch's own error says so, unless it is given a `collate_fn`.

    Args:
        path: a file that this codec wrote.
        codec: the model and prior that wrote it.

    Raises:
        DamagedFile: a file that cannot be read.
        ValueError: a file of another model.
    """

    def __init__(self, path: str | Path, codec: Codec):
        self.codec = codec
        self.archive = Archive.open(path)
        codec.check_header(self.archive.header)
        self._begin()

    def _begin(self) -> None:
        self._kept: OrderedDict[int, DecodedBlock] = OrderedDict()
        self._lock, self._process = threading.Lock(), os.getpid()

    def __len__(self) -> int:
        return self.archive.num_images

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, int]:
        """One image. Raises IndexError beyond the last one, TypeError for what is no number."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Several images, of which each block is decoded once."""
        places = [self._locate(index) for index in indices]
        if self._process != os.getpid():
            # In a forked worker, which has the lock as it was: a thread that held it is not here to let it go.
            self._begin()
        with self._lock:
            blocks = self._decode({block for block, _ in places})
        return [self._item(blocks[block], within) for block, within in places]

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the file anew and keeps blocks of its own.
        return {"codec": self.codec, "archive": self.archive}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.codec, self.archive = state["codec"], state["archive"]
        self._begin()

    def _locate(self, index: int) -> tuple[int, int]:
        try:
            number = operator.index(index)
        except TypeError as error:
            raise TypeError(f"got {index!r} for an image, expected its number; for several, __getitems__") from error
        if not -len(self) <= number < len(self):
            raise IndexError(f"got image {number} of a file of {len(self)}")
        return self.archive.locate(number % len(self))

    def _decode(self, wanted: set[int]) -> dict[int, DecodedBlock]:
        missing = sorted(wanted - self._kept.keys())
        found = dict(zip(missing, self.codec.decode(self.archive, missing), strict=True))
        found |= {block: self._kept[block] for block in wanted & self._kept.keys()}
        for block, decoded in found.items():
            self._kept[block] = decoded
            self._kept.move_to_end(block)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _item(self, block: DecodedBlock, within: int) -> Tensor | tuple[Tensor, int]:
        image = block.images[within].clone()  # the block is kept, and its reader may write on what he gets
        return image if block.labels is None else (image, int(block.labels[within]))
