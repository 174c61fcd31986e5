"""Train a codebook, then a prior over its codes, and state what both are worth in bits.

    python train.py                                    # embedded images, a few minutes on two CPU cores
    python train.py --preset cifar10 --run runs/mine   # another preset, another folder
    python train.py --preset folder --data.source photos
    python train.py --resume                           # go on after Ctrl-C or a kill

A run is a folder. Stage `codebook` writes `codebook/`; `prior` reads it and writes `prior/`, `unigram/` and
`ngram/`; `evaluate` reads all of them and writes `elbo.json` and the pictures. `--stage all`, the default, does the
three in turn.
"""

import contextlib
import copy
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import torch
from lightning_fabric import Fabric
from torch import Tensor
from tqdm import tqdm

import safefolder
from priors import (
    ContinuousPrior,
    MixtureTransformerPrior,
    NormalPrior,
    Prior,
    TransformerPrior,
    UniformPrior,
)
from training.checks import check, check_in_loop, stages
from training.devices import leave_processes, make_fabric
from training.latents import (
    ENCODE_BATCH,
    counted,
    drawn,
    fit_baselines,
    step_seed,
    to_device,
)
from training.learner import Learner, Objective
from training.objectives import CodebookObjective, PriorObjective, RateAwareObjective
from training.options import FitConfig, Run, parse, save_run
from training.prior_data import NUM_WATCHED, check_codes, known_classes, prior_data
from training.prior_kinds import make_prior, name_of
from training.records import Metrics, Stop, load_state, save_state
from vqvae import VQVAE, Autoencoder, GaussianVAE, load_images, pictures
from vqvae.allocator import keep_freed_memory
from vqvae.codec.fingerprint import fingerprint
from vqvae.data import Batch, Images, batches
from vqvae.elbo import rate
from vqvae.evaluation import evaluate
from vqvae.metrics import psnr


def main() -> None:
    """Entry point: a user's mistake or a full disk is one line and exit status 2."""
    keep_freed_memory()
    status: Any = None
    try:
        train(parse(sys.argv[1:]))
    except SystemExit as stop:  # saved as asked; what was under way is let go of here
        status = stop.code
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    # Not after an error, which other processes may know nothing of.
    leave_processes()
    if status is not None:
        sys.exit(status)


def train(run: Run) -> None:
    """The three stages."""
    wanted = stages(run)
    check(run, wanted)
    if "prior" in wanted and run.codes is not None:
        has_codebook = (run.run / "codebook").exists()
        check_codes(run, Autoencoder.from_pretrained(run.run / "codebook") if has_codebook else first_model(run))
    needs_images = run.codes is None or wanted != ("prior",)
    try:
        data = {
            split: load_images(
                run.data.source,
                split,
                size=run.model.image_size,
                channels=run.model.num_channels,
                root=run.data.root,
            )
            for split in (("train", "test") if needs_images else ())
        }
    except ValueError as error:
        if run.codes is None:
            raise
        raise ValueError(f"the images of {run.codes} cannot be read, name them with --data.source: {error}") from error
    fabric = make_fabric(run)
    fabric.launch()
    of = f"codes from {run.codes}"
    if data:
        of = f"{len(data['train'])} training and {len(data['test'])} test images from {run.data.source}"
    fabric.print(
        f"{run.run}: {of}; {fabric.world_size} x {fabric.device.type}, {fabric.strategy.precision.precision}",
        file=sys.stderr,
    )
    if fabric.is_global_zero:
        save_run(run)
    with Stop() as stop:
        session = Session(fabric, run, Metrics(run.run, fabric), stop)
        if "codebook" in wanted:
            fit_codebook(session, data)
        if "prior" in wanted:
            fit_prior(session, data)
        if "evaluate" in wanted and fabric.is_global_zero:
            evaluate_run(session, data)
    fabric.barrier()


class Session(NamedTuple):
    """What every stage works with."""

    fabric: Fabric
    run: Run
    metrics: Metrics
    stop: Stop


