"""A run on images that are not square, from the first step to a file of bits, by the command line alone."""

import pytest
import torch
from run_files import make_images, without

from vqvae import VQVAE
from vqvae.data import load_images
from vqvae.tokens import CodeDataset

SIZE = ["--model.image-size", "8", "16"]


@pytest.fixture
def wide(options: list[str]) -> list[str]:
    return [*without("--model.image-size", options), *SIZE]


def test_a_run_on_what_is_not_square(run, wide, photos, tmp_path, capsys):
    folder = tmp_path / "run"
    run(*wide)
    model = VQVAE.from_pretrained(folder / "codebook")
    assert (model.size, model.grid) == ((8, 16), (2, 4))
    run("evaluate", folder)
    assert "negative ELBO" in capsys.readouterr().out
    run("reconstruct", folder, "--num", 4, "--output", tmp_path / "pairs.png")
    run("sample", folder, "--num", 3, "--output", tmp_path / "samples")
    sample = load_images(tmp_path / "samples", "train", size=(8, 16))[0][0]
    assert sample.shape[1:] == (8, 16)
    run("tokenize", folder, photos, "-o", tmp_path / "codes")
    codes = CodeDataset(tmp_path / "codes" / "train")
    images = load_images(photos, "train", size=(8, 16), channels=1)
    assert torch.equal(codes[:5].codes.long(), model.encode(images[:5].images))
    run("compress", folder, tmp_path / "samples", "-o", tmp_path / "samples.vq")
    run("decompress", folder, tmp_path / "samples.vq", "-o", tmp_path / "back")
    assert torch.equal(load_images(tmp_path / "back", "train", size=(8, 16))[0][0], sample)
    run("export", folder, "--to", "program", "-o", tmp_path / "program")
    run("info", tmp_path / "samples.vq", folder)
    assert "3 images" in capsys.readouterr().out


def test_a_run_goes_on_at_its_size_and_at_no_other(run, fails, wide, tmp_path):
    folder = tmp_path / "run"
    run(*wide, "--stage", "codebook")
    said = fails("--resume", "--run", folder, "--codebook-fit.num-steps", 12, "--model.image-size", 16, 8)
    assert "is for image_size (8, 16), got (16, 8)" in said
    run("--resume", "--run", folder)
    assert (folder / "elbo.json").exists()


def test_a_public_tokenizer_at_another_size_has_a_prior_of_its_grid(run, tmp_path, capsys):
    """As a user would: a VQModel of diffusers, images that are not square, and a prior, by commands alone."""
    import diffusers

    torch.manual_seed(0)
    peer = diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
    )
    peer.save_pretrained(tmp_path / "theirs")
    photos, ours, folder = make_images(tmp_path / "photos"), tmp_path / "ours", tmp_path / "run"
    run("import", tmp_path / "theirs", "-o", ours, "--image-size", "12x16", "--data", photos)
    assert "a grid of (6, 8) for images of 12 x 16" in capsys.readouterr().out
    fit = ("--prior.width", 16, "--prior.depth", 1, "--prior.num-heads", 2, "--prior-fit.num-steps", 3)
    run("--stage", "prior", "--tokenizer", ours, "--data.source", photos, "--run", folder, *fit)
    run("evaluate", folder)
    run("sample", folder, "--num", 2, "--output", tmp_path / "samples")
    assert load_images(tmp_path / "samples", "train", size=(12, 16), channels=3)[0][0].shape == (3, 12, 16)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (("8", "10"), "image_size (8, 10) is not a multiple of downsampling 4"),
        (("0", "8"), "image_size (0, 8) is not a multiple"),
        (("8", "8", "8"), "no type matching INT|{INT INT}"),
        (("8x16",), "no type matching INT|{INT INT}"),
    ],
)
def test_sizes_that_are_none_are_one_line(fails, options, tmp_path, size, message):
    assert message in fails(*without("--model.image-size", options), "--model.image-size", *size)
    assert not (tmp_path / "run").exists()
