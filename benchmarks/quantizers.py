"""Every quantizer at equal steps on the embedded images: codebook usage, perplexity and distortion, with a picture.

    python benchmarks/quantizers.py                                   # all kinds at 1,024 and 16,384 codes
    python benchmarks/quantizers.py --kinds FSQ LFQ --num-codes 1024
    python benchmarks/quantizers.py --num-codes 16384 --steps 500     # goes on from what quantizers.json holds

Each kind has its defaults but for the number of codes. Encoder, decoder, likelihood, seed, batches and learning rate
are the same for all. Usage and perplexity are those of the codes of the 2,000 test images (98,000 places), means over
codebooks where a kind has several, and the least used codebook beside it. Distortion is in bits/dim; `code bits` is
what the codes of an image cost at even odds, so that kinds with more codes a place are not taken for better ones.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from vqvae import VQVAE, load_images
from vqvae.data import Images, batches
from vqvae.likelihoods import LogisticMixture
from vqvae.metrics import CodeUsage
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--num-codes", nargs="+", type=int, choices=FSQ_LEVELS, default=list(FSQ_LEVELS))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--results", type=Path, default=Path("quantizers.json"), help="kept, and not measured again")
    parser.add_argument("--output", type=Path, default=Path("quantizers.png"))
    args = parser.parse_args()
    train, test = load_images("fashion-mini", "train"), load_images("fashion-mini", "test")
    results: dict[str, list[float]] = json.loads(args.results.read_text()) if args.results.exists() else {}
    print(f"| {'kind':20} | codes | code bits | usage | least used | perplexity | bits/dim | s |\n|{'---|' * 8}")
    for num_codes in args.num_codes:
        for kind in args.kinds:
            key = f"{kind} | {num_codes} | {args.steps}"
            if key not in results:
                results[key] = measure(KINDS[kind](num_codes), train, test, args.steps, f"{kind} {num_codes}")
                args.results.write_text(json.dumps(results, indent=1))
            bits, usage, least, perplexity, distortion, seconds = results[key]
            print(
                f"| {kind:20} | {num_codes} | {bits:.0f} | {usage:.1%} | {least:.1%} | {perplexity:.0f} "
                f"| {distortion:.3f} | {seconds:.0f} |",
                flush=True,
            )
    draw(results, args)
    print(args.output)


def measure(config: Quantizer.Config, train: Images, test: Images, num_steps: int, name: str) -> list[float]:
    torch.manual_seed(0)
    likelihood = LogisticMixture.Config(num_components=5, zero_component=True)
    model = VQVAE(width=32, num_blocks=1, quantizer=config, likelihood=likelihood)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
    began = time.monotonic()
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
    seconds = time.monotonic() - began
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
    ]


def draw(results: dict[str, list[float]], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 0.32 * len(args.kinds) + 1.6), layout="constrained", sharey=True)
    titles = ("usage of the codebook", "perplexity / codes", "distortion (bits/dim)")
    height = 0.8 / len(args.num_codes)
    for position, num_codes in enumerate(args.num_codes):
        rows = [index + position * height for index in range(len(args.kinds))]
        figures = [results[f"{kind} | {num_codes} | {args.steps}"] for kind in args.kinds]
        columns = ([f[1] for f in figures], [f[3] / num_codes for f in figures], [f[4] for f in figures])
        colour = ("#4477aa", "#ddaa33")[position % 2]
        for axis, values in zip(axes, columns, strict=True):
            axis.barh(rows, values, height=height, color=colour, label=f"{num_codes} codes")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks([index + 0.4 - height / 2 for index in range(len(args.kinds))], args.kinds)
    axes[0].invert_yaxis()
    axes[0].axvline(0.9, color="#cc6677", linewidth=1)
    axes[2].set_xlim(left=0.9 * min(f[4] for f in results.values()))
    axes[2].legend(frameon=False)
    figure.savefig(args.output, dpi=110)


if __name__ == "__main__":
    main()
