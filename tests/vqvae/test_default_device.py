"""Quantizers, models and likelihoods make tensors on their inputs' device alone, and never of torch's default type."""

import copy

import likelihood_worlds
import pytest
import torch
from default_worlds import check_same_under_any_default
from lanes import some
from quantizer_worlds import MEMBERS, Member, codebooks, ema, features, grouped, projected, residual, take_step
from torch import Tensor

from priors import TransformerPrior, UnigramPrior
from vqvae import VQGAN, VQVAE, GaussianVAE
from vqvae.bound import elbo, sampled_elbo
from vqvae.em import CategoricalPixels, GaussianPixels, Mixture
from vqvae.likelihoods import LocalContext, Normal
from vqvae.metrics import psnr, ssim
from vqvae.quantizers import BSQ, FSQ, LFQ, GumbelQuantizer

WORLDS = {
    **{name: member for name, member in MEMBERS.items() if not member.extra},
    "residual grouped lfq": Member(config=residual(grouped(LFQ.Config(num_bits=5)), depth=2)),
    "more codes than vectors": Member(config=ema(num_codes=600)),
    "projected residual grouped bsq": Member(config=projected(residual(grouped(BSQ.Config(num_bits=6)), depth=2))),
}


@pytest.mark.parametrize("name", some(WORLDS, every=5))
def test_case_24_a_quantizer_keeps_to_its_device_and_type(name):
    """Training with its start, update and revival, evaluation, draws, decoding."""
    torch.manual_seed(0)
    fresh = WORLDS[name].config.build()
    batches = [features(fresh.dim, 4, 5, 5, seed=seed) + 3 * seed for seed in range(3)]
    mask = (torch.arange(100) % 3 > 0).reshape(4, 5, 5)

    def run() -> list[Tensor]:
        quantizer = copy.deepcopy(fresh)
        torch.manual_seed(1)
        for batch in batches:
            take_step(quantizer, batch.clone().requires_grad_())
        quantizer.eval()
        found = [*quantizer.state_dict().values()]
        for q in (quantizer(batches[0]), quantizer(batches[0], mask), quantizer.draw(batches[0], mask)):
            found += [q.z_q, q.codes, *q.auxiliary.values(), q.entropy, q.log_posterior]
            found += [q.usage, q.perplexity, q.dead_codes, quantizer.decode(q.codes)]
        return [each.detach() for each in found]

    check_same_under_any_default(run)


def test_case_24_what_makes_steps_finer_lives_with_the_parts():
    """The fault as it was reported: a residual quantizer around a grouped one, all of it on another device."""
    for config in (
        residual(grouped(FSQ.Config(levels=(5, 4))), depth=2),
        residual(residual(grouped(ema(dim=3)), depth=2), depth=2),
    ):
        quantizer = config.build().to("meta")
        z_e = torch.zeros(2, 3, 3, quantizer.dim, device="meta")
        q = quantizer.run(z_e, None)
        assert {each.device.type for each in (q.z_q, q.codes, *q.auxiliary.values())} == {"meta"}
        finer = quantizer.steps[0].residual_scale()
        assert finer.device.type == "meta"
        assert quantizer.look_up(q.codes).device.type == "meta"


def test_a_model_that_is_made_without_memory_takes_none():
    """As one is that a folder's config asks for, before its weights are looked at."""
    with torch.device("meta"):
        made = [member.config.build() for member in WORLDS.values()] + [make() for make in MODELS.values()]
        made += [make() for make in likelihood_worlds.MEMBERS.values()]
    for module in made:
        assert {each.device.type for each in (*module.parameters(), *module.buffers())} <= {"meta"}
        for part in codebooks(module):
            assert part.pool.vectors.is_meta
            assert part.sums_of_step["counts"].is_meta


SIZES = {"image_size": 8, "width": 8, "num_blocks": 1, "downsampling": 4}
MODELS = {
    "gumbel, colour": lambda: VQVAE(**SIZES, num_channels=3, quantizer=GumbelQuantizer.Config(num_codes=16, dim=4)),
    "local context": lambda: VQVAE(**SIZES, quantizer=ema(), likelihood=LocalContext.Config(width=8, num_blocks=1)),
    "attention": lambda: VQVAE(**{**SIZES, "width": 32}, attention=True, smooth=True, quantizer=ema()),
    "gaussian": lambda: GaussianVAE(**SIZES, dim=3, free_bits=0.1),
    "vqgan": lambda: VQGAN(
        image_size=8,
        channels=(32, 32),
        num_blocks=1,
        latent_channels=4,
        down_attention=(1,),
        spatial_norm=True,
        quantizer=ema(dim=4),
        likelihood=Normal.Config(),
    ),
}


