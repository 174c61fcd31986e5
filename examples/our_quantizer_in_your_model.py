"""Somebody's own autoencoder, made a VQ-VAE by four lines.

    python examples/our_quantizer_in_your_model.py [--num-steps 300]

The model below knows nothing of this library: plain convolutions, channels first, a squared error. The lines marked
with (*) are all that it takes. The figures printed are on test images.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from vqvae import load_images
from vqvae.data import batches
from vqvae.metrics import CodeUsage, psnr
from vqvae.quantizers import EMAVectorQuantizer


class YourModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=2, padding=1)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)
        )
        self.quantizer = EMAVectorQuantizer(num_codes=256, dim=64)  # (*)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q = self.quantizer(self.encoder(x).movedim(1, -1))  # (*) quantizers take channels last
        return self.decoder(q.z_q.movedim(-1, 1)), torch.stack([*q.auxiliary.values()]).sum(), q.codes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=300)
    num_steps = parser.parse_args().num_steps

    torch.manual_seed(0)
    model = YourModel()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    stream = batches(load_images("fashion-mini"), 64, seed=0)
    for _ in range(num_steps):
        images = next(stream).images / 255
        output, auxiliary, _ = model(images)
        loss = F.mse_loss(output, images) + auxiliary  # (*) the commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.quantizer.update()  # (*) moving averages, k-means start, revival of dead codes

    model.eval()
    images = load_images("fashion-mini", "test")[:500].images
    usage = CodeUsage(256)
    with torch.no_grad():
        output, _, codes = model(images / 255)
    usage.add(codes)
    levels = (output * 255).round().clamp(0, 255).byte()
    print(f"{codes[0].numel()} codes an image, {codes[0].numel()} bytes")
    print(f"PSNR {psnr(images, levels).mean():.2f} dB, {usage.usage:.0%} of the codebook in use")


if __name__ == "__main__":
    main()
