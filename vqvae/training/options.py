"""The options of a run, the presets that they start from, and how the command line changes them."""

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

import safefolder
from priors import TransformerPrior
from priors.grid import GridModel
from safefolder.configured import ConfiguredOptions, option_sentences
from safefolder.options import Options, is_given, option_fields
from vqvae import VQVAE, Autoencoder, GaussianVAE, exits
from vqvae.data.augmentation import Augment
from vqvae.likelihoods import LogisticMixture
from vqvae.quantizers import EMAVectorQuantizer
from vqvae.tokens import CodeDataset
from vqvae.training.model_kinds import LATENTS, LIKELIHOODS, quantizer_name, quantizer_named, with_latents
from vqvae.training.old_names import updated
from vqvae.training.prior_kinds import PRIOR_KINDS, kind_of, with_kind

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
        if self.cache < 0:
            raise ValueError(f"got cache={self.cache:g}; expected gigabytes, 0 for none")


@dataclass(frozen=True, kw_only=True)
class FitConfig(Options):
    """How one model is fitted: AdamW, linear warm-up, cosine decay."""

    num_steps: int
    batch_size: int = 64
    """images per batch and process"""
    accumulate: int = 1
    """batches per step, whose gradients are averaged before the optimiser moves"""
    learning_rate: float = 2e-3
    num_warmup: int = 100
    """steps until the learning rate is whole"""
    weight_decay: float = 0.01
    max_norm: float = 1.0
    """gradients longer than this are clipped to it"""
    ema: float | None = None
    """decay of a moving average of the weights, which then is what is kept"""
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

    preset: Literal["fashion-mini", "fashion-mnist", "cifar10", "folder"] = "fashion-mini"
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
    accelerator: str = "auto"
    """cpu, cuda, ...; auto is cuda where there is a GPU, else cpu"""
    devices: str = "auto"
    """number of devices (processes, on a CPU); auto is all GPUs, or one process on the CPU"""
    strategy: str = "auto"
    """auto, ddp, ...: see Lightning Fabric; fsdp shares out the weights of a prior too large for one device"""
    num_nodes: int = 1
    precision: str = "auto"
    """32-true, bf16-mixed, ...; auto is bf16-mixed where the hardware has bfloat16, else 32-true"""


ZERO = LogisticMixture.Config(num_components=5, zero_component=True)
FASHION_MODEL = VQVAE.Config(width=64, quantizer=EMAVectorQuantizer.Config(num_codes=512, dim=32), likelihood=ZERO)
FASHION = Run(
    model=FASHION_MODEL,
    prior=TransformerPrior.Config(width=128, depth=3, num_heads=4),
    codebook_fit=FitConfig(num_steps=3200, batch_size=32),
    prior_fit=FitConfig(num_steps=1500),
)
# A code for every 2x2 pixels: natural texture costs more in pixels than in codes (see benchmarks/README.md).
COLOUR_MODEL = VQVAE.Config(
    image_size=32,
    num_channels=3,
    width=64,
    downsampling=2,
    quantizer=EMAVectorQuantizer.Config(num_codes=1024, dim=32),
    likelihood=LogisticMixture.Config(num_components=5),
)
COLOUR = dataclasses.replace(
    FASHION,
    data=DataConfig(source="cifar10"),
    model=COLOUR_MODEL,
    codebook_fit=FitConfig(num_steps=7000, batch_size=32),
    prior_fit=FitConfig(num_steps=1000),
)
PRESETS = {
    "fashion-mini": FASHION,
    "fashion-mnist": dataclasses.replace(
        FASHION,
        data=DataConfig(source="fashion-mnist"),
        model=dataclasses.replace(FASHION_MODEL, quantizer=EMAVectorQuantizer.Config(num_codes=1024, dim=32)),
        prior=TransformerPrior.Config(width=192, depth=4, num_heads=6),
        codebook_fit=FitConfig(num_steps=24_000, batch_size=32),
        prior_fit=FitConfig(num_steps=4500),
    ),
    "cifar10": COLOUR,
    "folder": dataclasses.replace(
        COLOUR,
        data=DataConfig(source="images", num_workers=2),
        model=dataclasses.replace(COLOUR_MODEL, image_size=64, downsampling=4, smooth=True),
    ),
}


