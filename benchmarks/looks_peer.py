"""Training for the eye beside diffusers' VQGAN recipe: as many parameters and CPU seconds, judged alike, and its speed.

    python -m benchmarks looks_peer /usr/share/backgrounds --steps 250
    python -m benchmarks looks_peer /usr/share/backgrounds --steps 250 --peers recipe

Patches, our network, terms and figures are those of `looks`; `vqgan_recipe` states the recipe. Ours trains for --steps
on one thread; the peer for as many CPU seconds of its process, imports and reading included: by the recipe as it is,
with errors of features scaled, and with a learning rate nearer to ours besides. It trains in whichever of float32,
bfloat16 and channels last is fastest in the rounds, ours as the command line does.

A step is one batch, and so is a step of the peer's, but every second one trains its discriminator alone. Rounds take
two steps each, the peer's one of each kind.
"""

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import Positional

from benchmarks import harness, looks
from benchmarks.vqgan_recipe import SETTINGS, Peer, tokenized
from vqvae import VQVAE
from vqvae.data import batches, load_images
from vqvae.looks import EfficientNetLite, LooksMeter
from vqvae.metrics import CodeUsage

QUICK = "--peers recipe --steps 2 --batch 4 --rounds 1 --num 20"
NUM_CODES = 1024  # of `looks.MODEL`
# The peer's learning rates, and whether errors of features are scaled.
PEERS = {"recipe": (1e-4, False), "scaled": (1e-4, True), "scaled, 1e-3": (1e-3, True)}


def ours_options(system: str, data: Path, steps: int, batch: int, seed: int) -> list[object]:
    """Those of `train.py`."""
    length = ("--codebook-fit.num-steps", steps, "--codebook-fit.validate-every", steps)
    more = ("--codebook-fit.batch-size", batch, "--seed", seed)
    return [*looks.MODEL, *looks.SYSTEMS[system], "--data.source", data.absolute(), *length, *more]


def our_step(options: list[object]) -> Callable[[Tensor], float]:
    """A step as `train.py` takes it with these options."""
    from vqvae.training.devices import make_fabric
    from vqvae.training.images import load_data
    from vqvae.training.learner import Learner
    from vqvae.training.objectives import codebook_objective
    from vqvae.training.parsing import parse

    run = parse(list(map(str, options)))
    learner = Learner(make_fabric(run), codebook_objective(run, run.model.build(), load_data(run)), run.codebook_fit)
    learner.objective.train()

    def step(images: Tensor) -> float:
        terms = learner.module(images, None)
        learner.fabric.backward(terms["objective"])
        learner.clip(run.codebook_fit.max_norm)
        learner.step()
        learner.step_rival()
        return terms["objective"].item()

    return step


