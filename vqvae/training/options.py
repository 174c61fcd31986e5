"""The options of a run, and how they are written into its folder and read again."""

import dataclasses
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import safefolder
from priors import TransformerPrior
from priors.grid import GridModel
from safefolder.options import Options
from vqvae import VQVAE, Autoencoder
from vqvae.data.augmentation import Augment
from vqvae.training.old_names import updated

Schedule = Literal["joint", "alternating"]
# Sets that `load_images` knows by name; all else is a path, or begins with "hf:".
NAMED = ("fashion-mini", "fashion-mnist", "cifar10")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """Where images come from."""

    source: str = "fashion-mini"
    """fashion-mini, fashion-mnist, cifar10, hf:owner/name, a parquet file, or a folder of either"""
    root: Path | None = None
    """folder that holds, or will hold, the files of a downloaded set"""
    num_workers: int = 0
    """processes that decode and crop image files; sets held in memory need none"""
    augment: Augment = field(default_factory=Augment)
    cache: float = 2.0
    """gigabytes for shrunk copies of large image files, in the run's cache/, so that each is decoded once; it changes
    no result, and 0 keeps none"""

    def __post_init__(self) -> None:
        if not 0 <= self.cache <= 1e6:
            raise ValueError(f"got cache={self.cache:g}; expected gigabytes, 0 for none and a million at most")


@dataclass(frozen=True, kw_only=True)
class FitConfig(Options):
    """How one model is fitted: AdamW or Muon beside it, linear warm-up, cosine decay."""

    num_steps: int
    batch_size: int = 64
    """images per batch and process"""
    accumulate: int = 1
    """batches per step, whose gradients are averaged before the optimiser moves"""
    learning_rate: float = 2e-3
    muon: float | None = None
    """learning rate of Muon for the matrices of a transformer, 0.05 is usual; unless given, and for all else, AdamW"""
    num_warmup: int = 100
    """steps until the learning rate is whole"""
    weight_decay: float = 0.01
    max_norm: float = 1.0
    """gradients longer than this are clipped to it"""
    ema: float | None = None
    """decay of a moving average of the weights, which then is what is kept; it is less in the first updates"""
    validate_every: int = 500
    save_every: int = 500
    """steps between checkpoints"""


@dataclass(frozen=True, kw_only=True)
class LooksConfig(Options):
    """What the decoder learns for the eye, beside its likelihood: terms on the reconstruction, each with a weight."""

    l1: float = 0.0
    """weight of the mean absolute error of pixels from 0 to 1"""
    perceptual: float = 0.0
    """weight of the perceptual distance; 1 is usual"""
    network: Literal["lite0", "lite2", "vgg16"] = "lite0"
    """whose features the distance is in; of vgg16 it is LPIPS. Judge with another: `vqvae evaluate --looks`"""
    adversarial: float = 0.0
    """weight of a discriminator's judgement, relative to the gradient of all other terms; 0.1 is usual"""
    start: int | None = None
    """step at which the discriminator joins in; after two fifths of all steps unless given"""
    ramp: int = 100
    """steps over which its weight then grows"""
    loss: Literal["hinge", "non-saturating"] = "hinge"
    width: int = 64
    """channels of the discriminator's first convolution"""
    num_halvings: int = 2
    """halvings after the first: a logit judges 34, 70 or 142 pixels a side for 1, 2 or 3"""
    learning_rate: float = 5e-4
    """of the discriminator"""
    augment: bool = True
    """show the discriminator images with changed colours, moved, and with a part cut out"""
    lecam: float = 0.001
    """weight of the LeCam regularisation of the discriminator, which keeps its logits near to each other"""
    r1: float = 0.0
    """weight of the squared gradient of the discriminator on images; 0 is without"""

    @property
    def has_terms(self) -> bool:
        """Whether anything is learned for the eye."""
        return bool(self.l1 or self.perceptual or self.adversarial)

    def first_step(self, num_steps: int) -> int:
        """The step at which the discriminator joins in."""
        return math.ceil(0.4 * num_steps) if self.start is None else self.start


