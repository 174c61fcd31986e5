"""What a decoder learns for the eye, beside its likelihood.

    objective  =  distortion per dimension + auxiliary terms
                + l1 · E|y − ŷ|  +  perceptual · d(y, ŷ)  +  adversarial · λ · G(ŷ)

ŷ is the likelihood's point estimate, with its gradient, and y the image, both from 0 to 1. λ is the ratio of the
lengths of the gradients of all terms before it and of G with respect to the decoder's last layer (Esser et al. 2021,
VQGAN), so that the adversarial weight means the same whatever the others are. Of several processes the gradients are
averaged before their lengths are taken: λ is that of one process with all their images. Of several batches a step each
has a λ of its own. The distortion stays that of the likelihood, and so stays a bound.

The discriminator is trained in the same loop, by an optimiser of its own, on the images and reconstructions of all
batches of the step.
"""

import functools
import math
import sys

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call

from vqvae.autoencoder import Autoencoder, Output
from vqvae.looks import VGG16, EfficientNetLite, PerceptualDistance
from vqvae.looks.discriminator import PatchDiscriminator, augmented, critic_loss, generator_loss, lecam
from vqvae.looks.perceptual import published_weights
from vqvae.quantizers.step_statistics import several_processes
from vqvae.training.options import LooksConfig

# The largest ratio of gradients, as of VQGAN.
_MOST_RATIO = 1e4
# Decay of the moving averages of logits.
_DECAY = 0.99
# Steps before anything is said of the discriminator, and gaps between logits that say that it wins or sees nothing.
_PATIENCE = 200
_WINS, _SEES_NOTHING = 4.0, 0.02


