"""Models in and out by the command line: import, export."""

import json
import os
from pathlib import Path

import pytest
import torch
from cli_worlds import in_empty_folder
from vqgan_references import Reference

from priors import LlamaPrior, TransformerPrior
from priors.grid import GridModel
from vqvae import VQGAN, VQVAE, GaussianVAE, load_images
from vqvae.interop import export_diffusers
from vqvae.quantizers import VectorQuantizer

SMALL = VQVAE.Config(width=8, num_blocks=1, quantizer=VectorQuantizer.Config(num_codes=16, dim=4))
call = pytest.fixture(in_empty_folder)


@pytest.fixture
def vqmodel(tmp_path) -> Path:
    """A folder of diffusers."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=32, dim=4, revival="off")
    config = VQGAN.Config(image_size=32, channels=(32, 32), num_blocks=1, latent_channels=8, quantizer=quantizer)
    export_diffusers(config.build().eval(), tmp_path / "vqmodel")
    return tmp_path / "vqmodel"


def test_a_model_of_diffusers_comes_in_and_goes_out(call, vqmodel, tmp_path, monkeypatch):
    monkeypatch.setattr("vqvae.cli.exporting.NUM_FITTED", 64)
    output = tmp_path / "ours"
    out, errors = call("import", vqmodel, "-o", output, "--data", "fashion-mini", "--image-size", 16)
    assert errors == ""
    assert "32 codes, a grid of (8, 8) for images of 16 x 16" in out
    model = VQVAE.from_pretrained(output)
    scale = model.likelihood.log_scale.exp()
    assert out.startswith(f"scale of the likelihood: {scale[0]:.1f}, ")
    # Fitted: a smaller scale is less likely on what it was fitted to (a larger one there is not: nothing was trained).
    images = load_images("fashion-mini", size=16, channels=3).__getitems__(range(64)).images
    with torch.no_grad():
        best = model(images).distortion.mean()
        model.likelihood.log_scale.copy_((scale * 0.8).log())
        assert model(images).distortion.mean() > best

    call("export", output, "--to", "diffusers", "-o", tmp_path / "again")
    again, first = ((folder / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "again", vqmodel))
    assert again.read_bytes() == first.read_bytes()
    configs = [json.loads((path.parent / "config.json").read_text()) for path in (again, first)]
    assert configs[0] == configs[1]


def test_without_data_the_scale_is_said_to_be_unfitted(call, vqmodel, tmp_path):
    errors = call("import", vqmodel, "-o", tmp_path / "ours", "--image-size", 64).err
    assert "distortion and bits mean nothing yet: add --data" in errors
    assert VQVAE.from_pretrained(tmp_path / "ours").grid == (32, 32)


def test_a_llama_goes_out_and_comes_in(call, tmp_path, monkeypatch):
    torch.manual_seed(0)
    prior = LlamaPrior(num_codes=16, grid=(7, 7), num_classes=3, width=16, depth=1, num_heads=2)
    SMALL.build().save_pretrained(tmp_path / "run" / "codebook")
    prior.save_pretrained(tmp_path / "run" / "prior")
    for source, name in ((tmp_path / "run", "of-run"), (tmp_path / "run" / "prior", "alone")):
        out = call("export", source, "--to", "llama", "-o", tmp_path / name).out
        assert "a LlamaForCausalLM of 49 codes a grid" in out
    of_run, alone = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("of-run", "alone"))
    assert of_run == alone
    out = call("import", tmp_path / "alone", "-o", tmp_path / "back").out
    assert "a LlamaPrior of 16 codes on a grid of (7, 7)" in out
    codes = torch.randint(16, (3, 7, 7))
    back = GridModel.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back.log_prob(codes), prior.eval().log_prob(codes), atol=1e-4, rtol=0)
    # Told by what the JSON says, however it is written; and of a repository a folder of it.
    path = tmp_path / "alone" / "config.json"
    config = json.loads(path.read_text())
    del config["architectures"]
    path.write_text(json.dumps(config))
    asked = []

    def download(source, patterns, *, revision):
        asked.append((source, list(patterns), revision))
        return tmp_path

    monkeypatch.setattr("vqvae.cli.exporting.download", download)
    options = ("--subfolder", "alone", "--revision", "v1")
    assert "a LlamaPrior of 16 codes" in call("import", "owner/llama", "-o", tmp_path / "fetched", *options).out
    assert [(source, revision) for source, _, revision in asked] == [("owner/llama", "v1")] * 2
    assert asked[0][1] == ["alone/config.json"]
    assert "alone/model.safetensors" in asked[1][1]
    assert "there is no --image-size" in call.refused(
        "import", tmp_path / "alone", "-o", tmp_path / "x", "--image-size", 32
    )


@pytest.mark.slow
def test_a_tokenizer_goes_out(call, tmp_path):
    SMALL.build().save_pretrained(tmp_path / "run" / "codebook")
    for to, ending in (("program", "pt2"), ("onnx", "onnx")):
        out, errors = call("export", tmp_path / "run", "--to", to, "-o", tmp_path / to)
        assert errors == ""
        assert f"decoder.{ending}, encoder.{ending}, tokenizer.json" in out


def test_mistakes_are_one_line(call, vqmodel, tmp_path):
    SMALL.build().save_pretrained(tmp_path / "ours")
    GaussianVAE(width=8, num_blocks=1, dim=2).save_pretrained(tmp_path / "vae")
    TransformerPrior(num_codes=16, grid=(7, 7), width=16, depth=1, num_heads=2).save_pretrained(tmp_path / "prior")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "config.json").write_bytes(b'{"model_type": "\xe9"}')
    (tmp_path / "notes.pt").write_text("no pickle")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save(SMALL.build().state_dict(), tmp_path / "own.pt")
    for args, message in (
        (("export", "ours", "--to", "diffusers"), "VQModel"),
        (("export", "vae", "--to", "onnx"), "holds a GaussianVAE, which has no codes"),
        (("export", "prior", "--to", "llama"), "vqvae train --stage prior --prior-kind Llama"),
        (("export", "ours", "--to", "llama"), "VQVAE"),
        (("export", "nothing", "--to", "onnx"), "no model folder"),
        (("import", "ours"), "is of a VQVAE that this library saved, so there is nothing to import"),
        (("import", "own.pt"), "VQVAE.from_pretrained"),
        (("import", "ours/model.safetensors"), "VQVAE.from_pretrained"),
        (("import", "prior"), "is of a TransformerPrior that this library saved"),
        (("import", "latin"), "config.json cannot be read as JSON"),
        (("import", "notes.pt"), "notes.pt is corrupt"),
        (("import", "other.pt"), "holds no tokenizer that is known here"),
        (("import", vqmodel, "--config", "x.yaml"), "is of diffusers, which has no config"),
        (("import", vqmodel, "--image-size", 33), "33"),
    ):
        assert message in call.refused(*args, "-o", "out")
        assert not (tmp_path / "out").exists()


def test_case_22_places_that_cannot_be_written_are_refused_before_any_work(call, vqmodel, tmp_path, monkeypatch):
    """For import and export alike, and for each form, before a model is read."""

    def read(*args: object, **options: object) -> None:
        raise AssertionError("a model was read")

    for name in ("import_tokenizer", "Autoencoder.from_pretrained", "load_prior"):
        monkeypatch.setattr(f"vqvae.cli.exporting.{name}", read)
    for name, target in (("loop", "loop"), ("dangling", "nowhere"), ("link", vqmodel)):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "file").write_text("mine")
    for name in ("full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    places = {
        "loop": "is a link that leads nowhere",
        "dangling/with/in": "is a link that leads nowhere",
        "file": "is there already",
        "file/within": "is no folder",
        "full": "is there already",
        "link": "is there already",
        "link/within": "is within",
        "vqmodel/a/../b": "is within",
        "x" * 300: "File name too long",
    }
    before = sorted(tmp_path.rglob("*"))
    exports = (("export", vqmodel, "--to", to) for to in ("onnx", "program", "diffusers", "llama"))
    for words in (("import", vqmodel), *exports):
        for place, message in places.items():
            assert message in call.refused(*words, "-o", tmp_path / place)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "empty")
        assert "is the folder that this program runs in" in call.refused("import", vqmodel, "-o", ".")
        patch.setattr(os, "access", lambda path, mode: False)
        line = call.refused("import", vqmodel, "-o", tmp_path / "new" / "place")
        assert f"nothing may be written into {tmp_path}" in line
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.undo()
    call("import", vqmodel, "-o", tmp_path / "empty")  # an empty folder is no one's


def test_case_29_the_command_says_where_the_weights_were_found(call, tmp_path):
    weights = Reference("taming", ch=32, ch_mult=(1,), attention=(), z_channels=4, embed_dim=4, n_embed=16).weights
    held = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()} | {"betas": torch.ones(2)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": held}, path)
    out, errors = call("import", path, "-o", tmp_path / "ours", "--image-size", 8)
    assert "16 codes" in out
    assert f"{path}: 'first_stage_model.' was taken off their names; 1 others are left out" in errors
    assert VQVAE.from_pretrained(tmp_path / "ours").num_codes == 16
