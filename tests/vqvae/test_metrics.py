"""Metrics against scikit-image and closed forms."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vqvae import metrics
from vqvae.metrics import ChannelUsage, CodeUsage, psnr, ssim


def pair(channels):
    generator = torch.Generator().manual_seed(channels)
    images = torch.randint(0, 256, (3, channels, 20, 17), dtype=torch.uint8, generator=generator)
    noise = torch.randint(-20, 21, images.shape, generator=generator)
    return images, (images.int() + noise).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_are_scikit_images(channels):
    images, others = pair(channels)
    for index, (a, b) in enumerate(zip(images.numpy(), others.numpy(), strict=True)):
        want = peak_signal_noise_ratio(a, b, data_range=255)
        assert psnr(images, others)[index].item() == pytest.approx(want, rel=1e-5)
        full = [
            structural_similarity(
                a[c], b[c], data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
            )[1][5:-5, 5:-5].mean()
            for c in range(channels)
        ]
        assert ssim(images, others)[index].item() == pytest.approx(np.mean(full), abs=1e-5)


def test_equal_images_and_images_too_small():
    images, _ = pair(1)
    assert (psnr(images, images) == math.inf).all()
    torch.testing.assert_close(ssim(images, images), torch.ones(3))
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(images[..., :8, :8], images[..., :8, :8])


def test_code_usage_adds_up_and_keeps_codebooks_apart():
    usage = CodeUsage(4)
    usage.add(torch.tensor([[[0, 1], [1, -1]]]))
    usage.add(torch.tensor([[[0, 0], [1, -1]]]))
    assert [counts.tolist() for counts in usage.counts] == [[3, 3]]
    assert usage.usage == 0.5
    assert usage.perplexity == pytest.approx(2)
    usage = CodeUsage(2**36, (2,))
    usage.add(torch.tensor([[[0, 5], [2**36 - 1, 5]], [[0, -1], [0, 5]]]))
    assert [counts.tolist() for counts in usage.counts] == [[3, 1], [3]]
    assert usage.usages == [2 / 2**36, 1 / 2**36]
    assert usage.perplexities == pytest.approx([4 / 3**0.75, 1])
    assert usage.perplexity == pytest.approx((4 / 3**0.75 + 1) / 2)


def test_channel_usage_adds_up():
    usage = ChannelUsage(3, (1, 2))
    assert usage.channels == [0, 0, 0]
    usage.add(torch.tensor([[[[1.0, 0.0, 0.005], [3.0, 0.0, 0.005]]]]))
    usage.add(torch.tensor([[[[2.0, 0.0, 0.02], [2.0, 0.0, 0.02]]], [[[2.0, 0.0, 0.005], [2.0, 0.0, 0.005]]]]))
    assert usage.channels == pytest.approx([2, 0, 0.01])
    assert usage.kl == pytest.approx(2 * 2.01)
    usage.add(torch.full((1, 1, 2, 3), 0.02))
    assert usage.usage == pytest.approx(2 / 3)
    assert usage.perplexity is None


def test_figures_of_large_images_are_those_in_one_piece(monkeypatch):
    """Worked on by strips of rows, of any size, against scikit-image on the whole."""
    from skimage.metrics import structural_similarity

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(0, 256, (2, 3, 61, 40), dtype=torch.uint8, generator=generator) for _ in range(2))
    y = ((x.int() * 3 + y.int()) // 4).to(torch.uint8)
    whole = metrics.psnr(x, y), metrics.ssim(x, y)
    for strip in (1, 7 * 240, 240 * 1000):
        monkeypatch.setattr(metrics, "_STRIP", strip)
        assert torch.equal(metrics.psnr(x, y), whole[0])
        torch.testing.assert_close(metrics.ssim(x, y), whole[1], rtol=1e-6, atol=0)
    for number in range(2):
        expected = structural_similarity(
            *(each[number].permute(1, 2, 0).numpy() for each in (x, y)),
            channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )  # fmt: skip
        # scikit-image's window is cut where ours is, and it leaves the same border out of its mean.
        assert whole[1][number].item() == pytest.approx(expected, abs=2e-4)