def fit(
    session: Session,
    name: str,
    objective: Objective,
    stream: Callable[..., Generator[Batch, None, None]],
    options: FitConfig,
    validate: Callable[[Any], Mapping[str, float]],
    began: float,
) -> Any:
    """Fit one model, from the last checkpoint if there is one; its objective with the final weights comes back.

    A step depends on the seed and the step's number alone, so a resumed run repeats the uninterrupted one to the bit.
    """
    fabric, run, metrics, stop = session
    learner = Learner(fabric, objective, options)
    module, optimizer = learner.module, learner.optimizer
    state: dict[str, Any] = {**learner.state, "step": 0, "seconds": 0.0}
    path = run.run / "state" / f"{name}.ckpt"
    if path.exists():
        load_state(fabric, path, state)
    start = saved = state["step"]
    metrics.rewind(name, start)
    began -= state["seconds"]

    def save(step: int) -> None:
        state.update(step=step, seconds=time.monotonic() - began)
        save_state(fabric, path, state)

    def look() -> None:
        with learner.watching() as kept:
            metrics.add(name, state["step"], "test", validate(kept))

    def diverged(reason: str, step: int) -> str:
        return (
            f"{name} stopped at step {step}: {reason}; the last good checkpoint is "
            f"{f'{path} of step {saved}' if saved else 'none'}; lower --{name}-fit.learning-rate "
            f"(now {options.learning_rate:g}) or take --precision 32-true, and add --resume to go on from it"
        )

    objective.train()
    order = {"seed": run.seed, "rank": fabric.global_rank, "world_size": fabric.world_size}
    incoming = stream(batch_size=options.batch_size, start=start, **order)
    bar = tqdm(
        total=options.num_steps * options.batch_size * fabric.world_size,
        initial=start * options.batch_size * fabric.world_size,
        desc=name,
        unit="img",
        unit_scale=True,
        disable=None if fabric.is_global_zero else True,
    )
    with bar, contextlib.closing(incoming), stop.catching():
        for step in range(start, options.num_steps):
            batch = next(incoming)
            metrics.skip(batch)
            # Dropout draws from a stream of its own at every step, process and stage, whatever came before.
            torch.manual_seed(step_seed(run.seed, name, step + 1, fabric.global_rank))
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, options)
            try:
                terms = module(batch.images.to(fabric.device), to_device(batch.labels, fabric))
            except ValueError as error:  # weights that diverged give features that no code is near to
                raise ValueError(diverged(str(error), step)) from error
            fabric.backward(terms["objective"])
            objective.rest()
            if not torch.isfinite(terms["objective"] + learner.clip(options.max_norm)):
                raise ValueError(diverged("the objective or its gradient is not finite", step))
            learner.step()
            state["step"] = step + 1
            last = step + 1 == options.num_steps
            bar.update(options.batch_size * fabric.world_size)
            if step % 20 == 0 or last:
                figures = {key: value.item() for key, value in terms.items()}
                bar.set_postfix_str(" ".join(f"{key} {value:.3g}" for key, value in figures.items() if "/" not in key))
                metrics.add(name, step + 1, "train", {**figures, "seconds": time.monotonic() - began})
            if last or (step + 1) % options.validate_every == 0:
                look()
            if stopping := stop.requested(fabric, step):
                last = True
            if last or (step + 1) % options.save_every == 0:
                save(step + 1)
                saved = step + 1
            if stopping:
                fabric.print(f"{name}: saved at step {step + 1}; continue with --resume", file=sys.stderr)
                sys.exit(128 + stopping)
    return learner.kept()


def fit_codebook(session: Session, data: Mapping[str, Images]) -> None:
    """Images to `codebook/`; where a prior is in the loop, that prior to `state/loop/`."""
    fabric, run, *_ = session
    began = time.monotonic()
    torch.manual_seed(step_seed(run.seed, "codebook", 0, 0))
    # A checkpoint has all weights, and what the run began with may be gone.
    model = run.model.build() if (run.run / "state" / "codebook.ckpt").exists() else first_model(run)
    if isinstance(model, VQVAE) and model.config.beta is not None:
        prior = make_prior(run.prior, model, data["train"].num_classes)
        assert isinstance(prior, TransformerPrior)
        objective = RateAwareObjective(model, prior, run.schedule, run.codebook_fit.num_steps)
    else:
        objective = CodebookObjective(model)
    watched = next(batches(data["test"], NUM_WATCHED))

    def validate(kept: CodebookObjective | RateAwareObjective) -> dict[str, float]:
        usage = kept.model.usage()
        distortion, decibels = [], []
        for part in torch.arange(len(watched.images)).split(64):
            images = watched.images[part].to(fabric.device)
            labels = None if watched.labels is None else watched.labels[part].to(fabric.device)
            out = kept.encoder(labels)(images)
            usage.add(out.counted)
            distortion.append(out.distortion)
            decibels.append(psnr(images, kept.model.reconstruct(out)))
        figures = {
            "distortion": torch.cat(distortion).mean().item() / kept.model.num_dims,
            "psnr": torch.cat(decibels).mean().item(),
            "usage": usage.usage,
        }
        return figures if usage.perplexity is None else {**figures, "perplexity": usage.perplexity}

    stream = functools.partial(batches, data["train"], num_workers=run.data.num_workers)
    kept = fit(session, "codebook", objective, stream, run.codebook_fit, validate, began)
    if fabric.is_global_zero:
        kept.model.save_pretrained(run.run / "codebook")
        if isinstance(kept, RateAwareObjective):
            kept.prior.save_pretrained(run.run / "state" / "loop")
    fabric.barrier()


def first_model(run: Run) -> Autoencoder:
    """What training starts from: fresh weights, or those of `--tokenizer`."""
    model = run.model.build()
    if run.tokenizer is not None:
        weights = Autoencoder.from_run(run.tokenizer).state_dict()
        safefolder.load_weights(model, weights, f"{run.tokenizer} (with this run's --model options)")
    return model


