"""Pictures of what a run made."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F
from torchvision.utils import make_grid

from vqvae import pictures


@pytest.mark.parametrize(("num", "columns"), [(1, 8), (2, 8), (8, 8), (9, 4), (12, 3), (5, 1)])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 16), (3, 100)])
def test_a_grid_is_that_of_torchvision(num, columns, channels, size):
    """Whose import takes longer than most pictures."""
    images = torch.randint(0, 256, (num, channels, size, size + 4), dtype=torch.uint8)
    factor = max(1, pictures.TILE // (size + 4))
    enlarged = F.interpolate(images, scale_factor=factor, mode="nearest")
    theirs = rearrange(make_grid(enlarged, nrow=columns, padding=2, pad_value=255), "c h w -> h w c")
    mine = pictures.grid(images, columns)
    assert mine.dtype == torch.uint8
    assert torch.equal(mine, theirs)
