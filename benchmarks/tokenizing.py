"""Images a second from JPEG files to shards of codes, and where the time goes.

    python -m benchmarks tokenizing [--num-images 1024] [--rounds 3] [--engines one two ray] [--models small vqgan]

JPEG files of 500x375 (quality 90) are made here of random blotches, which compress about as photographs do; they are
scaled and cropped to the model's size on the way. Networks have random weights, on which time does not depend; the
search takes longer where many codes are nearly as near, so the codebook is put where some of the images' features are.

    small    the residual networks of the preset `folder` (64x64, 16x16 codes, K = 1024)
    large    the same networks at 256x256 (64x64 codes), on an eighth of the images
    vqgan    LlamaGen's VQ-16 at 256x256 (16x16 codes, K = 16384), on a 64th of the images

    one      one process: a worker decodes on one core while the encoder has the other
    two      two processes, which decode for themselves and share nothing but the folder
    ray      Ray Data on two cores, started locally: decoding tasks and one encoder

Each process has one thread of arithmetic; medians of interleaved rounds. `encoder` is the share of the time in which
the encoder (transfer, networks, search) was at work in the process that has it: the rest is what the pipeline costs.
`write` is of a thread beside it. `images/s` is of the whole machine, from the first image to the index; it leaves out
the start of Python and of Ray, and a process's first call of the encoder (Ray's encoders are processes that start
within that time). `first codes` is when the first batch came back, and `then` the images a second from there to the
index: what a long set goes on at.
"""

import logging
import shutil
import tempfile
import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import harness
from benchmarks.loader import make_folder
from vqvae import VQVAE
from vqvae.allocator import keep_freed_memory
from vqvae.data.folder import image_folder
from vqvae.likelihoods import Normal
from vqvae.quantizers import EMAVectorQuantizer, VectorQuantizer
from vqvae.quantizers.codebook import CodebookQuantizer
from vqvae.tokens import Tokenizing, TokenizingOnRay, tokenize, tokenize_on_ray
from vqvae.tokens.pipeline import Timings
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
BATCH_SIZE = 16
PARTS = {
    "transfer": "transfer",
    "networks": "network",
    "search": "search",
    "encoder": "encoder",
    "waiting for images": "wait",
    "for the disk": "blocked",
    "write": "write",
}
QUICK = "--num-images 64 --rounds 1 --models small --engines one two"


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
    quantizer.reset_codes(torch.ones(model.num_codes), codes, torch.tensor(1.0))
    return model


def encode(engine: str, rank: int, model_folder: str, images: str, output: str, device: str) -> dict[str, float]:
    """In a process of its own: tokenize, with the times of its parts and of its clock."""
    keep_freed_memory()  # as the command does
    model = VQVAE.from_pretrained(model_folder).to(device)
    size = model.config.image_size
    source = image_folder(images, "train", size=size, channels=3)
    shard_size = max(BATCH_SIZE, len(source) // 8 // BATCH_SIZE * BATCH_SIZE)
    options: dict[str, Any] = {"batch_size": BATCH_SIZE, "shard_size": shard_size}
    model.encode(
        torch.zeros(BATCH_SIZE, 3, size, size, dtype=torch.uint8, device=device)
    )  # what a first call prepares, once
    came: list[tuple[float, int]] = []

    def progress(done: int, total: int) -> None:
        came.append((time.monotonic(), done))

    timings = Timings()
    if engine == "ray":
        import ray

        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2**30, logging_level=logging.ERROR)
        start = time.monotonic()
        tokenize_on_ray(model, source, output, TokenizingOnRay(**options, device=device), progress=progress)
    else:
        start = time.monotonic()
        options |= {"rank": rank, "world_size": 2} if engine == "two" else {"num_workers": 1}
        tokenize(model, source, output, Tokenizing(**options), progress=progress, timings=timings)
    first, early = came[0]
    ends = {"start": start, "first": first, "end": time.monotonic()}
    return {**vars(timings), **ends, "early": early, "images": len(source)}


def run(engine: str, name: str, scratch: Path, device: str) -> dict[str, float]:
    """Images a second, and the share of each part of the time in the process that encodes."""
    output = scratch / "codes"
    shutil.rmtree(output, ignore_errors=True)
    given = (scratch / name, scratch / f"jpeg-{name}", output, device)
    ranks = range(2 if engine == "two" else 1)
    children = [harness.Child(encode, engine, rank, *given, RAY_USAGE_STATS_ENABLED="0") for rank in ranks]
    found = [child.answer() for child in children]
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


def main(
    num_images: int = 1024,
    rounds: int = 3,
    engines: tuple[Literal["one", "two", "ray"], ...] = ("one", "two", "ray"),
    models: tuple[Literal["small", "large", "vqgan"], ...] = ("small", "large", "vqgan"),
    device: harness.Device = "cpu",
) -> None:
    """Tokenize with every model and engine; --num-images are those of the small model."""
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for name in models:
            make_folder(scratch / f"jpeg-{name}", ".jpg", num_images // SHARES[name], 500, 375)
            make_model(name, scratch / f"jpeg-{name}").save_pretrained(scratch / name)
        jobs = {
            (name, engine): partial(run, engine, name, scratch, device) for name, engine in product(models, engines)
        }
        found = harness.interleaved(jobs, rounds)
    table = harness.Table("model", "engine", "images/s", "first codes", "then", *PARTS)
    for key, each in found.items():
        median = harness.medians(each)
        shares = (f"{median[part]:.1%}" if part in median else "–" for part in PARTS.values())
        table.row(*key, f"{median['speed']:.1f}", f"{median['first']:.1f} s", f"{median['then']:.1f}", *shares)