def speeds(data: str, system: str, batch: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of two steps in each round: of ours without and with its discriminator, of the peer in every setting."""
    images = next(batches(load_images(data, "train", size=looks.SIDE, channels=3), batch, seed=0)).images
    options = ours_options(system, Path(data), 1000, batch, 0)
    steps = {"ours": our_step([*options, "--looks.start", 10**6])}
    if system == "adversarial":
        steps["ours, discriminator in"] = our_step([*options, "--looks.start", 0])
    steps |= {setting: Peer(*PEERS["recipe"], setting, NUM_CODES).step for setting in SETTINGS}

    def two(step: Callable[[Tensor], float]) -> float:
        return harness.timed(lambda: (step(images), step(images))).counted

    for step in steps.values():
        two(step)  # what is allocated and chosen once
    return harness.interleaved({name: partial(two, step) for name, step in steps.items()}, rounds)


def train_ours(run: Path, options: list[object], steps: int) -> list[float]:
    """Steps and CPU seconds."""
    shutil.rmtree(run, ignore_errors=True)  # what was interrupted, whose seconds nobody knows
    return [steps, harness.train(run, *options).cpu]


def train_peer(data: str, folder: str, seconds: float, name: str, setting: str, batch: int, seed: int) -> list[float]:
    """Steps of both of its networks, and CPU seconds of this process, whose first so many are for training."""
    torch.manual_seed(seed)
    peer = Peer(*PEERS[name], setting, NUM_CODES)
    for found in batches(load_images(data, "train", size=looks.SIDE, channels=3), batch, seed=seed):
        peer.step(found.images)
        if peer.num_steps > 1 and time.process_time() >= seconds:
            break
    peer.model.to(memory_format=torch.contiguous_format).save_pretrained(folder)
    return [peer.num_steps, time.process_time()]


def tokenizer(folder: Path) -> tuple[Any, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """The model in a folder, ours or the peer's, and what gives codes and reconstructions by it."""
    if (folder / "codebook").exists():
        ours = VQVAE.from_pretrained(folder / "codebook").eval()
        return ours, lambda images: (ours.encode(images), ours.reconstruct(images))
    from diffusers import VQModel

    peer: Any = VQModel.from_pretrained(folder, low_cpu_mem_usage=False)
    return peer, partial(tokenized, peer.eval())


def judge(run: Path, data: Path, num: int | None) -> list[float]:
    """Parameters without the codebook, usage, and the figures of `looks`, of the first test patches or all."""
    model, seen = tokenizer(run)
    meter, usage = LooksMeter([EfficientNetLite(size=2)]), CodeUsage(NUM_CODES)
    for images in harness.images(str(data), "test", num, size=looks.SIDE, channels=3).split(50):
        codes, reconstructions = seen(images)
        usage.add(codes)
        meter.add(images, reconstructions)
    found = meter.looks().reconstructions
    size = sum(each.numel() for name, each in model.named_parameters() if not name.startswith("quantize"))
    return [size, usage.usage, *(found[figure].value for figure in looks.FIGURES)]


def main(
    photographs: Positional[Path],
    steps: int = 250,
    system: Literal["perceptual", "adversarial"] = "adversarial",
    peers: tuple[str, ...] = (),
    batch: int = 32,
    rounds: int = 5,
    seed: int = 0,
    num: int | None = None,
    output: Path = harness.OUT / "looks_peer",
) -> None:
    """Time the steps of both, train ours, then the peer in each of its forms, and judge; what is kept is not redone.

    Args:
        system: which terms ours has, see `looks`
        peers: forms of the peer; all unless given
        num: test patches to judge by; all unless given
    """
    data = output / "patches"
    if not (data / "done").exists():
        looks.cut(photographs, data)
    kept = harness.Kept(output / "results.json")

    def once(key: str, job: Callable[..., Any], *arguments: Any) -> Any:
        return kept.fill({key: partial(job, *arguments)})[key]

    key = f"speeds | {system} | {batch} | {rounds}"
    found = once(key, harness.in_child, speeds, data.absolute(), system, batch, rounds)
    whole = [name for name in found if name.startswith("ours")][-1]
    table = harness.Table("two steps", "images/s", f"{whole}: so many times as fast")
    for name, seconds in found.items():
        table.row(name, f"{2 * batch / statistics.median(seconds):.1f}", f"{harness.ratio(seconds, found[whole]):.2f}")
    print()

    words = f"{system}-{steps}-{batch}-{seed}"
    run = output / words
    spent = once(f"trained | {words}", train_ours, run, ours_options(system, data, steps, batch, seed), steps)
    systems = {f"ours, {system}": (run, spent)}
    setting = min(SETTINGS, key=lambda name: statistics.median(found[name]))
    for name in harness.pick(PEERS, peers):
        run = output / f"{words}-{name.replace(', ', '-')}"
        arguments = (data.absolute(), run.absolute(), spent[1], name, setting, batch, seed)
        systems[f"peer, {name}"] = run, once(f"trained | {run.name}", harness.in_child, train_peer, *arguments)
    print(f"the peer trains in {setting.partition(', ')[2]}\n")
    heads = ("parameters, no codebook", "steps", "CPU s", "usage", "PSNR", "Lite2 distance", "Fréchet", "kernel")
    table = harness.Table("system", *heads)
    for name, (run, (num_steps, cpu)) in systems.items():
        size, usage, *figures = once(f"judged | {run.name} | {num}", judge, run, data, num)
        cells = (f"{each:.{digits}f}" for each, digits in zip(figures, (2, 4, 1, 4), strict=True))
        table.row(name, f"{size:,}", f"{num_steps:,}", f"{cpu:.0f}", f"{usage:.1%}", *cells)

    def shown(run: Path, images: Tensor) -> Tensor:
        return tokenizer(run)[1](images)[1]

    looks.draw(data, {name: partial(shown, run) for name, (run, _) in systems.items()}, output / "looks_peer.png")
