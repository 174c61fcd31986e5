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
from typing import Any

import torch
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
from priors.grid import TrainedOn
from training.checks import check, check_folder, check_in_loop, stages
from training.devices import launch, leave_processes, lost_ranks_told, make_fabric
from training.images import check_images, facts_of, load_data
from training.latents import ENCODE_BATCH, LatentBatch, counted, drawn, fit_baselines, step_seed, to_device
from training.learner import Learner, Objective
from training.objectives import CodebookObjective, PriorObjective, RateAwareObjective, codebook_objective
from training.options import FitConfig, Run, parse
from training.prior_data import NUM_WATCHED, check_codes, known_classes, prior_data
from training.prior_kinds import make_prior, name_of
from training.records import Metrics, Stop, load_state, save_state
from training.run_folder import (
    Session,
    check_parts,
    checkpoint,
    go_on,
    is_of,
    one_program,
    state_path,
    tell_of_stale_parts,
    trained_on,
)
from vqvae import VQVAE, Autoencoder, GaussianVAE, exits, pictures
from vqvae.allocator import keep_freed_memory
from vqvae.codec.fingerprint import fingerprint
from vqvae.data import Batch, Images, batches
from vqvae.elbo import rate
from vqvae.evaluation import evaluate
from vqvae.fingerprint import of_tokenizer
from vqvae.metrics import psnr


def main() -> None:
    """Entry point: whatever goes wrong is one line and exit status 2."""
    keep_freed_memory()
    exits.run(program)


