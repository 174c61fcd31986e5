"""What tells reconstructions from images: a PatchGAN (Isola et al. 2017), its losses, and differentiable augmentation.

    hinge            D: E max(0, 1 − D(y)) + E max(0, 1 + D(ŷ))     G: −E D(ŷ)
    non-saturating   D: E softplus(−D(y)) + E softplus(D(ŷ))         G: E softplus(−D(ŷ))

A logit judges a patch, of 16, 34, 70 or 142 pixels a side for none to three halvings after the first. Norms are over
groups of channels of one image (Wu and He 2018), which tell a patch how bright the rest of its image is; a batch of
one, and batches spread over processes, are no special case. What the discriminator sees is augmented in ways that have
a gradient (Zhao et al. 2020): it then does not learn a small set by heart, and the generator does not learn the
augmentation.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Literal["hinge", "non-saturating"]
# Channels that share a norm.
_GROUP = 8


class PatchDiscriminator(nn.Module):
    """Images from −1 to 1 to a logit for each patch; high where it takes them for real.

    Args:
        num_channels: of the images.
        width: channels after the first convolution, doubled by each halving, up to eight times.
        num_halvings: convolutions of stride two after the first, which has that stride too.
    """

    def __init__(self, *, num_channels: int, width: int = 64, num_halvings: int = 2):
        super().__init__()
        if width < 1 or width % _GROUP or num_halvings < 0:
            raise ValueError(
                f"got width={width} and num_halvings={num_halvings}, expected a multiple of {_GROUP} and 0 or more"
            )
        layers: list[nn.Module] = [nn.Conv2d(num_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for at in range(num_halvings + 1):
            wide = min(2 * channels, 8 * width)
            stride = 2 if at < num_halvings else 1
            layers += [nn.Conv2d(channels, wide, 4, stride, 1, bias=False), nn.GroupNorm(wide // _GROUP, wide)]
            layers += [nn.LeakyReLU(0.2)]
            channels = wide
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, 1, 1))

    @staticmethod
    def smallest(num_halvings: int) -> int:
        """Pixels along a side of the smallest images that give a logit."""
        return 2 ** (num_halvings + 3)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        return self.layers(images)


def critic_loss(
    real: Float[Tensor, "b 1 h w"], fake: Float[Tensor, "b 1 h w"], loss: Loss = "hinge"
) -> Float[Tensor, ""]:
    """What a discriminator minimises, of its logits."""
    real, fake = real.float(), fake.float()
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(fake: Float[Tensor, "b 1 h w"], loss: Loss = "hinge") -> Float[Tensor, ""]:
    """What a generator minimises, of the discriminator's logits."""
    return -fake.float().mean() if loss == "hinge" else F.softplus(-fake.float()).mean()


def lecam(
    real: Float[Tensor, "b 1 h w"], fake: Float[Tensor, "b 1 h w"], anchors: Float[Tensor, "2"]
) -> Float[Tensor, ""]:
    """The regularisation of Tseng et al. 2021: logits beyond the other side's moving average cost their square.

    Args:
        anchors: moving averages of the logits of real and of fake images.
    """
    over = F.relu(real.float() - anchors[1]).square().mean()
    return over + F.relu(anchors[0] - fake.float()).square().mean()


def augmented(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Images with random brightness, saturation and contrast, moved by up to an eighth, with a square cut out.

    Each image by itself, by draws from torch's global generator.
    """
    num, _, height, width = images.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(num, 1, 1, 1, device=images.device).uniform_(low, high)

    x = images.float() + uniform(-0.5, 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * uniform(0, 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform(0.5, 1.5)
    return _cut_out(_moved(x, height // 8, width // 8), height // 4, width // 4)


def _moved(x: Tensor, down: int, across: int) -> Tensor:
    """Each image shifted by as many pixels at most, with nothing where it comes from."""
    num, _, height, width = x.shape
    rows = torch.arange(height, device=x.device) + _integers(num, -down, down, x)[:, None]
    columns = torch.arange(width, device=x.device) + _integers(num, -across, across, x)[:, None]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    images = torch.arange(num, device=x.device)[:, None, None]
    taken = x.permute(0, 2, 3, 1)[
        images, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return taken.permute(0, 3, 1, 2) * inside


def _cut_out(x: Tensor, down: int, across: int) -> Tensor:
    num, _, height, width = x.shape
    top, left = _integers(num, -down // 2, height - 1, x), _integers(num, -across // 2, width - 1, x)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + down)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + across)
    return x * ~(in_rows[:, None, :, None] & in_columns[:, None, None, :])


def _integers(num: int, low: int, high: int, like: Tensor) -> Tensor:
    return torch.randint(low, high + 1, (num,), device=like.device)
