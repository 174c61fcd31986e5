"""A program for a test: latents of a folder of images by one process or several, each of which saves what it has.

python encoding_together.py MODEL IMAGES OUT DEVICES
"""

import sys
from pathlib import Path

import safetensors.torch
from lightning_fabric import Fabric

from vqvae import Autoencoder
from vqvae.data import load_images
from vqvae.training import latents
from vqvae.training.records import Metrics

if __name__ == "__main__":
    model, source, out, devices = sys.argv[1:]
    fabric = Fabric(accelerator="cpu", devices=int(devices), strategy="ddp" if devices != "1" else "auto")
    fabric.launch()
    latents.images_at_once = lambda height, width: 4
    images = load_images(source, "train", size=8, channels=1)
    parts = {"model": Autoencoder.from_pretrained(model), "guiding_prior": None}
    encoding = latents.Encoding(fabric=fabric, metrics=Metrics(Path(out), fabric), seed=3, **parts)
    found = latents.encode_all(encoding, images, "encode")
    assert found.labels is not None
    tensors = {"values": found.values, "labels": found.labels}
    safetensors.torch.save_file(tensors, Path(out) / f"{devices}-{fabric.global_rank}.safetensors")
