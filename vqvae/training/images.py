"""The images of a run: loaded, described, and told from others, so that a run goes on with those it was begun with.

state/images.json    how many images each split has, and their digests
cache/               shrunk copies of large training images, which may be removed at any time (`vqvae.data.cache`)
"""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safefolder
from vqvae import load_images
from vqvae.data import Images
from vqvae.data.cache import Cache
from vqvae.data.survey import Survey, same_pictures, survey
from vqvae.training.options import Run
from vqvae.training.presets import PRESETS

Facts = Mapping[str, Mapping[str, Any]]
# Images fewer than which are called very few: a model learns them by heart, and figures of so few tell little.
FEW_TRAINING, FEW_TEST = 100, 10
# Names in one note.
_NAMED = 3


def load_data(run: Run) -> dict[str, Images]:
    """The images of both splits."""
    options: dict[str, Any] = {"size": run.model.image_size, "channels": run.model.num_channels, "root": run.data.root}
    try:
        return {split: load_images(run.data.source, split, **options) for split in ("train", "test")}
    except ValueError as error:
        if run.codes is not None:
            text = f"the images of {run.codes} cannot be read, name them with --data.source: {error}"
            raise ValueError(text) from error
        if run.data.source != PRESETS["folder"].data.source:  # which stands for the user's own
            raise
        raise ValueError(f"{error}; name your images with --data.source") from error


def facts_of(data: Mapping[str, Images]) -> dict[str, dict[str, Any]]:
    """What tells the images of each split from others: how many, and digests with and without times of change.

    Raises:
        ValueError: one that is not there any more.
    """
    found = {}
    for split, images in data.items():
        everything = range(len(images))
        try:
            digests = {"digest": images.digest(everything), "timeless": images.digest(everything, times=False)}
        except OSError as error:
            raise ValueError(f"{error.filename} of {images.name} cannot be read: {error.strerror}") from error
        found[split] = {"images": len(images), **digests}
    return found


def _path(run: Run) -> Path:
    return run.run / "state" / "images.json"


def known_facts(run: Run) -> dict[str, Any]:
    """`facts_of` the images that the run was begun with; empty of a run that is new, or older than that file."""
    return safefolder.tensors.read_json(_path(run)) if _path(run).is_file() else {}


def save_facts(run: Run, facts: Facts) -> None:
    """Note them, beside those of other splits."""
    if facts:
        safefolder.files.write_text(_path(run), json.dumps({**known_facts(run), **facts}, indent=2) + "\n")


def check_images(run: Run, facts: Facts) -> str:
    """A note where files of the run's images were written again since it began, as it seems the same; else nothing.

    Raises:
        ValueError: the images are others than those that the run was begun with.
    """
    again = []
    for split, known in known_facts(run).items():
        new = facts.get(split)
        if new is None or not isinstance(known, dict) or known.get("digest") == new["digest"]:
            continue
        if known.get("timeless") != new["timeless"]:
            raise ValueError(
                f"{run.run} was begun with other {split} images than {run.data.source} has ({known.get('images')} then "
                f"and {new['images']} now, by names, labels and sizes): bring those back as they were; or train on "
                f"with these in another folder, by --tokenizer {run.run} --run NEW; or look at the run on these, by "
                f"`vqvae evaluate {run.run} --data {run.data.source}`"
            )
        again.append(split)
    if not again:
        return ""
    return (
        f"files of the {' and '.join(again)} images were written again since {run.run} was begun, under the same names "
        "and with the same sizes: they are taken for the same images, and encoded anew"
    )


def with_cache(run: Run, data: Mapping[str, Images], *, sweep: bool) -> Mapping[str, Images]:
    """The same images, of which large files of the training images are decoded once.

    Test images are read twice in a run, and need no cache.

    Args:
        sweep: remove what processes left there that were killed; for the first process of a run.
    """
    if not data or not run.data.cache:
        return data
    cache = Cache(run.run / "cache", round(1e9 * run.data.cache), say)
    if sweep:
        cache.sweep()
    return {**data, "train": data["train"].cached(cache)}


@contextlib.contextmanager
def no_cache_of_refused(run: Run, is_begun: Callable[[], bool]) -> Iterator[None]:
    """Of what is refused before the run goes on, no cache is left where there was none."""
    folder = run.run / "cache"
    was_there = folder.exists()
    try:
        yield
    except Exception:
        if not was_there and not is_begun():
            shutil.rmtree(folder, ignore_errors=True)
        raise


def say(note: str) -> None:
    """A note beside what goes on, one line."""
    print(f"note: {note}", file=sys.stderr, flush=True)


def described(run: Run, data: Mapping[str, Images]) -> tuple[str, list[str]]:
    """The images of a run in a line: how many, of what sizes at their source, and of how many classes.

    And what a person should know before a model is trained on them; nothing where all is well.
    """
    seen = {split: survey(images) for split, images in data.items()}
    train, test = data["train"], data["test"]
    classes = "no classes" if not train.num_classes else f"{train.num_classes:,} classes"
    sizes = _sizes(train, seen["train"])
    line = f"{len(train)} training and {len(test)} test images from {run.data.source}{sizes}, {classes}"
    labels = dict.fromkeys(each.label_note for each in data.values() if each.label_note)
    return line, [
        *labels,
        *_unusable(seen),
        *_few(run, len(train), len(test)),
        *([] if run.resume else _in_both(train, test)),
    ]


def _sizes(images: Images, seen: Survey) -> str:
    if seen.smallest is None or seen.largest is None:
        return ""
    (low_height, low_width), (height, width) = seen.smallest, seen.largest
    sizes = f"{width}x{height}"
    if seen.smallest != seen.largest:
        sizes = f"{low_width}x{low_height} to {sizes}"
    # Of images in memory all are of one size.
    some = images.uses_workers and seen.looked_at < len(images)
    return f", {sizes}" + (f" ({seen.looked_at:,} looked at)" if some else "")


def _unusable(seen: Mapping[str, Survey]) -> list[str]:
    found = []
    for split, each in seen.items():
        if each.unusable:
            name, why = each.unusable[0]
            of = f"{len(each.unusable):,} of {each.looked_at:,} {split} images looked at"
            found.append(f"{of} can't be read and will be left out, as {name}: {why}")
    return found


def _few(run: Run, train: int, test: int) -> list[str]:
    found = []
    if train < FEW_TRAINING:
        advice = "" if run.data.augment.is_on else "; --data.augment.crop 0.5 --data.augment.flip makes more of them"
        found.append(f"{train} training images are very few, and a model learns them by heart{advice}")
    if test < FEW_TEST:
        found.append(f"{test} test images are very few: figures of them tell little")
    return found


def _in_both(train: Images, test: Images) -> list[str]:
    pairs = same_pictures(train, test)
    if pairs is None:
        return ["pip install 'vqvae-priors[photos]' to be told of pictures that are in both splits"]
    if not pairs:
        return []
    named = ", ".join(f"{one} as {other}" for one, other in pairs[:_NAMED])
    more = ", ..." if len(pairs) > _NAMED else ""
    return [
        f"{len(pairs)} test images are among the training images too ({named}{more}): figures of them are too good, "
        "remove one of each"
    ]
