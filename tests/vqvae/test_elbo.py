"""The bound on a world small enough to enumerate: 2x2 images of 2 levels, one of 2 codes."""

import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vqvae.bound import ELBO, elbo

NUM_CODES = 2
IMAGES = torch.tensor(list(itertools.product((0, 1), repeat=4))).to(torch.uint8).view(16, 1, 2, 2)


def distribution(*shape: int, seed: int) -> Tensor:
    """Random distributions over the last axis, some of them uneven."""
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (2 * logits).softmax(-1)


class World:
    """Tables of a population, an encoder, a prior and a decoder over all 16 images and 2 codes."""

    def __init__(self, seed: int, *, deterministic: bool) -> None:
        self.population = distribution(16, seed=seed)
        self.encoder = distribution(16, NUM_CODES, seed=seed + 1)
        if deterministic:
            self.encoder = torch.eye(NUM_CODES, dtype=torch.float64)[self.encoder.argmax(1)]
        self.prior = distribution(NUM_CODES, seed=seed + 2)
        # The decoder's pixels are independent, as a factorised likelihood's are.
        pixels = distribution(NUM_CODES, 4, 2, seed=seed + 3)
        levels = IMAGES.flatten(1).long()
        self.decoder = torch.ones(NUM_CODES, 16, dtype=torch.float64)
        for i in range(4):
            self.decoder *= pixels[:, i, levels[:, i]]

    def log_evidence(self) -> Tensor:
        """ln P(y) = ln sum_z P_pri(z) P_dec(y | z) of each image."""
        return (self.prior @ self.decoder).log()

    def optimum(self) -> float:
        """H(Pop) + KL(Pop(y) P_enc(z | y) || P_pri(z) P_dec(y | z)), summed term by term."""
        entropy = divergence = 0.0
        for y in range(16):
            entropy -= self.population[y].item() * math.log(self.population[y].item())
            for z in range(NUM_CODES):
                here = (self.population[y] * self.encoder[y, z]).item()
                model = (self.prior[z] * self.decoder[z, y]).item()
                divergence += here * math.log(here / model) if here else 0.0
        return entropy + divergence


SEEDS = range(5)


def bound_of(world: World, posterior: Tensor) -> ELBO:
    return ELBO(
        rate=-(posterior * world.prior.log()).sum(1),
        distortion=-(posterior * world.decoder.log().T).sum(1),
        entropy=-torch.xlogy(posterior, posterior).sum(1),
    )


def check_bound(world: World, bound: ELBO) -> None:
    """Never below the evidence, and on average what the theorem says."""
    assert (bound.negative >= -world.log_evidence() - 1e-12).all()
    mean = (world.population * bound.negative).sum().item()
    assert mean == pytest.approx(world.optimum(), abs=1e-10)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_bound_and_its_mean(seed, deterministic):
    world = World(seed, deterministic=deterministic)
    assert world.decoder.sum(1).allclose(torch.ones(2, dtype=torch.float64))  # over all images
    bound = bound_of(world, world.encoder)
    assert (bound.entropy == 0).all() == deterministic
    check_bound(world, bound)


def test_bound_is_tight_at_the_posterior():
    world = World(0, deterministic=False)
    joint = (world.prior[:, None] * world.decoder).T
    bound = bound_of(world, joint / joint.sum(1, keepdim=True))
    torch.testing.assert_close(bound.negative, -world.log_evidence(), atol=1e-12, rtol=0)


class TableModel:
    """A deterministic encoder and a decoder as tables, with the interface of a model."""

    grid = (1, 1)

    def __init__(self, world: "World | InvertibleWorld") -> None:
        self.world = world
        self.num_codes = len(world.decoder)

    def __call__(self, images: Tensor) -> SimpleNamespace:
        places = torch.tensor([8, 4, 2, 1])
        index = (images.flatten(1).long() * places).sum(1)
        codes = self.world.encoder.argmax(1)[index]
        return SimpleNamespace(
            distortion=-self.world.decoder[codes, index].log(),
            latents=codes.view(-1, 1, 1),
            entropy=torch.zeros(len(images), dtype=torch.float64),
        )


