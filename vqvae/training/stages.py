"""The three stages of a run: images to a codebook, its latents to a prior, and both to bits and pictures."""

import contextlib
import copy
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import safefolder
from priors import ContinuousPrior, MixtureTransformerPrior, Prior, TransformerPrior
from vqvae import VQVAE, Autoencoder, pictures
from vqvae.bound import rate
from vqvae.codec.model_fingerprint import fingerprint
from vqvae.data import Batch, Images, batches
from vqvae.evaluation import evaluate, images_at_once
from vqvae.fingerprint import of_tokenizer
from vqvae.levels import times
from vqvae.metrics import psnr
from vqvae.report.curves import Curves
from vqvae.report.figures import Figures
from vqvae.report.gallery import Gallery
from vqvae.report.page import write
from vqvae.report.run_page import RunContents, described, run_page
from vqvae.tokens.buckets import of_bucket
from vqvae.training.checks import check_in_loop
from vqvae.training.draft import fit_draft, wants_draft
from vqvae.training.images import say
from vqvae.training.latents import (
    Inputs,
    fit_baselines,
    sampled_latents,
    step_seed,
    to_device,
    with_progress,
)
from vqvae.training.loop import fit
from vqvae.training.networks import prepare
from vqvae.training.objectives import CodebookObjective, PriorObjective, RateAwareObjective, codebook_objective
from vqvae.training.options import Run
from vqvae.training.previews import Preview, reconstructions, sample_grid, samples
from vqvae.training.prior_data import NUM_WATCHED, known_class_names, known_classes, stored_or_encoded
from vqvae.training.prior_kinds import make_prior, name_of, untrained
from vqvae.training.progress import Progress, duration
from vqvae.training.refit import with_fitted_likelihood
from vqvae.training.reproducing import command_line, public_options
from vqvae.training.run_folder import Session, check_parts, state_path, tell_of_stale_parts, trained_on


def fit_codebook(session: Session, data: Mapping[str, Images]) -> None:
    """Images to `codebook/`; where a prior is in the loop, that prior to `state/loop/`."""
    fabric, run = session.fabric, session.run
    began = time.monotonic()
    torch.manual_seed(step_seed(run.seed, "codebook", 0, 0))
    # A checkpoint has all weights, and what the run began with may be gone.
    model = run.model.build() if state_path(run, "codebook").exists() else first_model(run)
    if run.train == "decoder" and not state_path(run, "codebook").exists():
        assert run.tokenizer is not None
        if of_tokenizer(model) != of_tokenizer(Autoencoder.from_pretrained(run.tokenizer)):
            raise ValueError(
                f"--train decoder leaves the codes of {run.tokenizer} as they are, and these --model options change "
                "them: leave out those of the quantizer and of the images' size"
            )
    objective = codebook_objective(run, model, data)
    prepare(run, objective)
    watched = next(batches(data["test"], NUM_WATCHED))

    def validate(kept: CodebookObjective | RateAwareObjective) -> dict[str, float]:
        usage = kept.model.usage()
        distortion, decibels = [], []
        looks: list[dict[str, Tensor]] = []
        for part in torch.arange(len(watched.images)).split(64):
            images = watched.images[part].to(fabric.device)
            labels = None if watched.labels is None else watched.labels[part].to(fabric.device)
            out = kept.encoder(labels)(images)
            usage.add(out.counted)
            distortion.append(out.distortion)
            reconstructions = kept.model.reconstruct(out)
            decibels.append(psnr(images, reconstructions))
            looks.append(kept.looks.measured(images, reconstructions) if kept.looks is not None else {})
        figures = {
            "distortion": torch.cat(distortion).mean().item() / kept.model.num_dims,
            "psnr": torch.cat(decibels).mean().item(),
            "usage": usage.usage,
            **{name: torch.cat([each[name] for each in looks]).mean().item() for name in looks[0]},
        }
        return figures if usage.perplexity is None else {**figures, "perplexity": usage.perplexity}

    def stream(**order: Any) -> Generator[Inputs, None, None]:
        how = {"num_workers": run.data.num_workers, "augment": run.data.augment}
        with contextlib.closing(batches(data["train"], **how, **order)) as found:
            for batch in found:
                yield Inputs(batch.images, batch.labels, batch.skipped)

    preview = Preview(fabric, reconstructions(fabric, watched), step_seed(run.seed, "preview", 0, 0) % 2**63)
    kept = fit(session, "codebook", objective, stream, run.codebook_fit, validate, preview, began, "img")
    if fabric.is_global_zero:
        model = _finished(session, kept.model, data["train"])
        if isinstance(kept, RateAwareObjective):
            kept.prior.trained_on = trained_on(run, model, session.images)
            kept.prior.save_pretrained(run.run / "state" / "loop")
        if run.stage == "codebook":
            tell_of_stale_parts(run, model)
        _tell_of_end(session, "codebook", run.codebook_fit.num_steps, began, "codebook/, reconstructions/")
    fabric.barrier()


