"""Images a second from JPEG files to shards of codes, and where the time goes, as a small markdown table.

    python benchmarks/tokenizing.py [--num-images 1024] [--rounds 3] [--engines one two ray] [--models small vqgan]

JPEG files of 500x375 (quality 90) are made here of random blotches, which compress about as photographs do; they are
scaled and cropped to the model's size on the way. Networks have random weights, on which time does not depend; the
search takes longer where many codes are nearly as near, so the codebook is put where some of the images' features are.

    small    the residual networks of the preset `folder` (64x64, 16x16 codes, K = 1024)
    large    the same networks at 256x256 (64x64 codes)
    vqgan    LlamaGen's VQ-16 at 256x256 (16x16 codes, K = 16384), on a sixteenth of the images

    one      one process: a worker decodes on one core while the encoder has the other
    two      two processes, which decode for themselves and share nothing but the folder
    ray      Ray Data on two cores, started locally: decoding tasks and one encoder

Then random rows a second out of such a set, by `CodeDataset.batches`. Each process has one thread of arithmetic. Rounds
are interleaved, and medians are shown. `encoder` is the share of the time in which the encoder (transfer, networks,
search) was at work in the process that has it: the rest is what the pipeline costs. `write` is of a thread beside it.
`images/s` is of the whole machine, from the first image to the index; it leaves out the start of Python and of Ray, and
a process's first call of the encoder (Ray's encoders are processes that start within that time). `first codes` is when
the first batch came back, and `then` the images a second from there to the index: what a long set goes on at.
"""

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqvae import VQVAE
from vqvae.allocator import keep_freed_memory
from vqvae.data import image_folder
from vqvae.likelihoods import Normal
from vqvae.quantizers import EMAVectorQuantizer, VectorQuantizer
from vqvae.quantizers.codebook import CodebookQuantizer
from vqvae.tokens import CodeDataset, Encoded, Plan, Timings, finish, tokenize, tokenize_on_ray, write_shard
from vqvae.vqgan import VQGAN

MODELS = {
    "small": VQVAE.Config(image_size=64, num_channels=3, quantizer=EMAVectorQuantizer.Config(num_codes=1024, dim=32)),
    "large": VQVAE.Config(image_size=256, num_channels=3, quantizer=EMAVectorQuantizer.Config(num_codes=1024, dim=32)),
    "vqgan": VQGAN.Config(
        image_size=256,
        num_channels=3,
        channels=(128, 128, 256, 256, 512),
        num_blocks=2,
        down_attention=(4,),
        up_attention=(4,),
        latent_channels=256,
        likelihood=Normal.Config(),
        quantizer=VectorQuantizer.Config(num_codes=16384, dim=8, normalize=True, revival="off"),
    ),
}
SHARES = {"small": 1, "large": 8, "vqgan": 64}
ENGINES = ("one", "two", "ray")
BATCH_SIZE = 16


def make_images(folder: Path, num_images: int) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for number in range(num_images):
        dots = Image.fromarray(generator.integers(0, 256, (9, 12, 3), np.uint8))
        coarse = dots.resize((500, 375), Image.Resampling.BICUBIC)
        fine = generator.normal(0, 4, (375, 500, 3))
        picture = Image.fromarray((np.asarray(coarse) + fine).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:06}.jpg", quality=90)


@torch.no_grad()
def make_model(name: str, images: Path) -> VQVAE:
    """A model whose codes are features of its own, with some noise."""
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    source = image_folder(images, "train", size=model.config.image_size, channels=3)
    features = model.encoder(source[:8].images).flatten(0, 2)
    chosen = features[torch.randint(len(features), (model.num_codes,))]
    codes = chosen + 0.1 * features.std(0) * torch.randn_like(chosen)
    quantizer = model.quantizer
    assert isinstance(quantizer, CodebookQuantizer)
    quantizer.overwrite(torch.ones(model.num_codes), codes, torch.tensor(1.0))
    return model


