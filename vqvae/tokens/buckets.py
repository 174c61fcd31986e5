"""Codes of images of several sizes: a tokenized set for each size, as `vqvae tokenize --size keep` writes them.

codes/192x256/train/    an ordinary tokenized set, of the images that are 192x256 once padded
codes/256x192/train/
codes/unreadable-train.json    what is no image by its header, and so has no size, as index.json of a set names others
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

import safefolder
from safefolder.messages import few_shown
from vqvae.data.batching import index_batches, num_batches
from vqvae.data.images import Images
from vqvae.data.own_sizes import by_size
from vqvae.data.permutation import Permutation
from vqvae.tokens import origins
from vqvae.tokens.batch import CodeBatch
from vqvae.tokens.dataset import CodeDataset
from vqvae.tokens.index import read_index
from vqvae.tokens.plain import DamagedError, ForeignError, loads, read_text

# Sizes that an error names.
_NAMED = 10
# Of the file of what has no size: some hundred bytes for each image.
_MAX_BYTES = 1 << 27
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def bucket_name(size: tuple[int, int]) -> str:
    """The name of the folder of a size, height and width."""
    return "x".join(map(str, size))


def is_bucket(name: str) -> bool:
    """Whether a folder is called as `bucket_name` does."""
    return _SIZE.fullmatch(name) is not None


def check_one_size(folder: Path, split: str = "train") -> None:
    """ValueError for a folder of sets by the size of their images, as `vqvae tokenize --size keep` writes."""
    sizes = sorted(map(bucket_name, sizes_in(folder, split)))
    if sizes and not (folder / split).is_dir():
        raise ValueError(
            f"{folder} holds codes of {len(sizes)} sizes, and a prior is for one: name one of them, as --codes "
            f"{folder / sizes[0]} (there are {few_shown(sizes)})"
        )


def sizes_in(folder: Path, split: str) -> list[tuple[int, int]]:
    """The sizes of which a folder holds sets, sorted; none of any other folder."""
    names = [_SIZE.fullmatch(path.name) for path in folder.glob("*x*") if (path / split).is_dir()]
    return sorted((int(match[1]), int(match[2])) for match in names if match is not None)


def of_bucket(folder: Path, split: str, images: Images, *, multiple: int) -> Images | None:
    """Of the images of a source those that the set of one size in `folder` (codes/192x256) is of, at that size.

    None where the set is no such part of them: it has all of them, however they were brought to its size, or is gone.

    Args:
        multiple: what sides are padded to.
    """
    match = _SIZE.fullmatch(folder.name)
    try:
        if match is None or read_index(folder / split).num_images >= len(images):
            return None
    except ValueError:
        return None
    return by_size(images, multiple=multiple).sets.get((int(match[1]), int(match[2])))


def unreadable_path(folder: Path, split: str) -> Path:
    """The file that names what has no size."""
    return folder / f"unreadable-{split}.json"


def note_unreadable(folder: Path, split: str, unreadable: Sequence[tuple[str, str]]) -> None:
    """Note the (key, reason) of what is no image by its header; where there is nothing, no file is left.

    Raises:
        ValueError: it can't be written.
    """
    path = unreadable_path(folder, split)
    if not unreadable:
        path.unlink(missing_ok=True)
        return
    found = [
        {"key": origins.key_without_places(key), "reason": origins.without_places(reason)} for key, reason in unreadable
    ]
    text = json.dumps({"unreadable": found}, indent=1, sort_keys=True) + "\n"
    if not path.is_file() or path.read_text(errors="replace") != text:
        safefolder.files.write_text(path, text)


class CodeBuckets(Mapping[tuple[int, int], CodeDataset]):
    """The sets of a folder by the size of their images, height and width in pixels.

        buckets = CodeBuckets("codes", "train")
        list(buckets), buckets[192, 256].grid                   # [(192, 256), (256, 192)], (24, 32)
        for batch in buckets.batches(32, seed=0):               # without end; a `CodeBatch` of one grid each
            batch.codes                                         # int64 "b *grid"

    Attributes:
        unreadable: (key, reason) of the images that could not be read, of all sizes and of none.

    Raises:
        ValueError: a folder without such sets, one that is not whole, or codes of several tokenizers. Sets of versions
            that noted the weights for one size alone are told apart by their options.
    """

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder = Path(folder)
        sizes = sizes_in(self.folder, split)
        if not sizes:
            raise ValueError(
                f"{folder} holds no codes of images of several sizes for {split!r}; expected what "
                "`vqvae tokenize --size keep` wrote, as 192x256/train"
            )
        self.sets = {size: CodeDataset(self.folder / bucket_name(size) / split) for size in sizes}
        first = next(iter(self.sets))
        self.num_codes = self.sets[first].num_codes
        for size, found in self.sets.items():
            if (by := _differ(found, self.sets[first])) is not None:
                raise ValueError(
                    f"{folder} holds codes of several tokenizers: those of {bucket_name(size)} are of another than "
                    f"those of {bucket_name(first)}, as their {by} tell: tokenize all with one, into another folder"
                )

        self.unreadable = tuple(each for found in self.sets.values() for each in found.unreadable)
        self.unreadable += _noted(unreadable_path(self.folder, split))

    def __getitem__(self, size: tuple[int, int]) -> CodeDataset:
        return self.sets[size]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.sets)

    def __len__(self) -> int:
        """How many sizes there are."""
        return len(self.sets)

    def batches(
        self, batch_size: int, *, seed: int | None = None, start: int = 0, drop_last: bool | None = None
    ) -> Iterator[CodeBatch]:
        """Batches of one grid each: with a seed shuffled without end, else one pass, size by size.

        An epoch has the batches that each set alone has in one, in an order that is a function of (seed, epoch), so
        `start=k` goes on where an uninterrupted run is after k batches.

        Args:
            drop_last: leave out what is less than a batch at the end of a set's epoch; with a seed yes unless given.

        Raises:
            ValueError: numbers out of range.
        """
        if batch_size < 1 or start < 0:
            raise ValueError(f"got batch_size={batch_size} and start={start}; expected at least 1 and 0")
        drop_last = seed is not None if drop_last is None else drop_last
        sets = [found for found in self.sets.values() if len(found)]
        counts = [num_batches(len(found), batch_size, drop_last=drop_last) for found in sets]
        ends = np.cumsum(counts)
        step = start
        while sets and (seed is not None or step < ends[-1]):
            epoch, place = divmod(step, int(ends[-1]))
            if seed is not None:
                place = int(Permutation(int(ends[-1]), (seed, epoch))(np.array([place]))[0])
            at = int(np.searchsorted(ends, place, side="right"))
            number = epoch * counts[at] + place - (int(ends[at]) - counts[at])
            order = index_batches(len(sets[at]), batch_size, seed=seed, start=number, drop_last=drop_last)
            yield sets[at].__getitems__(next(order))
            step += 1


def _noted(path: Path) -> tuple[tuple[str, str], ...]:
    """What `note_unreadable` wrote; nothing of a version before."""
    if not path.exists():
        return ()
    try:
        plain = loads(read_text(path, _MAX_BYTES))
        found = tuple((each["key"], each["reason"]) for each in plain["unreadable"])
        if not all(isinstance(text, str) for each in found for text in each):
            raise TypeError("its keys and reasons are no texts")
    except (ValueError, OSError, KeyError, TypeError, DamagedError, ForeignError) as error:
        raise ValueError(f"{path} is damaged ({error}); run `vqvae tokenize --size keep` again to mend it") from error
    return found


def _differ(one: CodeDataset, other: CodeDataset) -> str | None:
    """By what the tokenizers of two sets differ, apart from the size of images; None where they don't."""
    if _options(one) != _options(other):
        return "options"
    weights = [codes.tokenizer.get("any_size") for codes in (one, other)]
    return "weights" if None not in weights and weights[0] != weights[1] else None


def _options(codes: CodeDataset) -> tuple[object, dict[str, object]]:
    """What a set says of its tokenizer, less the size of its images."""
    options = {name: value for name, value in codes.tokenizer["config"].items() if name != "image_size"}
    return codes.tokenizer["class"], options
