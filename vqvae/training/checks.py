"""What a run cannot do, said before it begins: options that do not go together, or with what its folder holds."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import safefolder
from safefolder.building import at_most, neutral
from safefolder.folder import check_weights
from vqvae import VQVAE, Autoencoder
from vqvae.data.batching import MAX_WORKERS
from vqvae.levels import height_and_width, times
from vqvae.quantizers import Quantizer
from vqvae.training.costs import seconds_of
from vqvae.training.images import Facts
from vqvae.training.looks_objective import smallest_sides
from vqvae.training.networks import check_compiler
from vqvae.training.options import FitConfig, LooksConfig, Run, go_on, load_run
from vqvae.training.prior_kinds import kind_of, make_prior
from vqvae.training.run_folder import checkpoint, is_of, state_path, trained_on
from vqvae.training.wandb_events import wandb_module

MAX_PRIOR_CODES = 2**20
# How the variables begin by which what starts several machines tells each of the others.
LAUNCHERS = ("MASTER_ADDR", "SLURM_", "LSB_", "OMPI_", "PMI_", "KUBERNETES_")
# Of a prior's options those that may change while it trains. The others say what its weights mean, also where these
# have the same shapes.
_ADJUSTABLE = ("dropout", "label_dropout", "code_noise", "checkpointing", "raster_share")
# Of a model; a mistyped number of layers has more.
MAX_TENSORS = 20_000
Made = TypeVar("Made", bound=nn.Module)


def stages(run: Run) -> tuple[str, ...]:
    """What a run does. A codebook that it took from elsewhere stays as it is, also where it is resumed."""
    if run.stage != "all":
        return (run.stage,)
    return ("prior", "evaluate") if has_taken_codebook(run) else ("codebook", "prior", "evaluate")


def has_taken_codebook(run: Run) -> bool:
    """Whether the run's codebook is a copy of --tokenizer that it has not trained on."""
    folder = run.run
    return run.tokenizer is not None and (folder / "codebook").exists() and not state_path(run, "codebook").exists()


def check(run: Run, wanted: tuple[str, ...]) -> None:
    """ValueError for stages or options that do not go together."""
    config = run.model
    has_codes = issubclass(config.owner, VQVAE)
    in_loop = has_codes and config.beta is not None
    if has_codes and ("prior" in wanted or in_loop):
        check_listable(config.quantizer)
    if "codebook" in wanted and has_taken_codebook(run):
        raise ValueError(
            f"{run.run} has the codebook of {run.tokenizer} as it is: train it on in another folder, with --run"
        )
    if wanted == ("prior",) and state_path(run, "codebook").exists() and not (run.run / "codebook").exists():
        raise ValueError(
            f"the codebook of {run.run} is not finished: go on with `vqvae train --resume --run {run.run}`, which then "
            "trains its prior"
        )
    check_compiler(run)
    if run.codes is not None and "codebook" in wanted:
        raise ValueError(
            f"--codes {run.codes} is for a prior, got stages {', '.join(wanted)}: add --stage prior, or leave it out"
        )
    if run.codes is not None and run.live:
        raise ValueError("--live encodes images while the prior trains, --codes are encoded already: leave one out")
    if run.schedule == "alternating" and not in_loop:
        raise ValueError(
            "--schedule alternating is for a prior in the loop of codes, and there is none; add --model.beta"
        )
    if in_loop:
        check_in_loop(run)
    if "codebook" in wanted and run.resume and state_path(run, "codebook").exists():
        check_same_looks(run)
    if "codebook" not in wanted:
        check_no_new_looks(run, f"with stages {', '.join(wanted)}, but only a codebook is trained for the eye")
    check_looks(run, in_loop)
    if run.strategy.startswith("fsdp") and (run.strategy != "fsdp" or "codebook" in wanted):
        raise ValueError(
            f"--strategy fsdp shares out the weights of a prior, and is for --stage prior alone: got --strategy "
            f"{run.strategy} with stages {', '.join(wanted)}; train the codebook with --stage codebook --strategy auto"
        )
    assert run.prior_kind == kind_of(run.prior)
    if run.draft == "yes" and (run.latents != "codes" or run.prior_kind not in ("Transformer", "Llama")):
        raise ValueError(
            "--draft yes is for a transformer over codes in raster order, got "
            f"--latents {run.latents} and --prior-kind {run.prior_kind}; leave it out"
        )
    if run.draft == "yes" and run.strategy.startswith("fsdp"):
        raise ValueError(f"--draft yes is for a prior on one device, got --strategy {run.strategy}; leave one out")
    for name, options in (("codebook-fit", run.codebook_fit), ("prior-fit", run.prior_fit)):
        check_fit_options(name, options)
    check_muon(run, has_codes and in_loop)
    if run.test_images is not None and run.test_images < 1:
        raise ValueError(f"got --test-images {run.test_images}, expected at least 1; leave it out for all")
    if not 0 <= run.data.num_workers <= MAX_WORKERS:
        raise ValueError(f"got --data.num-workers {run.data.num_workers}, expected 0 to {MAX_WORKERS}")
    if not 0 <= run.seed < 2**64:
        raise ValueError(f"got --seed {run.seed}, expected 0 to 2^64 - 1")
    if run.num_nodes < 1:
        raise ValueError(f"got --num-nodes {run.num_nodes}, expected at least 1")
    if run.num_nodes > 1 and not any(name.startswith(LAUNCHERS) for name in os.environ):
        raise ValueError(
            f"got --num-nodes {run.num_nodes}, and nothing says where the others are: start it on each by torchrun "
            "(docs/reuse.md), or by a batch system that Lightning Fabric knows"
        )
    # Before hours of training, and all of it, as it will be the run's options.
    model = _tried(config.build, "model")
    if not has_codes or "prior" in wanted or in_loop or _is_listable(config.quantizer):
        _tried(lambda: make_prior(run.prior, model, None), "prior")
    check_time_budget(run, wanted)
    if run.logger == "wandb":
        wandb_module()
    for stage in wanted:
        if stage != "evaluate" and not run.resume and state_path(run, stage).exists():
            raise ValueError(
                f"{run.run} already holds a {stage}; add --resume to go on with it, by `{go_on(run)}`, or name another "
                "folder with --run"
            )