def program() -> None:
    """Train as the command line says, and end the processes that did."""
    run = parse(sys.argv[1:])
    try:
        train(run)
    except SystemExit:  # saved as asked; what was under way is let go of here
        leave_processes()
        raise
    except KeyboardInterrupt:
        if state_path(run, "codebook").parent.is_dir():
            print(f"interrupted; go on with `{go_on(run)}`", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        raise
    # Not after an error, which other processes may know nothing of.
    leave_processes()


def train(run: Run) -> None:
    """The three stages."""
    wanted = stages(run)
    check(run, wanted)
    fabric = make_fabric(run)
    with one_program(fabric, run), lost_ranks_told(fabric, go_on(run)):
        if "prior" in wanted and run.codes is not None:
            has_codebook = (run.run / "codebook").exists()
            check_codes(run, Autoencoder.from_pretrained(run.run / "codebook") if has_codebook else first_model(run))
        data = load_data(run) if run.codes is None or wanted != ("prior",) else {}
        images = facts_of(data)
        note = check_images(run, images)
        check_folder(
            run,
            wanted,
            {
                "codebook": lambda: codebook_objective(run, run.model.build(), data),
                "prior": lambda model: PriorObjective(make_prior(run.prior, model, known_classes(run, model, data))),
            },
            images,
        )
        launch(fabric, go_on(run))
        of = f"codes from {run.codes}"
        if data:
            of = f"{len(data['train'])} training and {len(data['test'])} test images from {run.data.source}"
        precision = fabric.strategy.precision.precision
        for line in (
            f"{run.run}: {of}; {fabric.world_size} x {fabric.device.type}, {precision}",
            *([f"note: {note}"] if note else []),
            *dict.fromkeys(f"note: {each.label_note}" for each in data.values() if each.label_note),
        ):
            fabric.print(line, file=sys.stderr)
        with Stop() as stop, contextlib.closing(Metrics(run.run, fabric)) as metrics:
            session = Session(fabric=fabric, run=run, metrics=metrics, stop=stop, images=images)
            if "codebook" in wanted:
                fit_codebook(session, data)
            if "prior" in wanted:
                fit_prior(session, data)
            if "evaluate" in wanted and fabric.is_global_zero:
                evaluate_run(session, data)
        fabric.barrier()


def fit(
    session: Session,
    name: str,
    objective: Objective,
    stream: Callable[..., Generator[Batch | LatentBatch, None, None]],
    options: FitConfig,
    validate: Callable[[Any], Mapping[str, float]],
    began: float,
    of: TrainedOn | None = None,
) -> Any:
    """Fit one model, from the last checkpoint if there is one; its objective with the final weights comes back.

    A step depends on the seed and the step's number alone, so a resumed run repeats the uninterrupted one to the bit.
    A checkpoint that was made of something else than `of` counts for nothing.
    """
    fabric, run, metrics, stop = session.fabric, session.run, session.metrics, session.stop
    path = state_path(run, name)
    is_new = not path.exists() or not is_of(path, of)
    if not is_new and (held := checkpoint(path))["step"] >= options.num_steps:
        # What precision was asked for this time must not change what was trained in another.
        return Learner.finished(objective, held).to(fabric.device)
    if is_new and path.exists():
        fabric.print(f"{name}: trained anew, as the codebook is another than it was trained on", file=sys.stderr)
    learner = Learner(fabric, objective, options)
    module, optimizer = learner.module, learner.optimizer
    state: dict[str, Any] = {**learner.state, "step": 0, "seconds": 0.0}
    if not is_new:
        load_state(fabric, path, state)
    start = saved = state["step"]
    metrics.stage(name, start)
    began -= state["seconds"]

    def save(step: int) -> None:
        session.begin()
        state.update(step=step, seconds=time.monotonic() - began)
        save_state(fabric, path, {**state, "trained_on": None if of is None else list(of)})

    def diverged(reason: str, step: int) -> str:
        return (
            f"{name} stopped at step {step}: {reason}; the last good checkpoint is "
            f"{f'{path} of step {saved}' if saved else 'none'}; lower --{name}-fit.learning-rate "
            f"(now {options.learning_rate:g}) or take --precision 32-true, and go on from it with `{go_on(run)}`"
        )

    def look() -> None:
        with learner.watching() as kept:
            try:
                figures = validate(kept)
            except ValueError as error:
                raise ValueError(diverged(str(error), state["step"])) from error
            metrics.add(state["step"], "test", figures)

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
            metrics.skip(batch.skipped)
            # Dropout draws from a stream of its own at every step, process and stage, whatever came before.
            torch.manual_seed(step_seed(run.seed, name, step + 1, fabric.global_rank))
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * schedule(step, options)
            try:
                inputs = batch.images if isinstance(batch, Batch) else batch.latents
                terms = module(inputs.to(fabric.device), to_device(batch.labels, fabric))
            except ValueError as error:  # weights that diverged give features that no code is near to
                raise ValueError(diverged(str(error), step)) from error
            fabric.backward(terms["objective"])
            objective.rest()
            if not torch.isfinite(terms["objective"] + learner.clip(options.max_norm)):
                raise ValueError(diverged("the objective or its gradient is not finite", step))
            learner.step()
            if step == start and not path.exists():  # there is nothing that other options could spoil
                session.begin()
            state["step"] = step + 1
            last = step + 1 == options.num_steps
            bar.update(options.batch_size * fabric.world_size)
            if step % 20 == 0 or last:
                figures = {key: value.item() for key, value in terms.items()}
                bar.set_postfix_str(" ".join(f"{key} {value:.3g}" for key, value in figures.items() if "/" not in key))
                metrics.add(step + 1, "train", {**figures, "seconds": time.monotonic() - began})
            if last or (step + 1) % options.validate_every == 0:
                look()
            if stopping := stop.requested(fabric, step):
                last = True
            if last or (step + 1) % options.save_every == 0:
                save(step + 1)
                saved = step + 1
            if stopping:
                line = f"{name}: saved at step {step + 1}; go on with `{go_on(run)}`"
                fabric.print(line, file=sys.stderr)
                sys.exit(128 + stopping)
    return learner.kept()


def fit_codebook(session: Session, data: Mapping[str, Images]) -> None:
    """Images to `codebook/`; where a prior is in the loop, that prior to `state/loop/`."""
    fabric, run = session.fabric, session.run
    began = time.monotonic()
    torch.manual_seed(step_seed(run.seed, "codebook", 0, 0))
    # A checkpoint has all weights, and what the run began with may be gone.
    model = run.model.build() if state_path(run, "codebook").exists() else first_model(run)
    objective = codebook_objective(run, model, data)
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
            kept.prior.trained_on = trained_on(run, kept.model, session.images)
            kept.prior.save_pretrained(run.run / "state" / "loop")
        if run.stage == "codebook":
            tell_of_stale_parts(run, kept.model)
    fabric.barrier()


def first_model(run: Run) -> Autoencoder:
    """What training starts from: fresh weights, or those of `--tokenizer`."""
    model = run.model.build()
    if run.tokenizer is not None:
        weights = Autoencoder.from_pretrained(run.tokenizer).state_dict()
        safefolder.folder.load_weights(model, weights, f"{run.tokenizer} (with this run's --model options)")
    return model


def fit_prior(session: Session, data: Mapping[str, Images]) -> None:
    """Latents of the training images to `prior/`, and what counts them to `unigram/` and `ngram/`."""
    fabric, run = session.fabric, session.run
    began = time.monotonic()
    if run.tokenizer is not None and not (run.run / "codebook").exists():
        fabric.barrier()  # all have looked
        session.begin()
        if fabric.is_global_zero:
            first_model(run).save_pretrained(run.run / "codebook")
        fabric.barrier()
    model = Autoencoder.from_pretrained(run.run / "codebook").to(fabric.device)
    of = trained_on(run, model, session.images)
    # The same start whether the codebook was trained just now or in an earlier, interrupted process.
    torch.manual_seed(step_seed(run.seed, "prior", 0, 0))
    prior = make_prior(run.prior, model, known_classes(run, model, data))
    in_loop = model
    if isinstance(model, VQVAE) and model.config.beta is not None:  # the prior in the loop goes on learning
        check_in_loop(run)
        prior = TransformerPrior.from_pretrained(run.run / "state" / "loop")
        check_parts(run, model, {"state/loop": prior})
        in_loop = copy.deepcopy(prior).to(fabric.device)
    known = prior_data(session, model, in_loop, data)
    if isinstance(prior, MixtureTransformerPrior):
        prior.standardise(drawn(prior, known.sample().cpu()))
    objective = PriorObjective(prior.train())
    watched = known.watched

    def validate(kept: PriorObjective) -> dict[str, float]:
        torch.manual_seed(step_seed(run.seed, "watched", 0, 0))
        latents = drawn(kept.prior, watched.latents.to(fabric.device))
        nats = rate(kept.prior, latents, to_device(watched.labels, fabric))
        return {"rate": nats.mean().item() / kept.prior.num_places}

    kept = fit(session, "prior", objective, known.batches, run.prior_fit, validate, began, of)
    if fabric.is_global_zero:
        if isinstance(model, VQVAE):
            for name, baseline in fit_baselines(model, known.parts()).items():
                baseline.trained_on = of
                baseline.save_pretrained(run.run / name)
        kept.prior.trained_on = of
        kept.prior.save_pretrained(run.run / "prior")
    fabric.barrier()


def evaluate_run(session: Session, data: Mapping[str, Images]) -> None:
    """What the run's saved parts are worth on the test images, to `elbo.json`; and the pictures."""
    fabric, run, metrics = session.fabric, session.run, session.metrics
    began = time.monotonic()
    model = Autoencoder.from_pretrained(run.run / "codebook").to(fabric.device)
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
    learned = list(priors.values())[-1]
    baselines = {name: priors[name] for name in ("unigram", "ngram") if name in priors}
    check_parts(run, model, {"prior": learned, **baselines})
    priors = {name: prior.eval().to(fabric.device) for name, prior in priors.items()}
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
    of = {"models": fingerprint(model, learned).hex(), "tokenizer": of_tokenizer(model), "split": "test"}
    of |= {"data": safefolder.cards.public_name(run.data.source), "data_digest": session.images["test"]["timeless"]}
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
