"""What the models are trained for."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from priors import ContinuousPrior, DraftHead, Prior, TransformerPrior
from priors.raster import RasterPrior
from vqvae import VQVAE
from vqvae.autoencoder import Autoencoder, Output
from vqvae.data import Images
from vqvae.model import VQVAEOutput
from vqvae.training.latents import sampled_latents
from vqvae.training.looks_objective import LooksTerms, Rival
from vqvae.training.options import Run, Schedule
from vqvae.training.prior_kinds import make_prior

# A prior joins in after this share of the steps, when codes have found their places: before, it would learn of codes
# that move, and its steps cost twice those without it. Its weight then grows over a further share.
START = 0.6
RAMP = 0.2
# Jacobi iterations of the prior in the loop in a step of training.
NUM_ITERATIONS = 1
# The share of a draft's guesses that is accepted, about, by which it is trained.
ACCEPTED = 0.6
# Steps that model and prior take before it is the other's turn, where they alternate.
TURN = 50


def codebook_objective(
    run: Run, model: Autoencoder, data: Mapping[str, Images]
) -> "CodebookObjective | RateAwareObjective":
    """What a codebook is trained for, with a fresh prior where one is in the loop."""
    looks = LooksTerms(run.looks, model, run.codebook_fit.num_steps) if run.looks.has_terms else None
    if isinstance(model, VQVAE) and model.config.beta is not None:
        prior = make_prior(run.prior, model, data["train"].num_classes if run.labels else None)
        assert isinstance(prior, TransformerPrior)
        return RateAwareObjective(model, prior, run.schedule, run.codebook_fit.num_steps)
    return CodebookObjective(model, looks, decoder_only=run.train == "decoder")


class CodebookObjective(nn.Module):
    """Distortion in nats per dimension plus the model's own terms and those for the eye, for a batch of images.

    Args:
        looks: the terms for the eye.
        decoder_only: whether encoder and codebook stay as they are, to the bit.
    """

    def __init__(self, model: Autoencoder, looks: LooksTerms | None = None, *, decoder_only: bool = False):
        super().__init__()
        self.model = model
        self.looks = looks
        self.decoder_only = decoder_only
        if decoder_only:
            for part in self._encoding():
                part.requires_grad_(False)
        if self.rival is not None:  # whose turn depends on it
            self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @property
    def rival(self) -> Rival | None:
        """The discriminator, which has an optimiser of its own."""
        return None if self.looks is None else self.looks.rival

    def _encoding(self) -> list[nn.Module]:
        return [part for name, part in self.model.named_children() if name not in ("decoder", "likelihood")]

    def train(self, mode: bool = True) -> "CodebookObjective":
        super().train(mode)
        if self.decoder_only:  # no statistics, no draws
            for part in self._encoding():
                part.eval()
        return self

    def forward(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        out = self.model(images)
        terms = {"distortion": out.distortion.mean() / self.model.num_dims, **out.auxiliary}
        if self.looks is None:
            return _summed(terms, out)
        before = torch.stack(list(terms.values())).sum()
        step = 0 if self.rival is None else int(self.num_updates)
        more, figures = self.looks.terms(self.model, images, out, before, step)
        return _summed(terms | more, out) | figures

    def encoder(self, labels: Tensor | None) -> Any:
        """What encodes images with these labels."""
        return self.model

    def rest(self) -> None:
        """After the backward pass: nothing rests."""

    def update(self) -> None:
        if not self.decoder_only:
            self.model.update()
        if self.rival is not None:
            self.num_updates += 1


class RateAwareObjective(nn.Module):
    """The same, with a prior in the loop for the last steps, which learns in the same steps or in turns.

    Its rate less the posterior's entropy comes to the objective with the weight beta, in nats per dimension too: with a
    beta of 1 the sum is the negative ELBO. What a model does without gradients, such as moving averages of a codebook,
    goes on in the prior's turns. Labels that the prior drops for guidance it drops anew at each look, so that the codes
    of some images are sampled by their label and paid for without it.

    Args:
        num_steps: of the whole training.
    """

    looks: LooksTerms | None = None
    rival = None

    def __init__(self, model: VQVAE, prior: TransformerPrior, schedule: Schedule, num_steps: int):
        super().__init__()
        assert model.config.beta is not None
        self.model = model
        self.prior = prior
        self.schedule = schedule
        self.beta = model.config.beta
        self.start = math.ceil(START * num_steps)
        self.num_ramp = max(1, math.ceil(RAMP * num_steps))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def forward(self, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        dims, since = self.model.num_dims, int(self.num_updates) - self.start
        if since < 0:
            out = self.model(images)
            # Several processes wait for a gradient of every weight; `rest` takes this one away.
            nothing = 0.0 * torch.stack([parameter.sum() for parameter in self.prior.parameters()]).sum()
            return _summed({"distortion": out.distortion.mean() / dims + nothing, **out.auxiliary}, out)
        beta = self.beta * min(1.0, (since + 1) / self.num_ramp)
        out = self.model(images, self.model.loop(self.prior, labels, len(images), beta, NUM_ITERATIONS))
        assert out.rate is not None
        rate, entropy = out.rate.mean(), out.entropy.mean()
        terms = {"distortion": out.distortion.mean() / dims, **out.auxiliary}
        terms |= {"rate": beta * rate / dims, "posterior_entropy": -beta * entropy / dims}
        return _summed(terms, out)

    def encoder(self, labels: Tensor | None) -> Any:
        """What encodes images with these labels: with the prior once it has joined in."""
        return self.model if self.num_updates < self.start else self.model.through(self.prior, labels)

    def rest(self) -> None:
        """After the backward pass: whose turn it is not has no gradient, and so stays."""
        since = int(self.num_updates) - self.start
        if since < 0:
            resting = self.prior
        elif self.schedule == "alternating":  # a prior that knows nothing yet goes first
            resting = self.model if since // TURN % 2 == 0 else self.prior
        else:
            return
        for parameter in resting.parameters():
            parameter.grad = None

    def update(self) -> None:
        self.num_updates += 1
        self.model.update()


def _summed(terms: dict[str, Tensor], out: Output) -> dict[str, Tensor]:
    return {"objective": torch.stack(list(terms.values())).sum(), **terms, **_state_of(out)}


def _state_of(out: Output) -> dict[str, Tensor]:
    """Figures beside the objective. Of codes: usage, perplexity and dead codes, means and those of each codebook."""
    if not isinstance(out, VQVAEOutput):
        return {"kl_per_image": out.counted.flatten(1).sum(1).mean()}
    state = {}
    for name in ("usage", "perplexity", "dead_codes"):
        values = getattr(out.quantized, name).float()
        state[name] = values.mean()
        state |= {f"{name}/{index}": value for index, value in enumerate(values.reshape(-1)) if values.ndim}
    return state


class PriorObjective(nn.Module):
    """Rate in nats per position, for a batch of latents; of Gaussian posteriors on a fresh draw."""

    rival = None

    def __init__(self, prior: Prior | ContinuousPrior):
        super().__init__()
        self.prior = prior

    def forward(self, values: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        known = None if self.prior.num_classes is None else labels
        per_position = -self.prior(sampled_latents(self.prior, values), known).mean() / self.prior.num_positions
        return {"objective": per_position, "rate": per_position}

    def rest(self) -> None:
        """After the backward pass: nothing rests."""

    def update(self) -> None:
        """Nothing moves outside the gradient."""


class DraftObjective(nn.Module):
    """Cross entropy of a head's guesses under a prior's conditionals, in nats per guess, for a batch of codes. Guesses
    further on weigh less, as they count only where those before are accepted.

    The prior is no part of it: it learns nothing, and a checkpoint need not hold it again.
    """

    rival = None

    def __init__(self, head: DraftHead, prior: RasterPrior):
        super().__init__()
        self.head = head
        self._prior = [prior.eval()]

    @property
    def prior(self) -> RasterPrior:
        return self._prior[0]

    def forward(self, codes: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        known = None if self.prior.num_classes is None else labels
        with torch.no_grad():
            features, expected = self.prior.features_and_conditionals(codes, known)
        total, weights, flat = codes.new_zeros((), dtype=expected.dtype), 0.0, codes.flatten(1)
        for number, (guess, positions) in enumerate(self.head.guesses(self.prior, features, flat)):
            chances, weight = expected[:, -positions.shape[1] :].exp(), ACCEPTED**number
            total, weights = total - weight * (chances * guess).sum(-1).mean(), weights + weight
        return {"objective": total / weights}

    @torch.no_grad()
    def accepted(self, codes: Tensor, labels: Tensor | None) -> Tensor:
        """The probability of acceptance of each guess in a row, as `DraftHead.accepted`."""
        known = None if self.prior.num_classes is None else labels
        features, expected = self.prior.features_and_conditionals(codes, known)
        found = torch.zeros_like(self.head.accepted)
        for number, (guess, positions) in enumerate(self.head.guesses(self.prior, features, codes.flatten(1))):
            chances = expected[:, -positions.shape[1] :].exp()
            found[number] = torch.minimum(chances, guess.exp()).sum(-1).mean()
        return found

    def rest(self) -> None:
        """After the backward pass: nothing rests."""

    def update(self) -> None:
        """Nothing moves outside the gradient."""