def _finished(session: Session, model: Autoencoder, images: Images) -> Autoencoder:
    """What `codebook/` holds from here on: what is there, where it is of this training; else the model, written.

    The likelihood is fitted once, after training for the eye, whatever a later call is asked for.
    """
    run, folder = session.run, session.run.run / "codebook"
    if folder.is_dir() and _same_but_for_likelihood(saved := Autoencoder.from_pretrained(folder), model):
        return saved
    if run.looks.has_terms:
        seed = step_seed(run.seed, "likelihood", 0, 0) % 2**63
        model = with_fitted_likelihood(model, images, seed=seed, skip=session.metrics.skip)
        if model.likelihood_fit is not None:
            print(model.likelihood_fit, file=sys.stderr)
    model.save_pretrained(folder)
    return model


def _same_but_for_likelihood(one: Autoencoder, other: Autoencoder) -> bool:
    """Whether the weights of two models of one kind are equal in float32, those of their likelihoods apart."""
    weights = [
        {name: each.cpu() for name, each in model.state_dict().items() if not name.startswith("likelihood.")}
        for model in (one, other)
    ]
    return weights[0].keys() == weights[1].keys() and all(
        torch.equal(each.float(), weights[1][name].float()) for name, each in weights[0].items()
    )


def first_model(run: Run) -> Autoencoder:
    """What training starts from: fresh weights, or those of `--tokenizer`."""
    model = run.model.build()
    if run.tokenizer is not None:
        taken = Autoencoder.from_pretrained(run.tokenizer)
        safefolder.folder.load_weights(model, taken.state_dict(), f"{run.tokenizer} (with this run's --model options)")
        if model.config == taken.config:  # options without weights may make another model of the same
            model.likelihood_fit = taken.likelihood_fit  # until it is trained on
    return model


def fit_prior(session: Session, data: Mapping[str, Images]) -> None:
    """Latents of the training images to `prior/`, and what counts them to `unigram/` and `ngram/`."""
    fabric, run = session.fabric, session.run
    began = time.monotonic()
    if run.tokenizer is not None and not (run.run / "codebook").exists():
        first = first_model(run)  # before anything of the run is written: its weights may not fit
        fabric.barrier()  # all have looked
        session.begin()
        if fabric.is_global_zero:
            first.save_pretrained(run.run / "codebook")
        fabric.barrier()
    model = Autoencoder.from_pretrained(run.run / "codebook").to(fabric.device)
    of = trained_on(run, model, session.images)
    # The same start whether the codebook was trained just now or in an earlier, interrupted process.
    torch.manual_seed(step_seed(run.seed, "prior", 0, 0))
    prior = make_prior(run.prior, model, known_classes(run, model, data))
    guiding_prior = model
    if isinstance(model, VQVAE) and model.config.beta is not None:  # the prior in the loop goes on learning
        check_in_loop(run)
        prior = TransformerPrior.from_pretrained(run.run / "state" / "loop")
        check_parts(run, model, {"state/loop": prior})
        guiding_prior = copy.deepcopy(prior).to(fabric.device)
    prior.class_names = known_class_names(run, model, data)
    known = stored_or_encoded(session, model, guiding_prior, data)
    if isinstance(prior, MixtureTransformerPrior):
        prior.standardise(sampled_latents(prior, known.sample().cpu()))
    drafts = wants_draft(run, prior)
    objective = PriorObjective(prior.train())
    prepare(run, objective)
    watched = known.watched

    def validate(kept: PriorObjective) -> dict[str, float]:
        torch.manual_seed(step_seed(run.seed, "watched", 0, 0))
        latents = sampled_latents(kept.prior, watched.inputs.to(fabric.device))
        nats = rate(kept.prior, latents, to_device(watched.labels, fabric))
        return {"rate": nats.mean().item() / kept.prior.num_positions}

    preview = Preview(fabric, samples(model), step_seed(run.seed, "preview", 0, 0) % 2**63)
    kept = fit(session, "prior", objective, known.batches, run.prior_fit, validate, preview, began, "grid", of)
    if fabric.is_global_zero:
        if isinstance(model, VQVAE):
            for name, baseline in fit_baselines(model, known.parts()).items():
                baseline.trained_on = of
                baseline.save_pretrained(run.run / name)
        kept.prior.trained_on = of
        kept.prior.save_pretrained(run.run / "prior")
        _tell_of_end(session, "prior", run.prior_fit.num_steps, began, "prior/, samples/")
    fabric.barrier()
    if drafts:
        fit_draft(session, kept.prior, known, of)


