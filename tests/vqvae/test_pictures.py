"""Pictures of what a run made."""

from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F
from torchvision.utils import make_grid

from vqvae import pictures
from vqvae.metrics import ChannelUsage, CodeUsage


def levels(num: int, channels: int, size: int) -> torch.Tensor:
    return torch.randint(0, 256, (num, channels, size, size + 4), dtype=torch.uint8)


@pytest.mark.parametrize(("num", "columns"), [(1, 8), (2, 8), (8, 8), (9, 4), (5, 1)])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 16), (3, 100)])
def test_a_grid_is_that_of_torchvision(num: int, columns: int, channels: int, size: int):
    """Whose import takes longer than most pictures."""
    images = levels(num, channels, size)
    enlarged = F.interpolate(images, scale_factor=max(1, pictures.TILE // (size + 4)), mode="nearest")
    theirs = rearrange(make_grid(enlarged, nrow=columns, padding=2, pad_value=255), "c h w -> h w c")
    mine = pictures.grid(images, columns)
    assert mine.dtype == torch.uint8
    assert torch.equal(mine, theirs)


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_reconstructions_lie_below_their_images(tmp_path: Path):
    images, others = levels(3, 3, 20), levels(3, 3, 20)
    pictures.save_reconstructions(tmp_path / "pairs.png", images, others, columns=2)
    white = torch.full_like(images[:1], 255)
    rows = torch.cat([images[:2], others[:2], images[2:], white, others[2:], white])
    pictures.save_grid(tmp_path / "grid.png", rows, 2)
    assert np.array_equal(opened(tmp_path / "pairs.png"), opened(tmp_path / "grid.png"))
    assert np.array_equal(opened(tmp_path / "grid.png"), pictures.grid(rows, 2).numpy())


def test_usage_is_drawn_of_codes_of_several_codebooks_and_of_channels(tmp_path: Path):
    single, double, channels = CodeUsage(4), CodeUsage(2**36, (2,)), ChannelUsage(3, (2,))
    single.add(torch.tensor([[0, 0, 2, 3]]))
    double.add(torch.randint(0, 2**36, (3, 5, 2)))
    channels.add(torch.tensor([[[1.0, 0.0, 2.0], [1.0, 0.0, 2.0]]]))
    for usage in (single, double, channels):
        pictures.save_usage(tmp_path / "usage.png", usage)
        assert opened(tmp_path / "usage.png").std() > 0


def test_names_stand_above_their_columns():
    images = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    plain = pictures.grid(images, 4)
    named = pictures.grid(images, 4, heads=["I", "", "W" * 200, "\n", "of a column that is not there"])
    strip, width = named[: -len(plain)], 64 + 2
    assert torch.equal(named[len(strip) :], plain)
    columns = [strip[:, 2 + i * width : (i + 1) * width] for i in range(4)]
    dark = [(column < 128).sum().item() for column in columns]
    assert 0 < dark[0] < dark[2]
    assert dark[1] == 0
    assert dark[3] > 0
    # In the middle, and nowhere but over the column itself.
    at = (columns[0] < 128).any(-1).any(0).nonzero().flatten().float()
    assert abs(at.mean() - 31.5) < 2
    gaps = torch.stack([strip[:, i * width : i * width + 2] for i in range(5)])
    assert (gaps == 255).all()
    assert torch.equal(pictures.grid(images, 4, heads=["", ""]), plain)


@pytest.mark.parametrize(("num", "columns", "factor"), [(1, 1, 32), (3, 3, 10), (8, 8, 4), (20, 10, 4)])
def test_a_few_small_images_are_enlarged(num: int, columns: int, factor: int):
    found = pictures.grid(levels(num, 1, 12), columns, side=pictures.side_for(columns))
    gap = 2 if num > 1 else 0
    assert found.shape[1] == columns * (16 * factor + gap) + gap
