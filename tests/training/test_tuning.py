"""A public tokenizer is fine-tuned on one's own images, for the eye, by the three commands of docs/looks.md."""

import json

import pytest
import torch
from PIL import Image

from vqvae import VQVAE
from vqvae.fingerprint import of_tokenizer

TUNE = ["--preset", "folder", "--stage", "codebook", "--looks.perceptual", "1", "--looks.adversarial", "0.1"]
FEW = ["--looks.start", "1", "--looks.width", "8", "--looks.num-halvings", "0", "--data.num-workers", "0"]
FEW += ["--codebook-fit.num-steps", "3", "--codebook-fit.batch-size", "2", "--codebook-fit.learning-rate", "1e-4"]


@pytest.fixture
def colours(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        pixels = torch.randint(256, (20, 24, 3), dtype=torch.uint8, generator=generator)
        path = tmp_path / "photos" / ("test" if index < 6 else "train") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("which", ["decoder", "all"])
def test_a_public_tokenizer_is_tuned_for_the_eye(run, colours, tmp_path, which):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (32, 32), "latent_channels": 8, "vq_embed_dim": 4, "num_vq_embeddings": 32}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.VQModel(**sizes, **blocks, layers_per_block=1).save_pretrained(tmp_path / "theirs")
    ours, tuned = tmp_path / "ours", tmp_path / "tuned"
    run("import", tmp_path / "theirs", "-o", ours, "--data", colours, "--image-size", "16")
    run(*TUNE, *FEW, "--tokenizer", ours, "--train", which, "--data.source", colours, "--run", tuned)
    run("evaluate", tuned, "--looks", "lite2", "--num-samples", "0", "--output", tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["likelihood_fit"]["images"] == 6
    assert figures["looks"]
    first, last = VQVAE.from_pretrained(ours), VQVAE.from_pretrained(tuned)
    assert first.config == last.config
    assert (of_tokenizer(first) == of_tokenizer(last)) == (which == "decoder")
    assert not torch.equal(first.decoder.conv_out.weight, last.decoder.conv_out.weight)
    if which == "decoder":
        levels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
        assert torch.equal(first.encode(levels), last.encode(levels))
