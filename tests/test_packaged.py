"""Models that come with the package: offline, by name, as float32, and as good as their cards say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import safefolder
from priors import AnyOrderPrior, Prior, TransformerPrior
from safefolder import packaged
from vqvae import VQVAE, Autoencoder, load_images
from vqvae.bound import check_fit, elbo
from vqvae.cli import main
from vqvae.fingerprint import check_trained_on

NAMES = ["fashion-28", "fashion-28-any-order"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """In a folder where nothing is, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["vqvae", *map(str, words)])
    main()


def test_what_there_is_takes_at_most_eight_megabytes():
    assert packaged.names() == NAMES
    sizes = [path.stat().st_size for path in packaged.FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) <= 8_000_000


def test_weights_are_stored_in_half_and_read_in_float32():
    kinds = {VQVAE: "fashion-28", TransformerPrior: "fashion-28", AnyOrderPrior: "fashion-28-any-order"}
    for kind, name in kinds.items():
        model = kind.from_pretrained(name)
        assert {each.dtype for each in model.state_dict().values() if each.is_floating_point()} == {torch.float32}
        with safe_open(packaged.FOLDER / name / kind.run_part / "model.safetensors", "pt") as file:
            stored = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert "BF16" in stored
        assert "F32" not in stored


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_prior_is_of_the_packaged_tokenizer_and_its_figures_are_true(name):
    model, prior = VQVAE.from_pretrained("fashion-28"), Prior.from_pretrained(name)
    check_fit(model, prior, name)
    check_trained_on(model, prior, name, "")
    assert prior.trained_on is not None
    assert prior.class_names == load_images("fashion-mini", "test").class_names
    test = load_images("fashion-mini", "test")[:200]
    found = elbo(model, prior, test.images, test.labels).bits_per_dim(model.num_dims).mean()
    stated = json.loads((packaged.FOLDER / name / "elbo.json").read_text())
    assert stated["images"] == 10_000
    # The standard error of 200 images is 0.06 bits a pixel.
    assert abs(found - stated["bits_per_dim"]) < 0.2
    card = (packaged.FOLDER / name / "README.md").read_text()
    assert f"{stated['bits_per_dim']:.4f}" in card


def test_weights_are_read_in_float32_by_a_path_too(monkeypatch):
    monkeypatch.chdir(packaged.FOLDER.parent)
    prior = Prior.from_pretrained("models/fashion-28")
    assert {each.dtype for each in prior.parameters()} == {torch.float32}


def test_a_folder_of_the_name_comes_first(tmp_path):
    small = VQVAE(image_size=8, width=4, num_blocks=0)
    small.save_pretrained(tmp_path / "fashion-28")
    assert Autoencoder.from_pretrained("fashion-28").config.image_size == 8
    assert not safefolder.folder.has_part("fashion-28", "prior")
    assert safefolder.folder.has_part("fashion-28-any-order", "prior")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fashion-82", "perhaps you meant fashion-28"),
        ("nothing", "packaged models are fashion-28, fashion-28-any-order"),
        ("runs/nothing/there", "no model folder at runs/nothing/there$"),
        (Path("nothing/there/at-all"), "at-all$"),
    ],
)
def test_a_name_that_is_none_is_told_which_there_are(name, said):
    with pytest.raises(ValueError, match=said):
        VQVAE.from_pretrained(name)


def test_a_packaged_model_has_no_revision():
    with pytest.raises(ValueError, match="no revision"):
        VQVAE.from_pretrained("fashion-28", revision="main")


def test_commands_take_packaged_models_by_name(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "sample", "fashion-28", "--label", 7, "--num", 4)
    assert (tmp_path / "samples.png").is_file()
    images = tmp_path / "images"
    run(monkeypatch, "sample", "fashion-28", "--prior", "fashion-28-any-order", "--num", 2, "--output", images)
    run(monkeypatch, "reconstruct", "fashion-28", "--num", 4)
    assert "of 2,000 test images of fashion-mini" in capsys.readouterr().err
    run(monkeypatch, "compress", "fashion-28", images, "-o", "all.vq")
    run(monkeypatch, "decompress", "fashion-28", "all.vq", "-o", "again")
    assert len(list((tmp_path / "again").glob("*.png"))) == 2


@pytest.mark.slow
def test_the_first_picture_needs_nothing_but_the_package(tmp_path):
    """In a process of its own, with no home, and no network that it could ask."""
    words = ["vqvae", "sample", "fashion-28", "--num", "1"]
    blocked = f"import socket, sys; socket.socket.connect = None; sys.argv = {words}"
    where = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    code = f"{blocked}; from vqvae.cli import main; main()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=where, check=True)
    assert (tmp_path / "samples.png").is_file()
