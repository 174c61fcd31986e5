"""Two figures that `docs/figures.py` writes: what the package does, and who may import whom.

- overview: test images, their codes, what codes and pixels cost, and samples, of the run `runs/fashion-mini`.
- layers: the layers that `pyproject.toml` holds `vqvae` and `priors` to.
"""

import math
import tomllib
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from priors import Prior
from vqvae import VQVAE, load_images
from vqvae.cli.demo.coded import pixel_bits

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "fashion-mini"
# Of the first test images, one of each kind that is worth a look.
SHOWN = [0, 1, 2, 7, 16, 19, 20, 22, 25, 30]


@torch.no_grad()
def overview() -> Figure:
    model, prior = VQVAE.from_pretrained(RUN).eval(), Prior.from_pretrained(RUN).eval()
    images = load_images("fashion-mini", "test")[SHOWN].images
    codes = model.encode(images)
    code_bits = -prior.log_conditionals(codes).gather(-1, codes[..., None])[..., 0] / math.log(2)
    bits = pixel_bits(model, images, model.decoder(model.vectors(codes)))
    samples = model.decode(prior.sample(10, labels=torch.arange(10), generator=torch.Generator().manual_seed(1)))
    # Neighbouring numbers of codes mean nothing to each other, so colours are by chance.
    colours = torch.rand(model.num_codes, 3, generator=torch.Generator().manual_seed(0)) * 0.85 + 0.1
    rows: list[tuple[str, Tensor, dict[str, Any]]] = [
        ("images", images[:, 0], {"cmap": "gray"}),
        (f"their codes,\n{codes[0].numel()} of {model.num_codes}", colours[codes], {}),
        (f"bits of each code\nmean {code_bits.flatten(1).sum(1).mean():.0f} an image", code_bits, {"cmap": "magma"}),
        ("decoded", model.decode(codes)[:, 0], {"cmap": "gray"}),
        (f"bits of each pixel\nmean {bits.flatten(1).sum(1).mean():.0f} an image", bits[:, 0], {"cmap": "magma"}),
        ("codes drawn from\nthe prior, decoded", samples[:, 0], {"cmap": "gray"}),
    ]
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.01, wspace=0, hspace=0)  # pyrefly: ignore
    for axes, (title, pictures, look) in zip(figure.subplots(len(rows), len(SHOWN)), rows, strict=True):
        high = {"vmin": 0, "vmax": 255 if look.get("cmap") == "gray" else pictures.max().item()}
        for each, picture in zip(axes, pictures, strict=True):
            each.imshow(picture.numpy(), **look, **high)
            each.set(xticks=[], yticks=[])
            for line in each.spines.values():
                line.set_visible(False)
        axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9)
    return figure


BLUE, RED, GREEN, GREY = "#dce7f3", "#f6dfe2", "#dff0e2", "#eeeeee"
# Of `vqvae`, what stands beside the layers and is used by all who like.
APART = ["data", "metrics", "pictures", "exits"]


def contracts() -> dict[str, list[list[str]]]:
    """The layers of each package, from the top, as `pyproject.toml` states them."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    layers = {contract["containers"][0]: contract["layers"] for contract in found if contract["type"] == "layers"}
    return {name: [[each.strip() for each in layer.split("|")] for layer in every] for name, every in layers.items()}


def layers() -> Figure:
    found = contracts()
    figure = Figure(figsize=(9.6, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10), ylim=(0, 10.2), xticks=[], yticks=[])
    axes.axis("off")

    def box(
        left: float,
        bottom: float,
        width: float,
        height: float,
        text: str,
        colour: str,
        fontsize: float = 8,
        **font: Any,
    ) -> None:
        axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="white", linewidth=2))
        axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=fontsize, **font)

    def column(name: str, left: float, width: float, colour: str) -> None:
        most, gap = int(width) + 1, 0.1
        split = [[layer[at : at + most] for at in range(0, len(layer), most)] for layer in found[name]]
        height = (8.9 - 0.9 - gap * (len(split) - 1)) / sum(len(rows) for rows in split)
        top = 8.9
        for rows in split:
            for row in rows:
                letters, at = sum(len(module) + 4 for module in row), left
                for module in row:
                    each = width * (len(module) + 4) / letters
                    box(at, top - height, each, height, module, colour, fontsize=7.5)
                    at += each
                top -= height
            top -= gap

    box(0, 9.6, 10, 0.6, "train.py: the door to vqvae.training, which alone knows Fabric and loggers", GREY)
    axes.text(2.55, 9.25, "vqvae", ha="center", va="center", fontsize=10, weight="bold")
    axes.text(7.9, 9.25, "priors", ha="center", va="center", fontsize=10, weight="bold")
    column("vqvae", 0, 5.1, BLUE)
    for at, module in enumerate(APART):
        box(5.2, 8.9 - (at + 1) * 2, 0.6, 2, module, BLUE, rotation=90)
    column("priors", 5.9, 4.1, RED)
    box(0, 0, 10, 0.8, "safefolder: folders of config and weights, whole or not at all; knows neither", GREEN)
    return figure
