"""The images of a run: loaded, and told from others, so that a run goes on with those that it was begun with.

state/images.json    how many images each split has, and their digests
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safefolder
from vqvae import load_images
from vqvae.data import Images
from vqvae.training.options import PRESETS, Run

Facts = Mapping[str, Mapping[str, Any]]


def load_data(run: Run) -> dict[str, Images]:
    """The images of both splits."""
    options: dict[str, Any] = {"size": run.model.image_size, "channels": run.model.num_channels, "root": run.data.root}
    try:
        return {split: load_images(run.data.source, split, **options) for split in ("train", "test")}
    except ValueError as error:
        if run.codes is not None:
            text = f"the images of {run.codes} cannot be read, name them with --data.source: {error}"
            raise ValueError(text) from error
        if run.preset != "folder" or run.data.source != PRESETS["folder"].data.source:
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
