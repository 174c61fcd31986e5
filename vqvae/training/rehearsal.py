"""What a run will cost: a few steps of its stages on weights that are thrown away.

Nothing of the run is touched: models, optimisers and orders are of their own, nothing is written but into the cache of
shrunk images, which changes no result, and random numbers are put back as they were. A step that is the first of its
kind is not counted, as it also loads, compiles and starts workers. Codes that a prior is tried on are random, since a
step costs the same whatever the codes are.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any

import torch
from lightning_fabric import Fabric

from vqvae import VQVAE, Autoencoder
from vqvae.data import Images, batches
from vqvae.evaluation import evaluate
from vqvae.training.costs import Costs
from vqvae.training.latents import Encoding, Inputs, encode, on_device, to_device
from vqvae.training.learner import Learner, Objective, mean_terms
from vqvae.training.networks import prepare
from vqvae.training.objectives import START, PriorObjective, RateAwareObjective, codebook_objective
from vqvae.training.options import FitConfig, Run
from vqvae.training.prior_data import NUM_WATCHED, known_classes, rows_seen
from vqvae.training.prior_kinds import make_prior, name_of, untrained
from vqvae.training.records import Metrics

# Steps that are counted: at least so many, and until they have taken so long.
LEAST_STEPS, MOST_STEPS, SECONDS = 3, 50, 2.0
# Images that are encoded and evaluated, after a few that are not counted.
NUM_IMAGES, NUM_FIRST = 16, 2
# A validation is a forward pass of the watched images, a third of a step.
FORWARD = 1 / 3


def rehearse(
    fabric: Fabric, metrics: Metrics, run: Run, model: Autoencoder, data: Mapping[str, Images], wanted: Collection[str]
) -> Costs:
    """What the stages of a run cost; all processes take part, and get the same.

    Args:
        model: as the run begins with it; it is trained here.
        data: images by split; none where the run has codes.
        wanted: the stages that are to be done.
    """
    device = fabric.device
    with (
        torch.random.fork_rng([] if device.index is None else [device], device_type=device.type),
        _let_go_of(),
    ):
        torch.manual_seed(run.seed)
        costs = _costs(fabric, metrics, run, model, data, wanted)
    found = fabric.all_reduce(
        torch.tensor([costs.codebook, costs.prior, costs.encoding, costs.evaluation], device=device), reduce_op="max"
    )
    assert isinstance(found, torch.Tensor)
    codebook, prior, encoding, evaluation = found.tolist()
    return Costs(codebook=codebook, prior=prior, encoding=encoding, evaluation=evaluation)


@contextlib.contextmanager
def _let_go_of() -> Iterator[None]:
    """What was made for it is let go of, also on a GPU."""
    try:
        yield
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _costs(
    fabric: Fabric, metrics: Metrics, run: Run, model: Autoencoder, data: Mapping[str, Images], wanted: Collection[str]
) -> Costs:
    found: dict[str, float] = {}
    # Of a tokenized set that comes without its images as many as can be.
    num_watched = min(NUM_WATCHED, len(data["test"])) if data else NUM_WATCHED
    if "codebook" in wanted:
        found["codebook"] = _codebook(fabric, run, model, data)
    model = model.to(fabric.device).eval()
    if "prior" not in wanted and "evaluate" not in wanted:
        return Costs(**found)
    prior: Any = make_prior(run.prior, model, known_classes(run, model, data)).to(fabric.device)
    encoding = Encoding(fabric=fabric, metrics=metrics, seed=run.seed, model=model, guiding_prior=prior)
    if "prior" in wanted:
        an_image = _an_encoding(encoding, data) if data and run.codes is None else 0.0
        objective = PriorObjective(prior)
        prepare(run, objective)
        found["prior"] = _step(fabric, objective, _random_latents(run, model, prior), run.prior_fit)
        found["prior"] += _validation(found["prior"], run.prior_fit, num_watched)
        if run.live:
            found["prior"] += an_image * run.prior_fit.batch_size * run.prior_fit.accumulate
        elif data:
            rows = rows_seen(run, len(data["train"]), fabric.world_size)
            num_encoded = len(data["train"]) / fabric.world_size if rows is None else len(rows)
            found["encoding"] = an_image * (num_encoded + num_watched)
    if "evaluate" in wanted and data:
        num_images = len(range(len(data["test"]))[: run.test_images])
        found["evaluation"] = num_images * _evaluation(fabric, model, prior, data)
    return Costs(**found)


def _codebook(fabric: Fabric, run: Run, model: Autoencoder, data: Mapping[str, Images]) -> float:
    """Seconds a step, on average: a discriminator and a prior in the loop join in later."""
    options = run.codebook_fit
    objective = codebook_objective(run, model, data)
    prepare(run, objective)
    joins = None
    if objective.rival is not None:
        joins = run.looks.first_step(options.num_steps) / options.num_steps
    elif isinstance(objective, RateAwareObjective):
        joins = START

    def stream() -> Generator[Inputs, None, None]:
        world = {"rank": fabric.global_rank, "world_size": fabric.world_size}
        order: dict[str, Any] = {"batch_size": options.batch_size, "seed": run.seed, **world}
        how: dict[str, Any] = {"num_workers": run.data.num_workers, "augment": run.data.augment}
        with contextlib.closing(batches(data["train"], **how, **order)) as found:
            for batch in found:
                yield Inputs(batch.images, batch.labels)

    with contextlib.closing(stream()) as incoming:
        learner = Learner(fabric, objective, options)
        cost = _steps(learner, incoming, options)
        if joins is not None:
            objective.num_updates.fill_(options.num_steps - 1)  # pyrefly: ignore[not-callable]
            cost = joins * cost + (1 - joins) * _steps(learner, incoming, options)
    return cost + _validation(cost, options, min(NUM_WATCHED, len(data["test"])))


def _validation(step: float, options: FitConfig, num_watched: int) -> float:
    """A step's share of validations."""
    each = options.batch_size * options.accumulate
    return FORWARD * step * num_watched / each / options.validate_every


