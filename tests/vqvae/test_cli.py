"""The `vqvae` command on a run, on its parts, and on what it must refuse in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from cli_worlds import SIZE, SMALL, in_empty_folder, save_run
from PIL import Image

from priors import MixtureTransformerPrior, UnigramPrior
from vqvae import GaussianVAE, cli
from vqvae.cli import opening

call = pytest.fixture(in_empty_folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        pixels = torch.randint(0, 256, (SIZE, SIZE), dtype=torch.uint8, generator=generator)
        (folder / str(index % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / str(index % 2) / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run's folder with untrained parts, for those images."""
    folder = save_run(tmp_path_factory.mktemp("runs") / "small", num_classes=2)
    UnigramPrior(num_codes=8, grid=(4, 4)).fit(torch.zeros(2, 4, 4, dtype=torch.int64)).save_pretrained(
        folder / "unigram"
    )
    (folder / "state").mkdir()
    (folder / "state" / "run.json").write_text(json.dumps({"data": {"source": str(photos), "root": None}}))
    return folder


@pytest.fixture(scope="module")
def gaussian(run):
    """A run of real latents, for the same images."""
    folder = run.parent / "gaussian"
    torch.manual_seed(0)
    model = GaussianVAE(image_size=SIZE, width=8, num_blocks=1, dim=3)
    model.save_pretrained(folder / "codebook")
    MixtureTransformerPrior(dim=3, grid=model.grid, num_classes=2, **SMALL).save_pretrained(folder / "prior")
    shutil.copytree(run / "state", folder / "state")
    return folder


def figures(path):
    return json.loads(path.read_text())


def test_reconstruct(call, run, tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "images_at_once", lambda height, width: 2)
    out = call("reconstruct", run, "--num", "3").out
    for said in ("reconstructions.png: 3 images", "PSNR", "SSIM"):
        assert said in out
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.size == (3 * (160 + 2) + 2, 2 * (160 + 2) + 2)  # few, and so enlarged tenfold


def test_reconstruct_a_model_on_images_of_ones_own(call, run, tmp_path):
    for split in ("train", "test"):
        place = tmp_path / "set" / split
        place.mkdir(parents=True)
        Image.new("RGBA", (50, 30), "red").save(place / "red.png")
        Image.new("L", (20, 20), 9).save(place / "grey.png")
        (place / "broken.png").write_bytes(b"\x89PNG")
    said = call("reconstruct", run / "codebook", "--data", tmp_path / "set", "--output", "pairs.png")
    assert "pairs.png: 2 images" in said.out


def test_sample_from_parts(call, run, tmp_path):
    call("sample", run / "codebook", "--prior", run / "unigram", "--num", "3", "--pixels", "--output", "x/y.png")
    assert (tmp_path / "x" / "y.png").exists()


def test_evaluate(call, run, photos, tmp_path):
    assert "negative ELBO" in call("evaluate", run, "--output", "elbo.json").out
    whole = figures(tmp_path / "elbo.json")
    assert list(whole["rate"]) == ["uniform", "unigram", "transformer"]
    call("evaluate", run / "codebook", "--data", photos, "--output", "part.json")
    part = figures(tmp_path / "part.json")
    assert list(part["rate"]) == ["uniform"]
    assert part["distortion"] == pytest.approx(whole["distortion"])
    assert part["rate"]["uniform"] == pytest.approx(whole["rate"]["uniform"])


def test_a_gaussian_run(call, gaussian, photos, tmp_path):
    assert "reconstructions.png: 3 images" in call("reconstruct", gaussian, "--num", "3").out
    drawn = []
    for seed in (3, 3, 4):
        options = ("--label", "1", "--temperature", "0.8", "--batch-size", "3", "--output", f"seed-{len(drawn)}/")
        call("sample", gaussian, "--num", "4", "--seed", seed, *options)
        drawn.append([path.read_bytes() for path in sorted((tmp_path / f"seed-{len(drawn)}").iterdir())])
    assert len(drawn[0]) == 4
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    table = call("evaluate", gaussian, "--output", "elbo.json").out
    assert "active channels" in table
    assert "most probable" not in table
    result = figures(tmp_path / "elbo.json")
    assert list(result["rate"]) == ["normal", "transformer"]
    assert result["perplexity"] is None
    assert len(result["kl_by_channel"]) == 3
    call("evaluate", gaussian / "codebook", "--data", photos, "--output", "part.json")
    assert figures(tmp_path / "part.json")["rate"] == pytest.approx({"normal": result["rate"]["normal"]})