def parse(args: list[str]) -> Run:
    """The options: those of the preset (with --resume: those of the run), overridden by the command line's.

    What selects other defaults is read first; tyro reads everything, and writes the help.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "run", "stage", "latents", "quantizer", "likelihood", "tokenizer", "codes"):
        first.add_argument(f"--{name}")
    first.add_argument("--prior-kind", "--prior_kind")
    first.add_argument("--resume", action="store_true")
    given, _ = exits.parsed(lambda: first.parse_known_args(args))
    for name, kinds in (
        ("preset", PRESETS),
        ("likelihood", LIKELIHOODS),
        ("latents", LATENTS),
        ("prior_kind", PRIOR_KINDS),
    ):
        if (value := getattr(given, name)) is not None and value not in kinds:
            raise ValueError(f"unknown {name.replace('_', ' ')} {value!r}, expected one of {', '.join(kinds)}")
    preset = given.preset or "fashion-mini"
    folder = Path(given.run or f"runs/{preset}")
    default = dataclasses.replace(PRESETS[preset], preset=preset, run=folder)
    tokenizer: str | None = given.tokenizer
    if given.codes and tokenizer is None and not (folder / "codebook").exists():
        tokenizer = source_of(Path(given.codes))
    is_new = tokenizer is not None and not (folder / "state" / "run.json").exists()
    if given.codes:
        data = dataclasses.replace(default.data, source=images_of(Path(given.codes)))
        default = dataclasses.replace(default, data=data)
    goes_on = given.resume or (given.stage in ("prior", "evaluate") and not is_new)
    if goes_on:
        default = dataclasses.replace(load_run(folder), stage="all")
    if tokenizer is not None:
        tokenizer = os.path.abspath(tokenizer) if Path(tokenizer).exists() else tokenizer
        if (folder / "codebook").exists() and (is_new or load_run(folder).tokenizer != tokenizer):
            raise ValueError(
                f"{folder} has a codebook of its own, got --tokenizer {tokenizer}: leave it out, or name another "
                "folder with --run"
            )
        if not goes_on:
            default = dataclasses.replace(default, model=load_tokenizer(tokenizer, given.codes).config)
        default = dataclasses.replace(default, tokenizer=tokenizer)
    if given.latents:
        default = dataclasses.replace(default, model=with_latents(default.model, LATENTS[given.latents]))
    is_gaussian = default.model.owner is GaussianVAE
    if given.quantizer:
        if is_gaussian:
            raise ValueError(f"Gaussian latents have no quantizer, got --quantizer {given.quantizer}")
        default = _with_part(default, "quantizer", quantizer_named(given.quantizer))
    if given.likelihood:
        default = _with_part(default, "likelihood", LIKELIHOODS[given.likelihood].Config())
    kind = given.prior_kind or kind_of(default.prior)
    default = dataclasses.replace(default, prior=with_kind(default.prior, kind, of_codes=not is_gaussian))
    kinds: Any = {
        "latents": "gaussian" if is_gaussian else "codes",
        "quantizer": "none" if is_gaussian else quantizer_name(default.model.quantizer),
        "likelihood": default.model.likelihood.owner.__name__,
        "prior_kind": kind_of(default.prior),
    }
    default = dataclasses.replace(default, **kinds)
    registry = ConstructorRegistry()
    registry.struct_rule(_struct)
    with registry:
        # Flags in pairs, as a resumed run may have any on already.
        return exits.parsed(
            lambda: tyro.cli(Run, prog=_program(), default=default, args=args, config=(tyro.conf.AvoidSubcommands,))
        )


def go_on(run: Run) -> str:
    """The command that goes on with a run, as this program was called."""
    program = "python train.py" if _program() == "train.py" else "vqvae train"
    # Weights that are shared out are a prior's, and a run that is resumed goes on with all its stages.
    stage = " --stage prior" if run.strategy.startswith("fsdp") else ""
    return f"{program} --resume{stage} --run {shlex.quote(str(run.run))}"


def _program() -> str:
    name = Path(sys.argv[0]).name
    return name if name == "train.py" else "vqvae train"


def _struct(info: StructTypeInfo) -> StructConstructorSpec | None:
    """How tyro reads the options of a part: those of its default's kind that the data does not decide."""
    default = info.default
    if not isinstance(default, ConfiguredOptions):
        return None
    sentences = option_sentences(default.owner)
    fields = [
        StructFieldSpec(
            name=each.name,
            type=cast(type, each.type),
            default=getattr(default, each.name),
            helptext=sentences.get(each.name),
        )
        for each in option_fields(type(default))
        if not is_given(type(default), each.name)
    ]
    return StructConstructorSpec(lambda **values: dataclasses.replace(default, **values), tuple(fields))


def _with_part(run: Run, name: str, part: Any) -> Run:
    return dataclasses.replace(run, model=dataclasses.replace(run.model, **{name: part}))


def source_of(codes: Path) -> str:
    """Where the tokenizer of a tokenized set was read from."""
    source = CodeDataset(codes / "train").tokenizer.get("source")
    if source is None:
        raise ValueError(f"{codes} does not say where its tokenizer lies: name it with --tokenizer")
    return source


def images_of(codes: Path) -> str:
    """Where the images of a tokenized set lie; what no set is called where it does not say."""
    found = CodeDataset(codes / "train")
    return found.source or f"{found.source_name} (of which {codes} does not say where)"


def load_tokenizer(source: str, codes: str | None) -> Autoencoder:
    """The model of --tokenizer, or that a tokenized set names."""
    try:
        return Autoencoder.from_pretrained(source)
    except ValueError as error:
        if codes is None:
            raise
        raise ValueError(f"the tokenizer of {codes} cannot be read, name it with --tokenizer: {error}") from error


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