def fit_prior(session: Session, data: Mapping[str, Images]) -> None:
    """Latents of the training images to `prior/`, and what counts them to `unigram/` and `ngram/`."""
    fabric, run, metrics, _ = session
    began = time.monotonic()
    if run.tokenizer is not None and not (run.run / "codebook").exists():
        fabric.barrier()  # all have looked
        if fabric.is_global_zero:
            first_model(run).save_pretrained(run.run / "codebook")
        fabric.barrier()
    model = Autoencoder.from_pretrained(run.run / "codebook").to(fabric.device)
    check_same_images(model, run)
    # The same start whether the codebook was trained just now or in an earlier, interrupted process.
    torch.manual_seed(step_seed(run.seed, "prior", 0, 0))
    prior = make_prior(run.prior, model, known_classes(run, model, data))
    in_loop = model
    if isinstance(model, VQVAE) and model.config.beta is not None:  # the prior in the loop goes on learning
        check_in_loop(run)
        prior = TransformerPrior.from_pretrained(run.run / "state" / "loop")
        in_loop = copy.deepcopy(prior).to(fabric.device)
    known = prior_data(fabric, metrics, run, model, in_loop, data)
    if isinstance(prior, MixtureTransformerPrior):
        prior.standardise(drawn(prior, known.sample().cpu()))
    objective = PriorObjective(prior.train())
    watched = known.watched

    def validate(kept: PriorObjective) -> dict[str, float]:
        torch.manual_seed(step_seed(run.seed, "watched", 0, 0))
        nats = rate(kept.prior, drawn(kept.prior, watched.images.to(fabric.device)), to_device(watched.labels, fabric))
        return {"rate": nats.mean().item() / kept.prior.num_places}

    kept = fit(session, "prior", objective, known.batches, run.prior_fit, validate, began)
    if fabric.is_global_zero:
        if isinstance(model, VQVAE):
            for name, baseline in fit_baselines(model, known.parts()).items():
                baseline.save_pretrained(run.run / name)
        kept.prior.save_pretrained(run.run / "prior")
    fabric.barrier()


def check_same_images(model: Autoencoder, run: Run) -> None:
    """A codebook that other options made would fail later, and less clearly."""
    for name in ("image_size", "num_channels"):
        got, expected = getattr(model.config, name), getattr(run.model, name)
        if got != expected:
            raise ValueError(f"{run.run / 'codebook'} is for {name} {got}, this run's options say {expected}")


def evaluate_run(session: Session, data: Mapping[str, Images]) -> None:
    """What the run's saved parts are worth on the test images, to `elbo.json`; and the pictures."""
    fabric, run, metrics, _ = session
    began = time.monotonic()
    model = Autoencoder.from_pretrained(run.run / "codebook").to(fabric.device)
    check_same_images(model, run)
    priors: dict[str, Prior | ContinuousPrior]
    if isinstance(model, GaussianVAE):
        priors = {
            "normal": NormalPrior(dim=model.dim, grid=model.grid),
            "transformer": ContinuousPrior.from_pretrained(run.run / "prior"),
        }
    else:
        assert isinstance(model, VQVAE)
        priors = {"uniform": UniformPrior(num_codes=model.num_codes, grid=model.grid)}
        # Runs of earlier versions have no n-grams, and neither have grids of too many axes.
        for name in ("unigram", *(["ngram"] if (run.run / "ngram").is_dir() else [])):
            priors[name] = Prior.from_pretrained(run.run / name)
        last = Prior.from_pretrained(run.run / "prior")
        priors[name_of(last)] = last
    priors = {name: prior.eval().to(fabric.device) for name, prior in priors.items()}
    learned = list(priors.values())[-1]
    with tqdm(total=len(data["test"]), desc="evaluate", unit="img", disable=None) as bar:
        result = evaluate(model, priors, counted(batches(data["test"], ENCODE_BATCH), bar, metrics))
    first = next(batches(data["test"], 32))
    images = first.images.to(fabric.device)
    in_loop: Any = learned
    codes = model.through(in_loop, to_device(first.labels, fabric)).encode(images)
    pictures.save_reconstructions(run.run / "reconstructions.png", images, model.decode(codes))
    pictures.save_usage(run.run / "usage.png", result.code_usage)
    pictures.save_grid(run.run / "samples.png", draw(model, learned, run.seed), 10)
    seconds = metrics.seconds() + time.monotonic() - began
    of = {"models": fingerprint(model, learned).hex(), "data": run.data.source, "split": "test"}
    result.save(run.run / "elbo.json", seconds=seconds, seed=run.seed, **of)
    print(result.table(seconds))
    print(f"{run.run}/: elbo.json, reconstructions.png, samples.png, usage.png")


def draw(model: Autoencoder, prior: Prior | ContinuousPrior, seed: int) -> Tensor:
    """Ten columns, a class each where the prior knows classes, of eight images."""
    labels = None if prior.num_classes is None else torch.arange(80, device=prior.device) % 10 % prior.num_classes
    generator = torch.Generator(prior.device).manual_seed(seed)
    return model.decode(prior.sample(80, labels=labels, generator=generator))


def schedule(step: int, options: FitConfig) -> float:
    """The share of the learning rate at a step: linear warm-up, cosine decay to a fiftieth."""
    warm = min(1.0, (step + 1) / max(1, options.num_warmup))
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / options.num_steps)))


if __name__ == "__main__":
    main()