def test_a_run_with_a_prior_in_the_loop(call, run, tmp_path):
    folder = tmp_path / "rate-aware"
    shutil.copytree(run, folder)
    config = figures(folder / "codebook" / "config.json")
    (folder / "codebook" / "config.json").write_text(json.dumps({**config, "beta": 1.0}))
    assert "reconstructions.png: 3 images" in call("reconstruct", folder, "--num", "3").out
    assert "samples.png: 4 images" in call("sample", folder, "--num", "4", "--top-k", "4").out
    assert "draws together" in call("evaluate", folder, "--output", "elbo.json").out
    result = figures(tmp_path / "elbo.json")
    assert result["entropy"] > 0
    call("evaluate", run, "--output", "plain.json")
    # The prior has its say: codes cost less than the nearest ones do.
    assert result["deterministic"]["rate"]["transformer"] < figures(tmp_path / "plain.json")["rate"]["transformer"]
    UnigramPrior(num_codes=9, grid=(4, 4)).save_pretrained(tmp_path / "other")
    assert "num_codes=9" in call.refused("evaluate", folder, "--prior", tmp_path / "other")


def test_mistakes_are_one_line(call, run, gaussian, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no folder")
    UnigramPrior(num_codes=9, grid=(4, 4)).save_pretrained(tmp_path / "nine")
    before = sorted(os.listdir(tmp_path))
    for args, message in (
        (("reconstruct", "nowhere"), "no model folder at nowhere"),
        (("reconstruct", tmp_path / "empty"), "has no config.json"),
        (("reconstruct", run, "--num", "0"), "--num must be at least 1"),
        (("reconstruct", run, "--data", tmp_path / "empty"), "empty"),
        (("reconstruct", run / "codebook"), "name some with --data"),
        (("reconstruct", run / "prior"), "holds a TransformerPrior"),
        (("sample", run / "codebook"), "has no prior"),
        (("sample", run, "--prior", run / "codebook"), "VQVAE"),
        (("sample", run, "--label", "2"), "--label must lie in [0, 2), got 2"),
        (("sample", run, "--prior", run / "unigram", "--label", "0"), "knows no classes"),
        (("sample", run, "--num", "1", "--output", tmp_path / "file" / "x.png"), "could not write"),
        (("sample", run, "--prior", "nine"), "num_codes=9"),
        (("evaluate", run, "--prior", "nine"), "num_codes=9"),
        (("evaluate", run, "--data", "nothing-known"), "nothing-known"),
        # Real latents and codes do not mix.
        (("sample", run, "--prior", gaussian / "prior"), "dim=3"),
        (("evaluate", gaussian, "--prior", run / "prior"), "num_codes=8"),
        (("sample", gaussian, "--top-k", "4"), "--top-k cannot be had of a prior over real vectors"),
        (("sample", gaussian, "--top-p", "0.5", "--guidance", "2"), "--top-p and --guidance cannot be had"),
        (("sample", gaussian, "--inpaint", "x.png", "--mask", "x.png"), "--inpaint cannot be had"),
        (("sample", gaussian, "--seeds", "3", "--min-p", "0.1"), "--min-p and --seeds cannot be had"),
        (("sample", gaussian, "--precision", "int8", "--compiled"), "--precision and --compiled cannot be had"),
    ):
        assert message in call.refused(*args)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "train"])
def test_help_shows_an_example(call, command):
    assert f"Example: vqvae {command} " in " ".join(call(command, "--help").out.replace("│", " ").split())


def test_python_m_vqvae():
    done = subprocess.run([sys.executable, "-m", "vqvae", "--help"], capture_output=True, text=True, check=True)
    assert "reconstruct" in done.stdout