def _random_latents(run: Run, model: Autoencoder, prior: Any) -> Iterator[Inputs]:
    num = run.prior_fit.batch_size
    classes = prior.num_classes
    while True:
        labels = None if classes is None else torch.randint(classes, (num,))
        if isinstance(model, VQVAE):
            yield Inputs(torch.randint(model.num_codes, (num, *model.grid)), labels)
        else:
            yield Inputs(torch.randn(num, *prior.grid, 2 * prior.dim), labels)


def _step(fabric: Fabric, objective: Objective, incoming: Iterator[Inputs], options: FitConfig) -> float:
    return _steps(Learner(fabric, objective, options), incoming, options)


def _steps(learner: Learner, incoming: Iterator[Inputs], options: FitConfig) -> float:
    """Seconds a step, as `fit` takes them."""
    fabric, parts = learner.fabric, options.accumulate
    learner.objective.train()

    def step() -> None:
        learner.set_rate(1e-3)
        found = []
        for number in range(parts):
            batch = next(incoming)
            with learner.accumulating(number + 1 < parts):
                part = learner.module(on_device(batch.inputs, fabric.device), to_device(batch.labels, fabric))
                fabric.backward(part["objective"] / parts)
            found.append({key: value.detach() for key, value in part.items()})
        mean_terms(found)
        learner.objective.rest()
        learner.clip(options.max_norm).item()
        learner.step()
        learner.step_rival()

    step()
    return _timed(fabric, step)


def _timed(fabric: Fabric, work: Callable[[], object]) -> float:
    """Seconds of a call, the mean of several, in step with other processes."""
    began, took, num = time.monotonic(), 0.0, 0
    while num < LEAST_STEPS or (took < SECONDS and num < MOST_STEPS):
        work()
        num += 1
        _wait(fabric)
        passed = fabric.all_reduce(torch.tensor(time.monotonic() - began, device=fabric.device), reduce_op="max")
        assert isinstance(passed, torch.Tensor)
        took = passed.item()
    return took / num


def _wait(fabric: Fabric) -> None:
    if fabric.device.type == "cuda":
        torch.cuda.synchronize(fabric.device)


def _an_encoding(encoding: Encoding, data: Mapping[str, Images]) -> float:
    """Seconds an image, with reading it."""
    images = data["train"]
    generator = torch.Generator(encoding.fabric.device).manual_seed(0)
    num = min(NUM_IMAGES, len(images))

    def work(num: int) -> None:
        batch = images.__getitems__(range(num))
        if len(batch.images):
            encode(encoding, batch, generator).cpu()

    work(min(NUM_FIRST, num))
    began = time.monotonic()
    work(num)
    return (time.monotonic() - began) / num


def _evaluation(fabric: Fabric, model: Autoencoder, prior: Any, data: Mapping[str, Images]) -> float:
    """Seconds an image, by some of the test images; the first process alone does it."""
    batch = data["test"].__getitems__(range(min(NUM_IMAGES, len(data["test"]))))
    if not fabric.is_global_zero or not len(batch.images):
        return 0.0
    priors = {name: each.to(fabric.device) for name, each in untrained(model).items()}
    priors[name_of(prior)] = prior.eval()
    evaluate(model, priors, [batch[:NUM_FIRST]])
    began = time.monotonic()
    evaluate(model, priors, [batch])
    return (time.monotonic() - began) / len(batch.images)