def measure(engine: str, model_folder: Path, images: Path, output: Path, num_images: int) -> None:
    """In a process of its own: tokenize, and print what it took as JSON."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    model = VQVAE.from_pretrained(model_folder)
    size = model.config.image_size
    source = image_folder(images, "train", size=size, channels=3)
    shard_size = max(BATCH_SIZE, num_images // 8 // BATCH_SIZE * BATCH_SIZE)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "shard_size": shard_size}
    model.encode(torch.zeros(BATCH_SIZE, 3, size, size, dtype=torch.uint8))  # what a first call prepares, once
    came: list[tuple[float, int]] = []
    options["progress"] = lambda done, total: came.append((time.monotonic(), done))
    start = time.monotonic()
    if engine == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**30, logging_level=logging.ERROR)
        start = time.monotonic()
        tokenize_on_ray(model, source, output, **options)
        times = {}
    else:
        timings = Timings()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        num_workers = 1 if world_size == 1 else 0
        ranks = {"rank": rank, "world_size": world_size}
        tokenize(model, source, output, num_workers=num_workers, timings=timings, **options, **ranks)
        times = vars(timings)
    first, early = came[0]
    ends = {"start": start, "first": first, "end": time.monotonic()}
    print(json.dumps({**times, **ends, "early": early, "images": len(source)}))


def run(engine: str, name: str, scratch: Path, num_images: int) -> dict[str, float]:
    """Images a second, and the share of each part of the time in the process that encodes."""
    output = scratch / "codes"
    shutil.rmtree(output, ignore_errors=True)
    world_size = 2 if engine == "two" else 1
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        command = [sys.executable, __file__, "--measure", engine, str(scratch / name), str(scratch / f"jpeg-{name}")]
        command += [str(output), str(num_images)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
    found = []
    for process in processes:
        written, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{engine} failed on {name}: {process.args}")
        found.append(json.loads(written.decode().splitlines()[-1]))
    start, end = min(each["start"] for each in found), max(each["end"] for each in found)
    images = found[0]["images"]
    first = min(each["first"] for each in found)
    early = sum(each["early"] for each in found)
    shares = {"speed": images / (end - start), "first": first - start, "then": (images - early) / (end - first)}
    if engine != "ray":
        total = sum(each["total"] for each in found)
        parts = ("wait", "transfer", "network", "search", "blocked", "write")
        shares |= {part: sum(each[part] for each in found) / total for part in parts}
        shares["encoder"] = shares["transfer"] + shares["network"] + shares["search"]
    return shares


def read_rows(folder: Path, num_rows: int) -> tuple[float, float]:
    """Random rows of 16x16 codes a second, 1,024 at a time: of CPU time and of wall time, from warm files."""
    generator = np.random.default_rng(0)
    size = 8192
    todo = Plan(
        folder=folder,
        num_images=num_rows,
        image_shape=(3, 256, 256),
        source="random",
        split="train",
        num_classes=None,
        class_names=None,
        tokenizer={"class": "VQVAE", "config": {}, "fingerprint": "0" * 64, "source": None},
        num_codes=16384,
        grid=(16, 16),
        batch_size=size,
        shard_size=size,
        digests=("0",) * -(-num_rows // size),
    )
    for shard in range(todo.num_shards):
        images = todo.images(shard)
        codes = generator.integers(0, 16384, (len(images), 16, 16), np.int64)
        keys = tuple(map(str, images))
        write_shard(todo, shard, [Encoded(first=images.start, codes=codes, labels=None, keys=keys, skipped=())])
    finish(todo)
    codes = CodeDataset(folder)
    stream = codes.batches(1024, seed=0)
    num_batches = num_rows // 1024
    for _ in range(num_batches):  # every page once
        next(stream)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_batches):
        next(stream)
    num = 1024 * num_batches
    return num / (time.process_time() - cpu), num / (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=tuple(MODELS))
    parser.add_argument("--num-rows", type=int, default=400_000, help="of the set that is read; 0 reads none")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        engine, model, images, output, num_images = args.measure
        measure(engine, Path(model), Path(images), Path(output), int(num_images))
        return

    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name in args.models:
            make_images(scratch / f"jpeg-{name}", args.num_images // SHARES[name])
            make_model(name, scratch / f"jpeg-{name}").save_pretrained(scratch / name)
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for name in args.models:
                for engine in args.engines:
                    num_images = args.num_images // SHARES[name]
                    found.setdefault((name, engine), []).append(run(engine, name, scratch, num_images))
        found_rows = []
        if args.num_rows:
            torch.set_num_threads(1)
            found_rows = [read_rows(scratch / f"rows-{turn}", args.num_rows) for turn in range(args.rounds)]
    heads = ["model", "engine", "images/s", "first codes", "then", "transfer", "networks", "search", "encoder"]
    heads += ["waiting for images", "for the disk", "write"]
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for (name, engine), rounds in found.items():
        median = {key: statistics.median(shares[key] for shares in rounds) for key in rounds[0]}
        cells = ["–"] * 7
        if engine != "ray":
            keys = ("transfer", "network", "search", "encoder", "wait", "blocked", "write")
            cells = [f"{median[key]:.1%}" for key in keys]
        speeds = f"{median['speed']:.1f} | {median['first']:.1f} s | {median['then']:.1f}"
        print(f"| {name} | {engine} | {speeds} | {' | '.join(cells)} |")

    if args.num_rows:
        cpu, wall = (statistics.median(column) for column in zip(*found_rows, strict=True))
        speeds = f"{cpu:,.0f} a second of CPU time, {wall:,.0f} of wall"
        print(f"\nRandom rows of {args.num_rows:,}, 16x16 codes each: {speeds}")


if __name__ == "__main__":
    main()
