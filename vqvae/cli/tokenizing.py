"""Images to shards of codes: tokenize."""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from safefolder import Options
from vqvae import Autoencoder
from vqvae.cli.common import Model, Output, device_of, printable, sides_of, speed, tell
from vqvae.data import Images, load_images
from vqvae.data.own_sizes import BySize, by_size
from vqvae.tokens import CodeDataset, Tokenized, Tokenizing, TokenizingOnRay, tokenize_on_ray, write_parquet
from vqvae.tokens import tokenize as tokenize_images
from vqvae.tokens.buckets import bucket_name, is_bucket, note_unreadable, unreadable_path
from vqvae.tokens.layout import ShardSizes, not_there, plan
from vqvae.tokens.pipeline import check_workers
from vqvae.tokens.ray_session import RaySession
from vqvae.tokens.shards import check_folder
from vqvae.tokens.table import one_parquet

# Unreadable images that are named on stderr; all are in the index.
_NAMED = 10
# Pixels a side of the tiles of larger images, and bytes of those of one batch, where they come as large as they are.
_TILE = 512
_KEEP_BYTES = 1 << 26
_MAX_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class TokenizingFlags(ShardSizes):
    """How images become shards of codes."""

    split: Literal["train", "test"] | None = None
    """which part of the source; both unless given"""
    size: str = "model"
    """what images are scaled and cropped to: model (its own size), another side as 256, another height and width as
    192x256; or keep, which takes them as large as they are, in tiles, into a set for each size (OUTPUT/192x256/train),
    their sides padded to what the model divides by"""
    num_workers: int | None = None
    """processes that decode ahead; all cores but one, at most 8, unless given"""


@dataclass(frozen=True, kw_only=True)
class Engine(Options):
    """Where it is done."""

    engine: Literal["local", "ray"] = "local"
    """local is this machine; ray is a cluster, by Ray Data (extra ray): every node decodes and encodes, and needs to
    see the images at the same path, and this process writes"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ...; auto is a GPU if there is one"""
    address: str | None = None
    """of a running Ray cluster (HOST:PORT of its head node); none starts Ray here, or joins RAY_ADDRESS"""


