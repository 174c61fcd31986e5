"""The peer of `looks_peer`: diffusers' `VQModel`, trained by the recipe of diffusers' examples/vqgan.

The facts of the recipe are those of train_vqgan.py and discriminator.py there, at commit 58eb52c0 of August 2026; the
code is ours.

    images       from 0 to 1; every second batch trains the generator, the others the discriminator D
    generator    E (y − ŷ)² + the mean over depths of E (φ(y) − φ(ŷ))² + the quantizer's own loss − λ · E D(ŷ)
                 λ is the ratio of the gradients of the features' term and of E D at the decoder's last convolution, at
                 most 10⁴; all terms from the first step on
    codes        learn by gradient; codebook towards z_e with a weight of 1/4, z_e towards the codebook with 1 (which
                 is VQModel's default, the other way round than in the papers)
    D            3x3 convolutions of stride two under spectral norm, instance norms, LeakyReLU of 0.2, a sigmoid at
                 the end; E max(0, 1 + D(ŷ)) + E max(0, 1 − D(y)) + 10 · E (‖∇D(y)‖ − 1)²
    optimisers   AdamW for both: 1e-4 throughout, betas 0.9 and 0.999, decay 0.01, gradients clipped to 1; no average
                 of weights unless it is asked for

What differs: φ is EfficientNet-Lite0 at the patches' own size, as in our training, and not VGG19 at 224x224; with
`scaled` the error at each depth is divided by E φ(y)², which is about 60, since otherwise it is some 300 times that of
the pixels (the recipe's README warns of that). D has five convolutions of stride two and not six, which leave one pixel
of 64x64, and an instance norm refuses that. There is a fourth level, since f = 8, and widths are such that there are
about as many parameters as in our model. What a step throws away is not computed here: gradients of D in the
generator's step, and the generator's graph in D's.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from vqvae.looks import EfficientNetLite

# 1.08 million parameters with the codebook; ours has 1.03.
CHANNELS = (32, 32, 32, 64)
# In what type of numbers, and whether channels are last in memory.
SETTINGS = {
    f"peer, {name}{', channels last' * last}": (dtype, last)
    for name, dtype in (("float32", None), ("bfloat16", torch.bfloat16))
    for last in (False, True)
}


class Peer:
    """A model, its discriminator, and a step of one of them.

    Args:
        rate: learning rate of both.
        scaled: whether errors of features are relative.
        setting: one of `SETTINGS`.
    """

    def __init__(self, rate: float, scaled: bool, setting: str, num_codes: int):
        from diffusers import VQModel

        self.scaled = scaled
        self.dtype, last = SETTINGS[setting]
        self.form = torch.channels_last if last else torch.contiguous_format
        self.model = cast(Any, VQModel)(
            down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
            up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
            block_out_channels=CHANNELS,
            layers_per_block=2,
            latent_channels=4,
            vq_embed_dim=4,
            num_vq_embeddings=num_codes,
            norm_type="spatial",
        )
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 512)):
            norm = [] if inputs == 3 else [nn.InstanceNorm2d(outputs)]
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 3, 2, 1)), *norm, nn.LeakyReLU(0.2)]
        self.rival = nn.Sequential(*layers, nn.Conv2d(512, 1, 1), nn.Sigmoid())
        self.features = EfficientNetLite()
        self.parts: tuple[Any, Any] = (self.model, self.rival)
        for part in self.parts:
            part.to(memory_format=self.form)
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=rate, weight_decay=0.01) for part in self.parts]
        self.num_steps = 0

    def step(self, images: Tensor) -> float:
        """A step of the generator, or of the discriminator, in turns; its objective."""
        turn = self.num_steps % 2
        self.num_steps += 1
        real = (images.float() / 255).contiguous(memory_format=self.form)
        self.rival.requires_grad_(bool(turn))
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            objective = self._of_rival(real) if turn else self._of_generator(real)
        objective.backward()
        nn.utils.clip_grad_norm_(self.parts[turn].parameters(), 1.0)
        self.optimizers[turn].step()
        self.optimizers[turn].zero_grad()
        return objective.item()

    def _of_generator(self, real: Tensor) -> Tensor:
        fake, of_codes = self.model(real, return_dict=False)
        pairs = list(zip(self.features.maps(real), self.features.maps(fake), strict=True))
        sizes = [one.square().mean() if self.scaled else 1.0 for one, _ in pairs]
        errors = [F.mse_loss(one, other) / size for (one, other), size in zip(pairs, sizes, strict=True)]
        of_features = torch.stack(errors).mean()
        fooled = -self.rival(fake).float().mean()
        last = self.model.decoder.conv_out.weight
        lengths = [torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (of_features, fooled)]
        ratio = (lengths[0] / lengths[1].clamp(min=1e-8)).clamp(max=1e4)
        return F.mse_loss(fake.float(), real) + of_codes + of_features + ratio * fooled

    def _of_rival(self, real: Tensor) -> Tensor:
        with torch.no_grad():
            fake = self.model(real, return_dict=False)[0]
        real.requires_grad_()
        of_real, of_fake = self.rival(real), self.rival(fake)
        (slope,) = torch.autograd.grad(of_real.float().sum(), real, create_graph=True)
        penalty = 10 * (slope.flatten(1).norm(dim=1) - 1).square().mean()
        return (F.relu(1 + of_fake.float()) + F.relu(1 - of_real.float())).mean() + penalty


@torch.no_grad()
def tokenized(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of levels by a `VQModel`, and levels of what it makes of them."""
    z_e = model.encode(images.float() / 255).latents
    return model.quantize(z_e)[2][2], (255 * model.decode(z_e).sample.clamp(0, 1)).round().byte()