@dataclass(frozen=True, kw_only=True)
class Run(Options):
    """Train a codebook, then a prior over its codes, and state what both are worth in bits.

    Examples: vqvae train; vqvae train --preset cifar10 --run runs/mine; vqvae train --resume. In a clone
    `python train.py` is the same.
    """

    preset: Literal["fashion-mini", "fashion-mnist", "cifar10", "folder", "photo-64", "photo-128", "photo-256"] = (
        "fashion-mini"
    )
    """the values that all other options start from"""
    run: Path = Path("runs")
    """folder of the run; runs/PRESET unless named"""
    stage: Literal["all", "codebook", "prior", "evaluate"] = "all"
    resume: bool = False
    """go on with the run in the folder, with its own options"""
    seed: int = 0
    latents: Literal["codes", "gaussian"] = "codes"
    """codes of a quantizer (VQ-VAE), or real vectors by the reparameterisation trick (VAE)"""
    quantizer: str = "EMAVectorQuantizer"
    """kind of --model.quantizer; a kind inside another after a slash: FSQ, ResidualQuantizer/FSQ, ..."""
    likelihood: Literal["LogisticMixture", "LocalContext", "Categorical", "Normal"] = "LogisticMixture"
    """kind of --model.likelihood"""
    schedule: Schedule = "joint"
    """how model and prior learn where --model.beta puts a prior in the loop of codes: at once, or in turns"""
    prior_kind: Literal["Transformer", "AnyOrder", "DepthTransformer", "NextScale", "PixelCNN", "Llama"] = "Transformer"
    """kind of --prior; DepthTransformer is for residual and grouped codes, NextScale for multi-scale ones, Llama for
    codes that other software is to sample"""
    draft: Literal["auto", "yes", "no"] = "auto"
    """fit a small head beside the prior that proposes its next codes, so that it samples the same in fewer passes;
    auto is for priors in raster order of 16 million weights and more, for which it pays"""
    live: bool = False
    """encode each batch anew while the prior trains, in place of once before: for sets whose codes do not fit in
    memory, and for stochastic encoders, whose draws then never repeat"""
    tokenizer: str | None = None
    """a run or a saved model (folder or hub id) in place of fresh weights: --stage codebook trains it on, --stage prior
    takes it as it is; the model's options start from its own"""
    codes: Path | None = None
    """a folder that `vqvae tokenize` wrote: --stage prior trains on it and looks at no image; the tokenizer is the
    run's or --tokenizer, else the one that the folder names"""
    labels: bool = True
    """condition the prior on classes where the images have them (their ln(num_classes) nats are counted in the rate)"""
    train: Literal["all", "decoder"] = "all"
    """which weights of the model learn; decoder leaves the codes of --tokenizer what they are, and with them its
    priors, tokenized sets and files of codes"""
    data: DataConfig = field(default_factory=DataConfig)
    looks: LooksConfig = field(default_factory=LooksConfig)
    model: Autoencoder.Config = field(default_factory=VQVAE.Config)
    prior: GridModel.Config = field(default_factory=TransformerPrior.Config)
    codebook_fit: FitConfig
    prior_fit: FitConfig
    logger: Literal["tensorboard", "wandb"] = "tensorboard"
    """where figures and pictures go beside the run's folder, which has them as TensorBoard events in any case: nowhere
    else, or to Weights & Biases (extra `wandb`)"""
    time_budget: str | None = None
    """how long the whole may take, as 90s, 20m or 1.5h: some steps are timed first, and the numbers of steps are set so
    that the stages keep their proportions"""
    test_images: int | None = None
    """test images by which the finished run is evaluated, the first so many; all unless given. The results say how
    many there were"""
    accelerator: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is a GPU, else cpu"""
    devices: str = "auto"
    """number of devices (processes, on a CPU); auto is all GPUs, or one process on the CPU"""
    strategy: str = "auto"
    """auto, ddp, ...: see Lightning Fabric; fsdp shares out the weights of a prior too large for one device"""
    num_nodes: int = 1
    precision: str = "auto"
    """32-true, bf16-mixed, ...; auto is bf16-mixed where the hardware has bfloat16, else 32-true"""
    compile: bool = False
    """compile encoder, decoder and the prior's trunk by torch.compile, which takes a minute or two of its own"""
    checkpointing: bool = False
    """compute what the tokenizer's networks would keep for the backward pass again: less memory, a third more time; of
    a prior it is --prior.checkpointing"""


def go_on(run: Run) -> str:
    """The command that goes on with a run, as this program was called."""
    program = "python train.py" if program_name() == "train.py" else "vqvae train"
    # Weights that are shared out are a prior's, and a run that is resumed goes on with all its stages.
    stage = " --stage prior" if run.strategy.startswith("fsdp") else ""
    return f"{program} --resume{stage} --run {shlex.quote(str(run.run))}"


def program_name() -> str:
    """What this program was called as."""
    name = Path(sys.argv[0]).name
    return name if name == "train.py" else "vqvae train"


def load_run(folder: Path) -> Run:
    """The options of the run in a folder."""
    path = folder / "state" / "run.json"
    if not path.is_file():
        raise ValueError(f"there is no {path}: {folder} holds no run to go on with")
    try:
        plain = updated(safefolder.tensors.read_json(path))
        return Run.from_plain({**plain, "run": folder, "resume": False})
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a run of this version: {error}") from error


def save_run(run: Run) -> None:
    """Write the options into the run's folder, with paths as they are from anywhere."""
    data = dataclasses.replace(
        run.data, source=_anywhere(run.data.source), root=run.data.root and run.data.root.absolute()
    )
    tokenizer = run.tokenizer and (os.path.abspath(run.tokenizer) if Path(run.tokenizer).exists() else run.tokenizer)
    if run.looks.adversarial:  # where the discriminator joined in stays, however many steps a resumed run has
        looks = dataclasses.replace(run.looks, start=run.looks.first_step(run.codebook_fit.num_steps))
        run = dataclasses.replace(run, looks=looks)
    run = dataclasses.replace(run, data=data, tokenizer=tokenizer, codes=run.codes and run.codes.absolute())
    safefolder.files.write_text(run.run / "state" / "run.json", json.dumps(run.to_plain(), indent=2) + "\n")


def _anywhere(source: str) -> str:
    """A source of images as it is called from any folder: a path becomes an absolute one."""
    kind, name = ("hf:", source.removeprefix("hf:")) if source.startswith("hf:") else ("", source)
    is_path = Path(name).exists() if kind else source not in NAMED
    return kind + os.path.abspath(os.path.expanduser(name)) if is_path else source