def _tell_of_end(session: Session, stage: str, num_steps: int, began: float, made: str) -> None:
    """A line for the end of a stage: how long it took, what the test images say of it, and where to look.

    Args:
        began: when it began this time, of `time.monotonic`.
        made: what it left in the run's folder.
    """
    figures = " ".join(f"{name} {value:.3g}" for name, value in session.metrics.last(stage, "test").items())
    print(
        f"{stage}: {num_steps:,} steps done, {duration(time.monotonic() - began)} this time; test {figures}; "
        f"{session.run.run}/: {made}",
        file=sys.stderr,
    )


def evaluate_run(session: Session, data: Mapping[str, Images]) -> None:
    """What the run's saved parts are worth on the test images, to `elbo.json`; and the pictures."""
    fabric, run, metrics = session.fabric, session.run, session.metrics
    began = time.monotonic()
    model = Autoencoder.from_pretrained(run.run / "codebook").to(fabric.device)
    has_codes = isinstance(model, VQVAE)
    # Grids of too many axes have no n-grams.
    names = ("unigram", *(["ngram"] if (run.run / "ngram").is_dir() else [])) if has_codes else ()
    baselines = {name: Prior.from_pretrained(run.run / name) for name in names}
    learned = (Prior if has_codes else ContinuousPrior).from_pretrained(run.run / "prior")
    check_parts(run, model, {"prior": learned, **baselines})
    priors = {**untrained(model), **baselines, name_of(learned): learned}
    priors = {name: prior.eval().to(fabric.device) for name, prior in priors.items()}
    test, digest = data["test"], session.images["test"]["timeless"]
    if run.codes is not None and (some := of_bucket(run.codes, "test", test, multiple=model.factor)) is not None:
        say(f"evaluation is on the {len(some):,} of {len(test):,} test images that are of {times(model.size)}")
        test, digest = some, some.digest(range(len(some)), times=False)
    rows, size = range(len(test))[: run.test_images], images_at_once(*model.size)
    with Progress("evaluate", len(rows), "img") as bar:
        parts: Iterator[Batch] = batches(test, size)
        if len(rows) < len(test):
            parts = (test.__getitems__(rows[start : start + size]) for start in range(0, len(rows), size))
        stream = (part for part in with_progress(parts, bar, metrics) if len(part))
        gallery = Gallery()
        result = evaluate(model, priors, stream, observe_bounds=gallery.add)
    first = next(batches(test, 32))
    images = first.images.to(fabric.device)
    guiding_prior: Any = learned
    codes = model.through(guiding_prior, to_device(first.labels, fabric)).encode(images)
    columns = min(8, len(images))
    pictures.save_reconstructions(
        run.run / "reconstructions.png", images, model.decode(codes), columns, side=pictures.side_for(columns)
    )
    pictures.save_usage(run.run / "usage.png", result.code_usage)
    samples = pictures.to_png(sample_grid(model, learned, 8, run.seed))
    pictures.save_png(run.run / "samples.png", samples)
    seconds = metrics.seconds() + time.monotonic() - began
    of = {"models": fingerprint(model, learned).hex(), "tokenizer": of_tokenizer(model), "split": "test"}
    of |= {"data": safefolder.cards.public_name(run.data.source), "data_digest": digest}
    result.save(run.run / "elbo.json", seconds=seconds, seed=run.seed, **of)
    contents = RunContents(
        name=run.run.absolute().name,
        model=described(model, learned, name_of(learned)),
        data=of["data"],
        figures=Figures(plain=result.plain(seconds=seconds, **of)),
        gallery=gallery,
        usage=result.code_usage,
        curves=Curves.read(run.run),
        samples=samples,
        class_names=data["test"].class_names,
        columns=learned.class_names,
        options=public_options(run),
        command=command_line(run),
    )
    write(run.run / "report.html", run_page(contents))
    print(result.table(seconds))
    print(f"{run.run}/: report.html, elbo.json, reconstructions.png, samples.png, usage.png")
