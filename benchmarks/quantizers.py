"""Every quantizer at equal steps on the embedded images: codebook usage, perplexity and distortion, with a picture.

    python -m benchmarks quantizers                                   # all kinds at 1,024 and 16,384 codes
    python -m benchmarks quantizers --kinds FSQ LFQ --num-codes 1024
    python -m benchmarks quantizers --num-codes 16384 --steps 500     # goes on from what --results holds
    python -m benchmarks quantizers --images PARQUET_FOLDER --num-codes 16384 --kinds EMA VQ SimVQ IBQ FSQ LFQ BSQ

Each kind has its defaults but for the number of codes. Encoder, decoder, likelihood, seed, batches and learning rate
are the same for all. Usage and perplexity are those of the codes of the test images (98,000 positions of the embedded
ones, 640,000 of 10,000 images of 32x32), means over codebooks where a kind has several, and the least used codebook
beside it. Distortion is in bits/dim; `code bits` is what the codes of an image cost at even odds, so that kinds with
more codes a position are not taken for better ones. Of --images also PSNR, and the perceptual distance in features of
EfficientNet-Lite2, of the first 1,000.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import harness
from vqvae import VQVAE, load_images
from vqvae.data import batches
from vqvae.likelihoods import LogisticMixture, Normal
from vqvae.looks import EfficientNetLite, PerceptualDistance
from vqvae.metrics import CodeUsage, psnr
from vqvae.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    EMAVectorQuantizer,
    GroupedQuantizer,
    GumbelQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    SoftEMVectorQuantizer,
    StochasticVectorQuantizer,
    VectorQuantizer,
)

QUICK = "--steps 2 --num-codes 1024 --kinds FSQ EMA"
FSQ_LEVELS = {1024: (8, 5, 5, 5), 16384: (8, 8, 8, 6, 5)}
KINDS: dict[str, Callable[[int], Quantizer.Config]] = {
    "VQ": lambda k: VectorQuantizer.Config(num_codes=k),
    "VQ, rotation": lambda k: VectorQuantizer.Config(num_codes=k, rotation=True),
    "VQ, unit vectors": lambda k: VectorQuantizer.Config(num_codes=k, normalize=True),
    "VQ, clustered": lambda k: VectorQuantizer.Config(num_codes=k, revival="clustered"),
    "VQ, no revival": lambda k: VectorQuantizer.Config(num_codes=k, revival="off"),
    "EMA": lambda k: EMAVectorQuantizer.Config(num_codes=k),
    "EMA, clustered": lambda k: EMAVectorQuantizer.Config(num_codes=k, revival="clustered"),
    "Soft EM": lambda k: SoftEMVectorQuantizer.Config(num_codes=k),
    "Projected": lambda k: ProjectedQuantizer.Config(
        quantizer=VectorQuantizer.Config(num_codes=k, dim=8, normalize=True)
    ),
    "SimVQ": lambda k: SimVQ.Config(num_codes=k),
    "IBQ": lambda k: IBQ.Config(num_codes=k),
    "Gumbel": lambda k: GumbelQuantizer.Config(num_codes=k),
    "SQ-VAE": lambda k: StochasticVectorQuantizer.Config(num_codes=k),
    "FSQ": lambda k: FSQ.Config(levels=FSQ_LEVELS[k]),
    "LFQ": lambda k: LFQ.Config(num_bits=k.bit_length() - 1),
    "BSQ": lambda k: BSQ.Config(num_bits=k.bit_length() - 1),
    "Residual of EMA": lambda k: ResidualQuantizer.Config(quantizer=EMAVectorQuantizer.Config(num_codes=k)),
    "Grouped of EMA": lambda k: GroupedQuantizer.Config(quantizer=EMAVectorQuantizer.Config(num_codes=k, dim=32)),
    "Multi-scale of EMA": lambda k: MultiScaleQuantizer.Config(
        scales=(1, 2, 3, 4, 5, 7), quantizer=EMAVectorQuantizer.Config(num_codes=k, dim=32)
    ),
}


def main(
    kinds: tuple[str, ...] = (),
    num_codes: tuple[int, ...] = (1024, 16384),
    steps: int = 2000,
    images: str = "fashion-mini",
    results: Path = harness.OUT / "quantizers.json",
    output: Path = harness.OUT / "quantizers.png",
) -> None:
    """Train each kind with each number of codes, where --results has nothing of it yet."""
    chosen = harness.pick(KINDS, kinds)
    harness.pick({str(number): number for number in FSQ_LEVELS}, list(map(str, num_codes)))
    kept = harness.Kept(results)
    found = {}
    is_embedded = images == "fashion-mini"
    of_looks = () if is_embedded else ("PSNR", "Lite2 distance")
    table = harness.Table(
        "kind", "codes", "code bits", "usage", "least used", "perplexity", "bits/dim", "CPU s", *of_looks
    )
    for number in num_codes:
        for kind, config in chosen.items():
            key = f"{kind} | {number} | {steps} | {images} | CPU"
            each = kept.fill({key: partial(measure, config(number), steps, key, images)})[key]
            bits, usage, least, perplexity, distortion, seconds, *seen = each
            shares = (f"{usage:.1%}", f"{least:.1%}", f"{perplexity:.0f}")
            table.row(
                *(kind, number, f"{bits:.0f}", *shares, f"{distortion:.3f}", f"{seconds:.0f}"),
                *(f"{figure:.4g}" for figure in seen),
            )
            found[kind, number] = each
    draw(found, list(chosen), num_codes, output)


def measure(config: Quantizer.Config, num_steps: int, name: str, source: str) -> list[float]:
    """Code bits, usage, that of the least used codebook, perplexity, bits/dim, CPU seconds; of colours also looks."""
    train, test = load_images(source, "train"), load_images(source, "test")
    torch.manual_seed(0)
    if source == "fashion-mini":
        likelihood = LogisticMixture.Config(num_components=5, zero_component=True)
        model = VQVAE(width=32, num_blocks=1, quantizer=config, likelihood=likelihood)
    else:
        _, channels, size, _ = train[:1].images.shape
        sizes = {"image_size": size, "num_channels": channels, "width": 32, "num_blocks": 1}
        model = VQVAE(**sizes, quantizer=config, likelihood=Normal.Config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    began = time.process_time()
    stream = batches(train, 32, seed=0)
    for step in tqdm(range(num_steps), desc=name, disable=None, leave=False):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.51 + 0.49 * math.cos(math.pi * step / num_steps))
        with torch.autocast("cpu", torch.bfloat16):
            out = model(next(stream).images)
        (out.distortion.mean() / model.num_dims + sum(out.quantized.auxiliary.values())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.quantizer.update()
    seconds = time.process_time() - began
    model.eval()
    usage = CodeUsage(model.num_codes, model.quantizer.code_axes)
    nats = 0.0
    with torch.no_grad():
        for batch in batches(test, 100):
            out = model(batch.images)
            usage.add(out.quantized.codes)
            nats += out.distortion.double().sum().item()
    return [
        math.prod(model.grid) * math.log2(model.num_codes),
        usage.usage,
        min(usage.usages),
        usage.perplexity,
        nats / len(test) / model.num_dims / math.log(2),
        seconds,
        *([] if source == "fashion-mini" else looks(model, test[:1000].images)),
    ]


def looks(model: VQVAE, images: torch.Tensor) -> list[float]:
    """PSNR, and the perceptual distance in features of EfficientNet-Lite2."""
    reconstructions = torch.cat([model.reconstruct(part) for part in images.split(100)])
    distance = PerceptualDistance(EfficientNetLite(size=2))
    with torch.no_grad():
        pairs = zip(images.split(100), reconstructions.split(100), strict=True)
        distances = torch.cat([distance(real / 255, again / 255) for real, again in pairs])
    return [psnr(images, reconstructions).mean().item(), distances.mean().item()]


def draw(
    found: Mapping[tuple[str, int], list[float]], kinds: Sequence[str], num_codes: Sequence[int], path: Path
) -> None:
    size = (13, 0.32 * len(kinds) + 1.6)
    with harness.picture(path, 1, 3, figsize=size, layout="constrained", sharey=True) as (_, axes):
        titles = ("usage of the codebook", "perplexity / codes", "distortion (bits/dim)")
        height = 0.8 / len(num_codes)
        for position, number in enumerate(num_codes):
            rows = [index + position * height for index in range(len(kinds))]
            figures = [found[kind, number] for kind in kinds]
            columns = ([f[1] for f in figures], [f[3] / number for f in figures], [f[4] for f in figures])
            colour = ("#4477aa", "#ddaa33")[position % 2]
            for axis, values in zip(axes, columns, strict=True):
                axis.barh(rows, values, height=height, color=colour, label=f"{number} codes")
        for axis, title in zip(axes, titles, strict=True):
            axis.set_title(title)
            axis.grid(axis="x", alpha=0.3)
        axes[0].set_yticks([index + 0.4 - height / 2 for index in range(len(kinds))], kinds)
        axes[0].invert_yaxis()
        axes[0].axvline(0.9, color="#cc6677", linewidth=1)
        axes[2].set_xlim(left=0.9 * min(f[4] for f in found.values()))
        axes[2].legend(frameon=False)