def check_time_budget(run: Run, wanted: tuple[str, ...]) -> None:
    """ValueError for a budget that is no time, or that has no say."""
    if run.time_budget is None:
        return
    seconds_of(run.time_budget)
    told = f"got --time-budget {run.time_budget}"
    if wanted == ("evaluate",):
        raise ValueError(f"{told} with --stage evaluate, which trains nothing: leave it out")
    if run.strategy.startswith("fsdp"):
        raise ValueError(f"{told} with --strategy {run.strategy}, whose prior no device can try alone: leave it out")
    begun = [stage for stage in wanted if stage != "evaluate" and state_path(run, stage).exists()]
    if run.resume and begun:
        raise ValueError(
            f"{told}, but the {begun[0]} of {run.run} is begun, and how many steps it has was settled then: leave it "
            f"out, or ask for more steps by --{begun[0]}-fit.num-steps"
        )


def _tried(make: Callable[[], Made], option: str) -> Made:
    """What the options make, but without memory.

    Raises:
        ValueError: they make nothing, or what this machine has no memory for.
    """
    try:
        with neutral(), torch.device("meta"), at_most(MAX_TENSORS):
            made = make()
    except ValueError:
        raise
    except Exception as error:  # torch has many types for sizes that nobody can compute with
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"--{option}: these options make no model ({type(error).__name__}: {text})") from error
    needed = sum(each.numel() * each.element_size() for each in made.state_dict().values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else needed
    if needed > memory:
        raise ValueError(
            f"--{option}: these options make a model of {needed / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f}"
        )
    return made


def check_looks(run: Run, in_loop: bool) -> None:
    """ValueError for terms for the eye that cannot be trained, or that have no say."""
    looks, wanted = run.looks, run.looks.has_terms or run.train == "decoder"
    if in_loop and wanted:
        raise ValueError(
            "--looks and --train decoder are for codes without a prior in the loop: leave them out, or --model.beta"
        )
    if run.train == "decoder" and run.tokenizer is None:
        raise ValueError("--train decoder leaves codes as they are, and needs some: name a run or model by --tokenizer")
    if run.train == "decoder" and not issubclass(run.model.owner, VQVAE):
        raise ValueError("--train decoder leaves codes as they are, and real latents are none: leave it out")
    for name in ("l1", "perceptual", "adversarial", "learning_rate", "lecam", "r1", "ramp"):
        if not 0 <= getattr(looks, name) < math.inf:
            raise ValueError(f"got --looks.{name.replace('_', '-')} {getattr(looks, name)}, expected 0 or more")
    plain, default = looks.to_plain(), type(looks)().to_plain()
    for name in [each for each in plain if each not in ("l1", "perceptual", "adversarial")]:
        term = "perceptual" if name == "network" else "adversarial"
        if plain[name] != default[name] and not plain[term]:
            raise ValueError(
                f"got --looks.{name.replace('_', '-')} {plain[name]}, which has no say without --looks.{term}: add it"
            )
    if looks.adversarial:
        first, steps = looks.first_step(run.codebook_fit.num_steps), run.codebook_fit.num_steps
        if not 0 <= first < steps:
            raise ValueError(f"the discriminator joins in at --looks.start {first}, expected 0 to {steps - 1}")
    if looks.width % 8 or not 8 <= looks.width <= 1024 or not 0 <= looks.num_halvings <= 6:
        raise ValueError(
            f"got --looks.width {looks.width} and --looks.num-halvings {looks.num_halvings}, expected a multiple of 8 "
            "up to 1024, and 0 to 6"
        )
    for name, smallest in smallest_sides(looks).items():
        if min(height_and_width(run.model.image_size)) < smallest:
            raise ValueError(
                f"--looks.{name} needs images of at least {smallest}x{smallest}, got {times(run.model.image_size)}: "
                f"{'lower it' if name == 'num-halvings' else 'leave it out'}"
            )


def check_same_looks(run: Run) -> None:
    """ValueError for what a codebook that is begun cannot change: which weights learn, and the discriminator's own."""
    known = load_run(run.run)

    def fixed(of: Run) -> dict[str, Any]:
        sizes = {"width": of.looks.width, "num-halvings": of.looks.num_halvings} if of.looks.adversarial else {}
        named = {"adversarial": bool(of.looks.adversarial), **sizes}
        return {"--train": of.train, **{f"--looks.{name}": value for name, value in named.items()}}

    before, asked = fixed(known), fixed(run)
    for name, value in before.items():
        if asked.get(name, value) != value:
            raise ValueError(
                f"the codebook of {run.run} was begun with another {name}: leave it as it was, or begin another with "
                "--run NEW"
            )


def check_no_new_looks(run: Run, why: str) -> None:
    """ValueError for terms for the eye that are asked for where no codebook is trained; those that a run has stay."""
    has_run = (run.run / "state" / "run.json").is_file()
    known = (load_run(run.run).looks if has_run else LooksConfig()).to_plain()
    source = run.run if (run.run / "codebook").is_dir() or run.tokenizer is None else run.tokenizer
    for name, value in run.looks.to_plain().items():
        if value != known[name]:
            raise ValueError(
                f"got --looks.{name.replace('_', '-')} {value} {why}: leave it out, or train one in a folder of its "
                f"own by --stage codebook --run NEW (from this one by --tokenizer {source})"
            )


def check_muon(run: Run, in_loop: bool) -> None:
    """ValueError for Muon where there are no matrices of a transformer, or they are shared out."""
    kinds = ("PixelCNN",) if run.latents == "codes" else ()
    if run.codebook_fit.muon is not None and not in_loop:
        raise ValueError(
            "--codebook-fit.muon is for the matrices of a transformer, and convolutions have none; leave it out, or "
            "add a prior in the loop, with --model.beta"
        )
    if run.prior_fit.muon is not None and run.prior_kind in kinds:
        raise ValueError(f"--prior-fit.muon is for transformers, got --prior-kind {run.prior_kind}; leave it out")
    if run.prior_fit.muon is not None and run.strategy.startswith("fsdp"):
        raise ValueError("--prior-fit.muon needs whole matrices, which --strategy fsdp shares out; leave one out")


def check_in_loop(run: Run) -> None:
    """ValueError for a prior that cannot be in the loop of codes."""
    if run.prior_kind != "Transformer":
        raise ValueError(
            f"a prior in the loop (--model.beta) is a transformer: got --prior-kind {run.prior_kind}, leave it out"
        )


def check_fit_options(name: str, options: FitConfig) -> None:
    """ValueError for numbers that nothing can be fitted with."""
    positive = ("num_steps", "batch_size", "accumulate", "validate_every", "save_every")
    wrong = [each for each in positive if getattr(options, each) < 1]
    or_zero = ("learning_rate", "num_warmup", "weight_decay")
    wrong += [each for each in or_zero if not 0 <= getattr(options, each) < math.inf]
    wrong += ["muon"] if options.muon is not None and not 0 <= options.muon < math.inf else []
    wrong += [] if 0 < options.max_norm < math.inf else ["max_norm"]
    wrong += ["ema"] if options.ema is not None and not 0 <= options.ema < 1 else []
    if wrong:
        words = ", ".join(f"--{name}.{each.replace('_', '-')} {getattr(options, each)}" for each in wrong)
        raise ValueError(
            f"got {words}, expected numbers above zero (learning rate, warm-up and decay may be zero, ema is below one)"
        )


def _is_listable(config: Quantizer.Config) -> bool:
    return _tried(config.build, "model.quantizer").num_codes <= MAX_PRIOR_CODES


def check_listable(config: Quantizer.Config) -> None:
    """A prior gives a probability to each code, so it must be able to list them."""
    if not _is_listable(config):
        raise ValueError(
            f"a prior cannot list the {config.build().num_codes} codes of this quantizer, at most {MAX_PRIOR_CODES}: "
            "give each position several codes of fewer bits (--quantizer GroupedQuantizer/BSQ), or train the codebook "
            "alone with --stage codebook"
        )


def check_folder(
    run: Run, wanted: tuple[str, ...], objectives: Mapping[str, Callable[..., Any]], images: Facts
) -> None:
    """ValueError for options that do not go with the models and checkpoints that the run's folder holds.

    Args:
        objectives: for each stage what makes its objective with fresh weights; that of the prior takes the codebook.
        images: what tells the images at hand from others.
    """
    path, folder = state_path(run, "codebook"), run.run / "codebook"
    model = Autoencoder.from_pretrained(folder) if folder.is_dir() else None
    changes = False
    if "codebook" in wanted:
        changes = not path.exists() or _steps_left(path, run.codebook_fit.num_steps)
        if path.exists():
            _check_fits(path, objectives["codebook"])
            if not changes:
                check_no_new_looks(run, f"but the codebook of {run.run} is finished")
            if changes:
                _check_average(path, run.codebook_fit)
    if model is not None and not changes:
        _check_same(f"{folder} is trained", "model", _plain(model.config), _plain(run.model))
    if model is not None and changes:
        for name in ("image_size", "num_channels"):
            got, expected = getattr(run.model, name), getattr(model.config, name)
            if got != expected:
                raise ValueError(
                    f"{folder} is for {name} {expected}, got {got}: train it on so in another folder, by --tokenizer "
                    f"{run.run} --run NEW"
                )
    path = state_path(run, "prior")
    if "prior" not in wanted or changes or model is None or not path.exists():
        return
    of = trained_on(run, model, images)
    if not is_of(path, of):
        return  # trained anew
    _, before = checkpoint(path).get("trained_on") or (None, None)
    if None not in (before, of.images) and before != of.images:
        what = f"--codes {run.codes}" if run.codes is not None else run.data.source
        raise ValueError(
            f"the prior of {run.run} was begun with other codes or images than {what} has: bring those back, or train "
            f"one on these in another folder, by --tokenizer {run.run} --stage prior --run NEW"
        )
    left = _steps_left(path, run.prior_fit.num_steps)
    prior = _check_fits(path, lambda: objectives["prior"](model)).prior
    if left:
        _check_average(path, run.prior_fit)
    if left and run.resume and type(known := load_run(run.run).prior) is type(run.prior):
        sizes = ({k: v for k, v in each.to_plain().items() if k not in _ADJUSTABLE} for each in (known, run.prior))
        _check_same(f"{path} is of a prior", "prior", *sizes)
    if not left and (run.run / "prior").is_dir():
        saved = safefolder.folder.read_config(run.run / "prior")
        if saved["class"] == type(prior).__name__:
            _check_same(f"{run.run / 'prior'} is trained", "prior", saved, prior.config.to_plain())


def _steps_left(path: Path, num_steps: int) -> bool:
    """Whether a checkpoint is of a step before the last."""
    step = checkpoint(path)["step"]
    if step > num_steps:
        raise ValueError(
            f"{path} is of step {step:,}, got --{path.stem}-fit.num-steps {num_steps:,}: leave it out, or ask for more"
        )
    return step < num_steps


def _check_average(path: Path, options: FitConfig) -> None:
    """ValueError where a checkpoint has a moving average and the options have none, or the other way round."""
    has = "average" in checkpoint(path)
    if has != (options.ema is not None):
        got = "without" if options.ema is None else f"with --{path.stem}-fit.ema {options.ema:g}"
        raise ValueError(
            f"{path} was begun {'with' if has else 'without'} --{path.stem}-fit.ema, got {got}: leave it as it was, or "
            "begin another with --run NEW"
        )


def _check_fits(path: Path, make: Any) -> Any:
    """What is made, without memory, once it is held against the checkpoint that is to be loaded into it."""
    with neutral(), torch.device("meta"):
        made: nn.Module = make()
    try:
        check_weights(made.state_dict(), checkpoint(path)["module"], path)
    except ValueError as error:
        raise ValueError(
            f"{error}; leave out the options that the run was not begun with, or begin another with --run NEW"
        ) from error
    return made


def _plain(config: Autoencoder.Config) -> dict[str, Any]:
    return {"kind": config.owner.__name__, **config.to_plain()}


def _check_same(what: str, option: str, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """ValueError where a model that is there has other options than those asked for."""
    known, asked = (_flat(json.loads(json.dumps(plain))) for plain in (known, asked))
    for name in sorted(known.keys() & asked.keys()):
        if known[name] != asked[name]:
            words = f"--{option}.{name.replace('_', '-')} {asked[name]}"
            raise ValueError(
                f"{what}, with {name} {known[name]}, got {words}: leave it out, or train another in another folder, "
                "with --run NEW"
            )


def _flat(plain: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in plain.items():
        flat |= _flat(value, f"{start}{name}.") if isinstance(value, Mapping) else {f"{start}{name}": value}
    return flat
