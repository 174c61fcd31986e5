"""Quantizers, models, likelihoods and what is measured of them do on a GPU what they do on the CPU."""

import copy

import likelihood_worlds
import pytest
import torch
from device_worlds import DEVICES, check_same_there
from lanes import some
from quantizer_worlds import MEMBERS, ema, features, take_step
from torch import Tensor

from priors import TransformerPrior, UnigramPrior
from vqvae import VQGAN, VQVAE, GaussianVAE
from vqvae.bound import elbo, sampled_elbo
from vqvae.data import Batch
from vqvae.em import CategoricalPixels, GaussianPixels, Mixture
from vqvae.evaluation import evaluate
from vqvae.likelihoods import LocalContext, Normal
from vqvae.metrics import psnr, ssim
from vqvae.quantizers import GumbelQuantizer
from vqvae.tiling import Tiled

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


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", some((name for name, member in MEMBERS.items() if not member.extra), every=4))
def test_a_quantizer_gives_what_it_gives_on_the_cpu(name, device):
    """Training with its start, statistics, update and revival; evaluation, draws, decoding, and its state."""
    torch.manual_seed(0)
    fresh = MEMBERS[name].config.build()
    batches = [features(fresh.dim, 4, 5, 5, seed=seed) + 3 * seed for seed in range(3)]
    mask = (torch.arange(100) % 3 > 0).reshape(4, 5, 5)

    def run(place: torch.device) -> list[Tensor]:
        quantizer = copy.deepcopy(fresh).to(place)
        torch.manual_seed(1)
        for batch in batches:
            take_step(quantizer, batch.clone().to(place).requires_grad_())
        quantizer.eval()
        found = [*quantizer.state_dict().values()]
        z_e, valid = batches[0].to(place), mask.to(place)
        for q in (quantizer(z_e), quantizer(z_e, valid), quantizer.draw(z_e, valid)):
            found += [q.z_q, q.codes, *q.auxiliary.values(), q.entropy, q.log_posterior]
            found += [q.usage, q.perplexity, q.dead_codes, quantizer.decode(q.codes)]
        return [each.detach() for each in found]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", some(MODELS, every=2))
def test_a_model_gives_what_it_gives_on_the_cpu(name, device):
    torch.manual_seed(0)
    fresh = MODELS[name]()
    images = torch.randint(0, 256, (3, fresh.config.num_channels, 8, 8), dtype=torch.uint8, generator=seeded())
    large = images.repeat(1, 1, 6, 6)

    def run(place: torch.device) -> list[Tensor]:
        # In double precision, as gradients of a few random pixels are the differences of large numbers.
        model, levels = copy.deepcopy(fresh).double().to(place), images.to(place)
        torch.manual_seed(1)
        for _ in range(2):
            out = model(levels)
            (out.distortion.mean() / model.num_dims + sum(out.auxiliary.values())).backward()
            model.update()
        found = [each.grad for each in model.parameters() if each.grad is not None]
        model.eval()
        latents = model.encode(levels)
        drawn = model.draw(levels)
        found += [latents, model.encode((images.float() / 255).numpy()), model.decode(latents)]
        found += [model.decode(latents, sample=True, generator=torch.Generator(place).manual_seed(2))]
        found += [out.distortion, out.entropy, drawn.distortion, drawn.log_posterior, psnr(levels, found[-2])]
        if isinstance(model, VQVAE):
            found.append(model.decode(latents.tolist()))
            tiles = Tiled(model, tile=32)
            found += [codes := tiles.encode(large.to(place)), tiles.decode(codes)]
        return [each.detach() for each in found]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_bound_and_an_evaluation_are_those_of_the_cpu(device):
    torch.manual_seed(0)
    fresh = VQVAE(**SIZES, quantizer=GumbelQuantizer.Config(num_codes=16, dim=4), beta=1.0).eval()
    sizes = {"num_codes": 16, "grid": fresh.grid}
    guide = TransformerPrior(**sizes, num_classes=3, width=16, depth=1, num_heads=2).eval()
    counted = UnigramPrior(**sizes).fit(torch.arange(16).reshape(4, 2, 2))
    images = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)

    @torch.no_grad()
    def run(place: torch.device) -> list[Tensor]:
        model, prior, unigram = (copy.deepcopy(each).to(place) for each in (fresh, guide, counted))
        levels = images.to(place)
        torch.manual_seed(1)
        through = model.through(prior, [0, 1, 2])
        bounds = (elbo(through, prior, levels, [0, 1, 2]), sampled_elbo(through, prior, levels, 1, num_samples=2))
        found = [each for bound in bounds for each in (bound.rate, bound.distortion, bound.entropy)]
        found += [elbo(model, unigram, levels).rate, ssim(*[levels.repeat(1, 1, 2, 2)] * 2)]
        read = [Batch(images, torch.tensor([0, 1, 2]))]  # as a loader gives it, on the CPU
        result = evaluate(model, {"unigram": unigram, "transformer": prior}, read)
        figures = [result.bound.distortion, result.psnr, *result.bound.rate.values(), result.code_usage.usage]
        return [*found, torch.tensor(figures, dtype=torch.float64, device=place)]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pixels", [CategoricalPixels(), GaussianPixels(variance="shared")], ids=["levels", "gaussian"])
def test_a_mixture_gives_what_it_gives_on_the_cpu(pixels, device):
    torch.manual_seed(0)
    fresh = Mixture(num_components=3, shape=(1, 4, 4), pixels=pixels)
    images = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8)

    def run(place: torch.device) -> list[Tensor]:
        mixture = copy.deepcopy(fresh).to(place)
        mixture.fit(images, num_steps=3, generator=seeded(1))  # which may lie elsewhere
        drawn = mixture.sample(5, torch.Generator(place).manual_seed(2))
        return [mixture.log_prob(images.to(place)), drawn, *mixture.state_dict().values()]

    check_same_there(run, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", some(likelihood_worlds.MEMBERS))
def test_a_likelihood_gives_what_it_gives_on_the_cpu(name, device):
    fresh = likelihood_worlds.MEMBERS[name]()
    inputs = likelihood_worlds.some_features(fresh, dtype=torch.float32)
    images = likelihood_worlds.some_images(fresh)

    def run(place: torch.device) -> list[Tensor]:
        likelihood, levels = copy.deepcopy(fresh).to(place), images.to(place)
        given = inputs.clone().to(place).requires_grad_()
        score = likelihood.log_prob(levels, given)
        score.sum().backward()
        parameters = likelihood.symbol_parameters(levels, given)
        steps = torch.arange(-1, 256, device=place).expand(*images.shape, 257)
        found = [score, given.grad, likelihood.mean(given), likelihood.point_estimate(given), parameters]
        found += [likelihood.sample(given, torch.Generator(place).manual_seed(0)), likelihood.cdf(parameters, steps)]
        found += [likelihood.walk(given, lambda table: table.argmax(-1))]
        return [each.detach() for each in found]

    check_same_there(run, device)