class LooksTerms:
    """The terms beside the likelihood. No module: its network is frozen, and no checkpoint has it.

    Attributes:
        rival: the discriminator's own objective; None without an adversarial term.
    """

    def __init__(self, options: LooksConfig, model: Autoencoder, num_steps: int):
        self.options = options
        self.rival = Rival(options, model.config.num_channels) if options.adversarial else None
        self.start = options.first_step(num_steps)

    @functools.cached_property
    def distance(self) -> PerceptualDistance | None:
        """Read when it is first used: a codebook that is finished needs none."""
        if not self.options.perceptual:
            return None
        with torch.random.fork_rng(devices=[]):  # fresh weights, soon replaced, would take the step's random numbers
            return _distance(self.options)

    def measured(self, images: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
        """Figures of each image, without weights, for levels."""
        if self.distance is None:
            return {}
        distance = self.distance.to(images.device)
        return {"perceptual_distance": distance(images.float() / 255, reconstructions.float() / 255)}

    def terms(
        self, model: Autoencoder, images: Tensor, out: Output, before: Tensor, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weighted terms to add to the objective, and figures beside it.

        Args:
            before: the sum of the terms that the model has itself.
            step: how many there were before this one.
        """
        options = self.options
        terms: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        real = model.to_levels(images).float() / 255
        fake = model.likelihood.point_estimate(out.features) / 255
        if options.l1:
            terms["l1"] = options.l1 * (real - fake).abs().mean()
        if self.distance is not None:
            terms["perceptual"] = options.perceptual * self.distance.to(real.device)(real, fake).mean()
        if self.rival is not None and step >= self.start:
            self.rival.seen.append((2 * real - 1, 2 * fake.detach() - 1))
            fooled = self.rival.fooled(2 * fake - 1)
            last = _last_layer(model.decoder)
            ratio = torch.zeros((), device=real.device)
            if torch.is_grad_enabled() and last.requires_grad:
                sums = (torch.stack([before, *terms.values()]).sum(), fooled)
                gradients = [torch.autograd.grad(each, last, retain_graph=True)[0] for each in sums]
                lengths = [each.norm() for each in _joint(gradients)]
                ratio = (lengths[0] / (lengths[1] + 1e-4)).clamp(0, _MOST_RATIO).detach()
            share = min(1.0, (step - self.start + 1) / max(1, options.ramp))
            terms["adversarial"] = options.adversarial * share * ratio * fooled
            figures["adaptive_weight"] = ratio
        return terms, figures


class Rival(nn.Module):
    """The discriminator as something to train: its loss on what the generator's last step saw.

    Attributes:
        seen: images and their reconstructions, from −1 to 1, of each batch of the step.
    """

    def __init__(self, options: LooksConfig, num_channels: int):
        super().__init__()
        self.options = options
        self.discriminator = PatchDiscriminator(
            num_channels=num_channels, width=options.width, num_halvings=options.num_halvings
        )
        self.register_buffer("averages", torch.zeros(2))  # of the logits of real and of fake images
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.told = False

    def fooled(self, fake: Tensor) -> Tensor:
        """The generator's loss, with a gradient to the reconstructions and none to the discriminator."""
        weights = {name: each.detach() for name, each in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, weights, (self._shown(fake),))
        return generator_loss(logits, self.options.loss)

    def forward(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        real = self._shown(real)
        if self.options.r1:
            real.requires_grad_()
        logits = self.discriminator(torch.cat([real, self._shown(fake)]))
        of_real, of_fake = logits.chunk(2)
        loss = critic_loss(of_real, of_fake, self.options.loss)
        means = torch.stack([of_real.mean(), of_fake.mean()]).float().detach()
        if self.options.lecam and self.num_updates > 0:
            loss = loss + self.options.lecam * lecam(of_real, of_fake, self.averages)
        if self.options.r1:
            (slope,) = torch.autograd.grad(of_real.float().sum(), real, create_graph=True)
            loss = loss + self.options.r1 / 2 * slope.square().sum((1, 2, 3)).mean()
        return {"objective": loss, "real": means[0], "fake": means[1]}

    def update(self, means: Tensor) -> None:
        """The moving averages, after a step."""
        self.averages.lerp_(means.to(self.averages.dtype), 1.0 if self.num_updates == 0 else 1 - _DECAY)
        self.num_updates += 1

    def tell(self) -> None:
        """One sentence, once, where the discriminator wins or sees nothing."""
        if self.told or self.num_updates < _PATIENCE:
            return
        gap = (self.averages[0] - self.averages[1]).item()
        if not math.isfinite(gap) or _SEES_NOTHING < gap < _WINS:
            return
        self.told = True
        if gap >= _WINS:
            what = "wins: reconstructions no longer fool it"
            advice = "lower --looks.learning-rate, or raise --looks.lecam or --looks.r1"
        else:
            what = "sees no difference between images and reconstructions"
            advice = "raise --looks.learning-rate, or lower --looks.adversarial"
        print(f"note: the discriminator {what} (logits {gap:.2g} apart); {advice}", file=sys.stderr)

    def _shown(self, images: Tensor) -> Tensor:
        shown = augmented(images) if self.options.augment else images
        return shown.to(next(self.discriminator.parameters()).dtype)


def smallest_sides(options: LooksConfig) -> dict[str, int]:
    """Pixels along a side that the networks of each term need."""
    smallest: dict[str, int] = {}
    if options.perceptual:
        smallest["perceptual"] = (VGG16 if options.network == "vgg16" else EfficientNetLite).smallest
    if options.adversarial:
        smallest["num-halvings"] = PatchDiscriminator.smallest(options.num_halvings)
    return smallest


def _distance(options: LooksConfig) -> PerceptualDistance:
    if options.network == "vgg16":
        published_weights()  # before half a gigabyte is downloaded
        return PerceptualDistance.lpips(VGG16())
    return PerceptualDistance(EfficientNetLite(size=0 if options.network == "lite0" else 2))


def _joint(gradients: list[Tensor]) -> list[Tensor]:
    """The means over all processes of gradients of one shape, by one reduction; all processes take part."""
    if not several_processes():
        return gradients
    sums = torch.stack(gradients).float()
    distributed.all_reduce(sums)
    return list(sums / distributed.get_world_size())


def _last_layer(decoder: nn.Module) -> Tensor:
    """The weights of the last convolution or product of a decoder, which has them in order."""
    return [each for each in decoder.parameters() if each.ndim > 1][-1]