def tokenize(
    run_or_model: Model,
    source: Annotated[str, tyro.conf.Positional],
    *,
    output: Output,
    parquet: Path | None = None,
    tokenizing: Annotated[TokenizingFlags, tyro.conf.OmitArgPrefixes] = TokenizingFlags(),
    engine: Annotated[Engine, tyro.conf.OmitArgPrefixes] = Engine(),
) -> int:
    """Encode images of any number to shards of codes.

    `vqvae.tokens.CodeDataset` and `vqvae train` read them. A run that was stopped goes on when the same command is
    given again: shards that are there are kept, and the files are in the end the same, byte for byte; if the source was
    changed since, that is refused. What is no image is left out and listed in index.json, and with --size keep what has
    no size in unreadable-train.json or unreadable-test.json beside the sets; the exit status is then 1. An image that
    cannot be read, as its disk fails or it is gone, ends the run. Under `torchrun` every process takes its share of the
    shards.

    Example: vqvae tokenize runs/fashion-mini photos -o codes

    Args:
        run_or_model: a run's folder, a tokenizer's folder, or a hub id.
        source: images: a folder, a parquet file, WebDataset archives (a .tar file, a folder of them, or
            'NAME-{0000..0012}.tar' in quotes), a Hugging Face data set (hf:OWNER/NAME), or the name of a set.
        output: the folder to write; the codes are in its folders train and test, with --size keep of each size.
        parquet: also write the codes to this file; to two, with -train and -test before the ending, for both parts. A
            file that is there is replaced if it is one of codes.
    """
    place = _Place.of_environment()
    if parquet is not None and place.world_size > 1:
        raise ValueError("--parquet is for one process; give the command once more without torchrun, to write it alone")
    _check_engine(engine, tokenizing.num_workers, place)
    split, on_ray, keeps = tokenizing.split, engine.engine == "ray", tokenizing.size == "keep"
    if keeps and parquet is not None:
        raise ValueError("--parquet is for codes of one grid; leave it out, or name a size other than keep")
    parts = (split,) if split else ("train", "test")
    # By name too: a folder on the way to it may not be there yet.
    is_same = output.is_dir() and Path(source).exists() and os.path.samefile(source, output)
    if Path(source).is_dir() and (is_same or os.path.realpath(source) == os.path.realpath(output)):
        raise ValueError(f"got {output} for the images and for the codes; name another folder with -o")
    status = 0
    with ExitStack() as stack:
        # Here, and not when all is encoded: the places are looked at, and nobody else writes there in the meantime.
        files = {} if parquet is None else {part: _parquet(parquet, part, split, output) for part in parts}
        for path in files.values():
            stack.enter_context(one_parquet(path))
        on = None if on_ray else place.device(engine.device)
        model: Any = Autoencoder.from_pretrained(run_or_model)
        if on is not None:
            model = model.to(on)
        if not keeps and tokenizing.size != "model":
            model = model.resized(sides_of(tokenizing.size, "--size"))
        sets = {part: _load(source, part, model, split, None if keeps else model.size) for part in parts}
        jobs = [_Job(part, part, images, output / part, model.size) for part, images in sets.items()]
        unusable: dict[str, tuple[tuple[str, str], ...]] = {}
        if keeps:
            found = {part: _by_size(part, images, model) for part, images in sets.items()}
            unusable = {part: each.unusable for part, each in found.items()}
            jobs = [job for part, each in found.items() for job in _jobs(part, each, output)]
            status = int(any(unusable.values()))
            _check_kept(jobs, output, parts, model, tokenizing)
        # One Ray for all, which starts if there is work for it.
        session = stack.enter_context(RaySession(engine.address)) if on_ray else None
        for job in jobs:
            part, images, sized = job.part, job.images, model if job.size == model.size else model.resized(job.size)
            with tqdm(desc=f"tokenize {job.name}", unit="img", disable=None, dynamic_ncols=True) as bar:

                def progress(done: int, total: int, bar: tqdm = bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                common: dict[str, Any] = {
                    "split": part,
                    "tokenizer_source": run_or_model,
                    "batch_size": job.batch_size(tokenizing.batch_size, keeps),
                    "shard_size": tokenizing.shard_size,
                    "tile": job.tile if tokenizing.size != "model" else None,
                }
                if on_ray:
                    kind = None if engine.device == "auto" else engine.device
                    options = TokenizingOnRay(**common, device=kind)
                    made = tokenize_on_ray(sized, images, job.folder, options, session=session, progress=progress)
                else:
                    workers = place.num_workers if tokenizing.num_workers is None else tokenizing.num_workers
                    local = Tokenizing(**common, num_workers=workers, rank=place.rank, world_size=place.world_size)
                    made = tokenize_images(sized, images, job.folder, local, progress=progress)
            _tell_unreadable(made, job.folder)
            _say(f"{job.folder}: {_told(made, images, place)}")
            status = 1 if made.unreadable else status
            if part in files:
                write_parquet(CodeDataset(output / part), files[part])
                _say(f"{files[part]}: {made.num_rows:,} rows")
        for part, images in sets.items() if keeps and place.rank == 0 else ():
            note_unreadable(output, part, unusable[part])
            if unusable[part]:
                first, path = printable(unusable[part][0][0]), unreadable_path(output, part)
                some = first if len(unusable[part]) == 1 else f"{first} and others"
                _say(f"{path}: {len(unusable[part]):,} of {len(images):,} {part} images are in no set, {some}")
    return status


def _parquet(path: Path, part: str, split: str | None, output: Path) -> Path:
    """The file of one part, which is none of the set's own."""
    if not path.name or os.path.isdir(path):
        raise ValueError(f"got --parquet {path}, which is a folder; expected the name of a file")
    path = path if split else path.with_stem(f"{path.stem}-{part}")
    if any(os.path.realpath(path.parent) == os.path.realpath(output / each) for each in ("train", "test")):
        raise ValueError(f"got --parquet {path}, which is among the files of the set itself; name another place")
    return path


def _check_engine(where: Engine, num_workers: int | None, place: "_Place") -> None:
    """ValueError for options that the engine has no use for."""
    if num_workers is not None:
        check_workers(num_workers)
    engine = where.engine
    if engine == "local" and where.address is not None:
        raise ValueError(f"got --address {where.address} without --engine ray, which it is for")
    if engine == "ray" and num_workers is not None:
        raise ValueError(f"got --num-workers {num_workers} with --engine ray, which decodes wherever a CPU is free")
    if engine == "ray" and place.world_size > 1:
        raise ValueError("--engine ray is for one process, which has the cluster do the work: leave torchrun out")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Which of how many processes this is, as torchrun says."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def of_environment(cls) -> "_Place":
        values = {}
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            text = os.environ.get(name, str(default))
            if not text.isdecimal():
                raise ValueError(f"got {name}={text!r} in the environment; expected a number, as torchrun sets it")
            values[name.lower()] = int(text)
        place = cls(**values)
        if place.rank >= place.world_size:
            raise ValueError(f"got RANK={place.rank} and WORLD_SIZE={place.world_size} in the environment")
        return place

    @property
    def num_workers(self) -> int:
        """Processes that decode, where each process of this machine leaves one core to itself."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(0, min(_MAX_WORKERS, cores // max(1, self.local_world_size) - 1))

    def device(self, name: str) -> torch.device:
        """The device of that name, each process of a machine having a GPU of its own."""
        if name in ("auto", "cuda") and torch.cuda.is_available():
            name = f"cuda:{self.local_rank % torch.cuda.device_count()}"
        device = device_of(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device


@dataclass(frozen=True)
class _Job:
    """Images of one size, and where their codes go."""

    name: str
    part: str
    images: Images
    folder: Path
    size: tuple[int, int]

    @property
    def tile(self) -> int | None:
        """Pixels a side of the tiles of images that are larger."""
        return _TILE if max(self.size) > _TILE else None

    def batch_size(self, asked: int, keeps: bool) -> int:
        """Images that are encoded at once: of large ones that come as they are, few."""
        return max(1, min(asked, _KEEP_BYTES // math.prod(self.images.shape))) if keeps else asked


def _check_kept(jobs: list[_Job], output: Path, parts: Sequence[str], model: Any, flags: TokenizingFlags) -> None:
    """Before the first size is worked on: ValueError where codes of other images or of another tokenizer lie there."""
    made = {job.folder for job in jobs}
    for part in parts:
        for folder in sorted(output.glob(f"*x*/{part}")):
            if is_bucket(folder.parent.name) and folder not in made and any(folder.iterdir()):
                raise ValueError(
                    f"{folder} holds codes of a size that no {part} image has now, as if the source had changed since: "
                    "remove it, or name another folder"
                )
    for job in jobs:
        if job.folder.is_dir():
            sized = model if job.size == model.size else model.resized(job.size)
            options = Tokenizing(
                split=job.part,
                batch_size=job.batch_size(flags.batch_size, True),
                shard_size=flags.shard_size,
                tile=job.tile,
            )
            check_folder(plan(sized, job.images, job.folder, options))


def _by_size(part: str, images: Images, model: Any) -> BySize:
    """The images by size. What is no image is named."""
    with tqdm(desc=f"sizes {part}", total=len(images), unit="img", disable=None, dynamic_ncols=True) as bar:
        try:
            found = by_size(images, multiple=model.factor, watch=bar.update)
        except OSError as error:
            raise not_there(images, error) from error
    for key, reason in found.unusable[:_NAMED]:
        tell(f"skipped {printable(key)}: {printable(reason)}")
    if len(found.unusable) > _NAMED:
        tell(f"and {len(found.unusable) - _NAMED:,} more")
    if not found.sets:
        raise ValueError(f"none of the {len(images):,} images of {images.name} can be read")
    return found


def _jobs(part: str, found: BySize, output: Path) -> list[_Job]:
    """A job for each size that images have."""
    return [
        _Job(f"{bucket_name(size)} {part}", part, some, output / bucket_name(size) / part, size)
        for size, some in found.sets.items()
    ]


def _load(source: str, part: str, model: Any, split: str | None, size: tuple[int, int] | None) -> Images:
    try:
        images = load_images(source, part, size=size, channels=model.config.num_channels)
        images.name = source  # as it loads them again, also those of the hub
        return images
    except ValueError as error:
        if split is None and part == "test":
            # The training images could be loaded.
            raise ValueError(f"the test split: {error}; for the rest alone, pass --split train") from error
        raise


def _say(text: str) -> None:
    """A line on stdout, if anybody reads it: who has heard enough takes nothing from what was done."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer would be an error again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_unreadable(made: Tokenized, folder: Path) -> None:
    for key, reason in made.unreadable[:_NAMED]:
        tell(f"skipped {printable(key)}: {printable(reason)}")
    if len(made.unreadable) > _NAMED:
        tell(f"and {len(made.unreadable) - _NAMED:,} more, all named in {folder / 'index.json'}")


def _told(made: Tokenized, images: Images, place: _Place) -> str:
    text = f"{made.num_rows:,} rows in {made.num_shards:,} shards, {len(made.unreadable):,} unreadable; "
    text += speed(made.num_images, made.seconds) if made.num_images else "all was there already"
    if images.label_note:
        text += f"; {images.label_note}"
    if not made.whole:
        text = f"rank {place.rank} of {place.world_size} made {text}; other ranks are still at work"
    return text