@pytest.mark.parametrize("name", some(MODELS, every=4))
def test_case_24_a_model_keeps_to_its_device_and_type(name):
    torch.manual_seed(0)
    fresh = MODELS[name]()
    shape = (3, fresh.config.num_channels, 8, 8)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    floats = images.float() / 255

    def run() -> list[Tensor]:
        model = copy.deepcopy(fresh)
        torch.manual_seed(1)
        for _ in range(2):
            out = model(images)
            (out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())).backward()
            model.update()
        model.eval()
        latents = model.encode(floats)
        usage = model.usage()
        usage.add(out.counted)
        drawn = model.draw(images)
        generator = torch.Generator().manual_seed(2)
        found = [latents, model.decode(latents), model.decode(latents, sample=True, generator=generator)]
        found += [out.distortion, out.entropy, drawn.distortion, drawn.log_posterior, psnr(images, found[1])]
        found += [torch.tensor([usage.usage], dtype=torch.float64, device="cpu")]
        return [each.detach() for each in found]

    check_same_under_any_default(run)


def test_case_24_the_bound_keeps_to_its_device_and_type():
    torch.manual_seed(0)
    model = VQVAE(**SIZES, quantizer=GumbelQuantizer.Config(num_codes=16, dim=4), beta=1.0).eval()
    prior = TransformerPrior(num_codes=16, grid=model.grid, num_classes=3, width=16, depth=1, num_heads=2).eval()
    unigram = UnigramPrior(num_codes=16, grid=model.grid).fit(torch.arange(16).reshape(4, 2, 2))
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)

    @torch.no_grad()
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        through = model.through(prior, [0, 1, 2])
        bounds = (elbo(through, prior, images, [0, 1, 2]), sampled_elbo(through, prior, images, 1, num_samples=2))
        found = [each for bound in bounds for each in (bound.rate, bound.distortion, bound.entropy)]
        return [*found, elbo(model, unigram, images).rate, ssim(*[images.repeat(1, 1, 2, 2)] * 2)]

    check_same_under_any_default(run)


@pytest.mark.parametrize("pixels", [CategoricalPixels(), GaussianPixels(variance="shared")], ids=str)
def test_case_24_a_mixture_keeps_to_its_device_and_type(pixels):
    torch.manual_seed(0)
    fresh = Mixture(num_components=3, shape=(1, 4, 4), pixels=pixels)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)

    def run() -> list[Tensor]:
        mixture = copy.deepcopy(fresh)
        fit = mixture.fit(images, num_steps=3, generator=torch.Generator().manual_seed(1))
        drawn = mixture.sample(5, torch.Generator().manual_seed(2))
        return [fit.objective, fit.negative_elbo, mixture.log_prob(images), drawn, *mixture.state_dict().values()]

    check_same_under_any_default(run)


@pytest.mark.parametrize("name", some(likelihood_worlds.MEMBERS, every=6))
def test_case_24_a_likelihood_keeps_to_its_device_and_type(name):
    likelihood = likelihood_worlds.MEMBERS[name]()
    features = likelihood_worlds.some_features(likelihood, dtype=torch.float32)
    images = likelihood_worlds.some_images(likelihood)
    levels = torch.arange(-1, 256, device="cpu").expand(*images.shape, 257)

    def run() -> list[Tensor]:
        parameters = likelihood.symbol_parameters(images, features)
        drawn = likelihood.sample(features, torch.Generator().manual_seed(0))
        found = [likelihood.log_prob(images, features), likelihood.mean(features), likelihood.point_estimate(features)]
        found += [drawn, parameters, likelihood.cdf(parameters, levels), *likelihood.order(3, 3)]
        found += [likelihood.walk(features, lambda table: table.argmax(-1))]
        return [each.detach() for each in found]

    check_same_under_any_default(run)