class TablePrior:
    """A prior as a table; one for each label where there are labels."""

    grid = (1, 1)

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.num_codes = table.shape[-1]
        self.num_classes = len(table) if table.ndim > 1 else None

    def log_prob(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        table = self.table if labels is None else self.table[labels]
        return table.log().expand(len(codes), -1).gather(1, codes.flatten(1))[:, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_elbo_of_a_model_and_a_prior(seed):
    world = World(seed, deterministic=True)
    model, prior = TableModel(world), TablePrior(world.prior)
    bound = elbo(model, prior, IMAGES)
    check_bound(world, bound)
    # A prior without classes has no use for labels.
    assert torch.equal(elbo(model, prior, IMAGES, torch.arange(16) % 3).rate, bound.rate)


class InvertibleWorld:
    """Each of the 16 images has a code of its own; prior and decoder are the best there are for that.

    They are the marginal and the conditional of the joint distribution of images and codes. The decoder is a table over
    whole images. What it says of codes that no image has does not matter.
    """

    def __init__(self, seed: int, num_codes: int) -> None:
        self.population = distribution(16, seed=seed)
        codes = torch.randperm(num_codes, generator=torch.Generator().manual_seed(seed))[:16]
        self.encoder = torch.eye(num_codes, dtype=torch.float64)[codes]
        joint = self.population[:, None] * self.encoder
        self.prior = joint.sum(0)
        used = self.prior > 0
        self.decoder = torch.full((num_codes, 16), 1 / 16, dtype=torch.float64)
        self.decoder[used] = (joint / self.prior).T[used]

    def bound(self, prior: Tensor) -> ELBO:
        return elbo(TableModel(self), TablePrior(prior), IMAGES)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_codes", [16, 25])
def test_an_invertible_encoder_costs_each_image_its_surprise(seed, num_codes):
    """After exact optimisation of prior and decoder the loss of each image y is -ln Pop(y), all of it rate."""
    world = InvertibleWorld(seed, num_codes)
    codes = world.encoder.argmax(1)
    assert len(set(codes.tolist())) == 16
    assert torch.equal(world.prior[codes], world.population)
    assert torch.equal(world.decoder[codes], torch.eye(16, dtype=torch.float64))
    bound = world.bound(world.prior)
    torch.testing.assert_close(bound.negative, -world.population.log(), rtol=0, atol=1e-10)
    assert (bound.distortion == 0).all()
    assert (bound.entropy == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_no_prior_beats_the_histogram_of_the_codes(seed):
    """Any other pays KL(histogram ‖ prior) more on average, though some images may cost less."""
    world = InvertibleWorld(seed, 16)
    least = (world.population * world.bound(world.prior).negative).sum()
    torch.testing.assert_close(least, torch.special.entr(world.population).sum(), rtol=0, atol=1e-10)
    for share in (0.01, 0.3, 1.0):
        prior = torch.lerp(world.prior, distribution(16, seed=seed + 1000), share)
        negative = world.bound(prior).negative
        mean = (world.population * negative).sum()
        divergence = (world.prior * (world.prior / prior).log()).sum()
        assert divergence > 0
        torch.testing.assert_close(mean, least + divergence, rtol=0, atol=1e-10)
        assert (negative < -world.population.log()).any()
    # The mean is convex in the prior's logits, so where its gradient is zero it is least.
    logits = world.prior.log().requires_grad_()
    (gradient,) = torch.autograd.grad((world.population * world.bound(logits.softmax(0)).negative).sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


def test_labels_are_paid_for():
    """With labels the bound is on P(y) still, the prior being the mean over its classes."""
    world = World(0, deterministic=True)
    tables = distribution(3, NUM_CODES, seed=7)
    labels = torch.arange(16) % 3
    bound = elbo(TableModel(world), TablePrior(tables), IMAGES, labels)
    codes = world.encoder.argmax(1)
    torch.testing.assert_close(bound.rate, math.log(3) - tables[labels, codes].log())
    world.prior = tables.mean(0)
    assert (bound.negative >= -world.log_evidence()).all()


def test_uniform_levels_are_eight_bits():
    dims = 3 * 32 * 32
    distortion = torch.full((5,), dims * math.log(256), dtype=torch.float64)
    nothing = torch.zeros(5, dtype=torch.float64)
    bound = ELBO(rate=nothing, distortion=distortion, entropy=nothing)
    assert (bound.bits_per_dim(dims) == 8).all()
    assert (
        ELBO(rate=torch.tensor([1.0]), distortion=torch.tensor([20.0]), entropy=torch.tensor([300.0])).negative == -279
    )


def test_bad_terms(untyped):
    two = torch.zeros(2)
    with pytest.raises(ValueError, match=r"'entropy': \(1,\).*expected \(b,\)"):
        ELBO(rate=two, distortion=two, entropy=two[:1])
    with pytest.raises(ValueError, match="got num_dims=0"):
        ELBO(rate=two, distortion=two, entropy=two).bits_per_dim(0)


@pytest.mark.parametrize(("num_codes", "grid"), [(3, (1, 1)), (NUM_CODES, (1, 2))])
def test_prior_of_other_codes(num_codes, grid):
    world = World(0, deterministic=True)
    prior = TablePrior(world.prior)
    prior.num_codes, prior.grid = num_codes, grid
    with pytest.raises(ValueError, match=re.escape(f"a prior of num_codes={num_codes}, grid={grid} for a model")):
        elbo(TableModel(world), prior, IMAGES)
