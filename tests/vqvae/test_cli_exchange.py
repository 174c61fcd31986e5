"""Models in and out by the command line: import, export."""

import json
import sys
from pathlib import Path

import pytest
import torch
from vqgan_references import Reference

import vqvae.cli
from priors import LlamaPrior, TransformerPrior
from priors.grid import GridModel
from vqvae import VQGAN, VQVAE, GaussianVAE, load_images
from vqvae.interop import export_diffusers
from vqvae.quantizers import VectorQuantizer

SMALL = VQVAE.Config(width=8, num_blocks=1, quantizer=VectorQuantizer.Config(num_codes=16, dim=4))


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the command; its exit status and its lines on stdout and stderr come back."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vqvae", *map(str, args)])
        status = 0
        try:
            vqvae.cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        out, errors = capsys.readouterr()
        return status, out, errors

    return call


@pytest.fixture
def vqmodel(tmp_path) -> Path:
    """A folder of diffusers."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=32, dim=4, revival="off")
    config = VQGAN.Config(image_size=32, channels=(32, 32), num_blocks=1, latent_channels=8, quantizer=quantizer)
    export_diffusers(config.build().eval(), tmp_path / "vqmodel")
    return tmp_path / "vqmodel"


def test_a_model_of_diffusers_comes_in_and_goes_out(command, vqmodel, tmp_path):
    output = tmp_path / "ours"
    fitted = ["--data", "fashion-mini", "--image-size", 16]
    status, out, errors = command("import", vqmodel, "-o", output, *fitted)
    assert (status, errors) == (0, "")
    assert "32 codes, a grid of (8, 8) for images of 16 x 16" in out
    model = VQVAE.from_pretrained(output)
    scale = model.likelihood.log_scale.exp()
    assert out.startswith(f"scale of the likelihood: {scale[0]:.1f}, ")
    # Fitted: a smaller scale is less likely on what it was fitted to (a larger one there is not: nothing was trained).
    images = load_images("fashion-mini", size=16, channels=3).__getitems__(range(256)).images
    with torch.no_grad():
        best = model(images).distortion.mean()
        for factor in (0.5, 0.8):
            model.likelihood.log_scale.copy_((scale * factor).log())
            assert model(images).distortion.mean() > best

    status, out, _ = command("export", output, "--to", "diffusers", "-o", tmp_path / "again")
    assert status == 0
    same = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / same).read_bytes() == (vqmodel / same).read_bytes()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config == json.loads((vqmodel / "config.json").read_text())


def test_without_data_the_scale_is_said_to_be_unfitted(command, vqmodel, tmp_path):
    status, _, errors = command("import", vqmodel, "-o", tmp_path / "ours", "--image-size", 64)
    assert status == 0
    assert "distortion and bits mean nothing yet: add --data" in errors
    assert VQVAE.from_pretrained(tmp_path / "ours").grid == (32, 32)


def test_a_llama_goes_out_and_comes_in(command, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"num_codes": 16, "grid": (7, 7), "num_classes": 3, "width": 16, "depth": 1, "num_heads": 2}
    prior = LlamaPrior(**sizes)
    SMALL.build().save_pretrained(tmp_path / "run" / "codebook")
    prior.save_pretrained(tmp_path / "run" / "prior")
    for source, name in ((tmp_path / "run", "of-run"), (tmp_path / "run" / "prior", "alone")):
        status, out, _ = command("export", source, "--to", "llama", "-o", tmp_path / name)
        assert status == 0
        assert "a LlamaForCausalLM of 49 codes a grid" in out
    assert (tmp_path / "of-run" / "model.safetensors").read_bytes() == (
        tmp_path / "alone" / "model.safetensors"
    ).read_bytes()
    status, out, _ = command("import", tmp_path / "alone", "-o", tmp_path / "back")
    assert status == 0
    assert "a LlamaPrior of 16 codes on a grid of (7, 7)" in out
    codes = torch.randint(16, (3, 7, 7))
    back = GridModel.from_pretrained(tmp_path / "back")
    torch.testing.assert_close(back.log_prob(codes), prior.eval().log_prob(codes), atol=1e-4, rtol=0)
    # Told by what the JSON says, however it is written; and of a repository a folder of it.
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "alone" / "config.json").write_text(json.dumps(config))
    asked = []

    def download(source, patterns, *, revision):
        asked.append((source, list(patterns), revision))
        return tmp_path

    monkeypatch.setattr("vqvae.cli.exporting.download", download)
    options = ("--subfolder", "alone", "--revision", "v1")
    status, out, _ = command("import", "owner/llama", "-o", tmp_path / "fetched", *options)
    assert status == 0
    assert "a LlamaPrior of 16 codes" in out
    assert [(source, revision) for source, _, revision in asked] == [("owner/llama", "v1")] * 2
    assert asked[0][1] == ["alone/config.json"]
    assert "alone/model.safetensors" in asked[1][1]
    status, _, errors = command("import", tmp_path / "alone", "-o", tmp_path / "x", "--image-size", 32)
    assert status == 2
    assert "there is no --image-size" in errors


@pytest.mark.slow
@pytest.mark.parametrize(("to", "ending"), [("program", "pt2"), ("onnx", "onnx")])
def test_a_tokenizer_goes_out(command, tmp_path, to, ending):
    torch.manual_seed(0)
    SMALL.build().save_pretrained(tmp_path / "run" / "codebook")
    status, out, errors = command("export", tmp_path / "run", "--to", to, "-o", tmp_path / "out")
    assert (status, errors) == (0, "")
    assert f"decoder.{ending}, encoder.{ending}, tokenizer.json" in out


def test_mistakes_are_one_line(command, vqmodel, tmp_path):
    SMALL.build().save_pretrained(tmp_path / "ours")
    GaussianVAE(width=8, num_blocks=1, dim=2).save_pretrained(tmp_path / "vae")
    config = TransformerPrior.Config(num_codes=16, grid=(7, 7), width=16, depth=1, num_heads=2)
    config.build().save_pretrained(tmp_path / "prior")
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "config.json").write_bytes(b'{"model_type": "\xe9"}')
    (tmp_path / "notes.pt").write_text("no pickle")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    out = ("-o", tmp_path / "out")
    for args, message in (
        (("export", tmp_path / "ours", "--to", "diffusers", *out), "VQModel"),
        (("export", tmp_path / "vae", "--to", "onnx", *out), "holds a GaussianVAE, which has no codes"),
        (("export", tmp_path / "prior", "--to", "llama", *out), "vqvae train --stage prior --prior-kind Llama"),
        (("export", tmp_path / "ours", "--to", "llama", *out), "VQVAE"),
        (("export", tmp_path / "ours", "--to", "onnx", "-o", vqmodel), "is there already"),
        (("export", tmp_path / "nothing", "--to", "onnx", *out), "no model folder"),
        (("import", vqmodel, "-o", tmp_path / "ours"), "is there already"),
        (("import", tmp_path / "ours", *out), "is of a VQVAE that this library saved, so there is nothing to import"),
        (("import", tmp_path / "prior", *out), "is of a TransformerPrior that this library saved"),
        (("import", tmp_path / "latin", *out), "config.json cannot be read as JSON"),
        (("import", tmp_path / "notes.pt", *out), "notes.pt is corrupt"),
        (("import", tmp_path / "other.pt", *out), "holds no tokenizer that is known here"),
        (("import", vqmodel, "--config", "x.yaml", *out), "is of diffusers, which has no config"),
        (("import", vqmodel, "--image-size", 33, *out), "33"),
    ):
        status, _, errors = command(*args)
        assert status == 2, args
        assert errors.count("\n") == 1, errors
        assert errors.startswith("error: "), errors
        assert message in errors, (message, errors)
        assert not (tmp_path / "out").exists()


def test_case_22_places_that_cannot_be_written_are_refused_before_any_work(command, vqmodel, tmp_path, monkeypatch):
    """For import and export alike, and for each form, before a model is read."""

    def read(*args: object, **options: object) -> None:
        raise AssertionError("a model was read")

    monkeypatch.setattr("vqvae.cli.exporting.import_tokenizer", read)
    monkeypatch.setattr("vqvae.cli.exporting.Autoencoder.from_pretrained", read)
    monkeypatch.setattr("vqvae.cli.exporting.load_prior", read)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "link").symlink_to(vqmodel)
    (tmp_path / "empty").mkdir()
    places = {
        "loop": "is a link that leads nowhere",
        "dangling": "is a link that leads nowhere",
        "loop/within": "is a link that leads nowhere",
        "dangling/with/in": "is a link that leads nowhere",
        "file": "is there already",
        "file/within": "is no folder",
        "full": "is there already",
        "link": "is there already",
        "link/within": "is within",
        "vqmodel/within": "is within",
        "vqmodel/a/../b": "is within",
        "x" * 300: "File name too long",
    }
    calls = [
        ("import", vqmodel),
        *(("export", vqmodel, "--to", to) for to in ("onnx", "program", "diffusers", "llama")),
    ]
    before = sorted(path for path in tmp_path.rglob("*"))
    for call in calls:
        for place, message in places.items():
            status, _, errors = command(*call, "-o", tmp_path / place)
            assert (status, errors.count("\n")) == (2, 1), errors
            assert message in errors, (place, errors)
    monkeypatch.chdir(tmp_path / "empty")
    status, _, errors = command("import", vqmodel, "-o", ".")
    assert (status, "is the folder that this program runs in" in errors) == (2, True), errors
    monkeypatch.setattr("vqvae.cli.exporting.os.access", lambda path, mode: False)
    status, _, errors = command("import", vqmodel, "-o", tmp_path / "new" / "place")
    assert (status, f"nothing may be written into {tmp_path}" in errors) == (2, True), errors
    assert sorted(path for path in tmp_path.rglob("*")) == before
    monkeypatch.undo()
    assert command("import", vqmodel, "-o", tmp_path / "empty")[0] == 0  # an empty folder is no one's


def test_case_29_the_command_says_where_the_weights_were_found(command, tmp_path):
    weights = Reference("taming", ch=32, ch_mult=(1,), attention=(), z_channels=4, embed_dim=4, n_embed=16).weights
    held = {f"first_stage_model.{name}": tensor for name, tensor in weights.items()} | {"betas": torch.ones(2)}
    torch.save({"state_dict": held}, tmp_path / "model.ckpt")
    status, out, errors = command("import", tmp_path / "model.ckpt", "-o", tmp_path / "ours", "--image-size", 8)
    assert status == 0
    assert "16 codes" in out
    assert f"{tmp_path / 'model.ckpt'}: 'first_stage_model.' was taken off their names; 1 others are left out" in errors
    assert VQVAE.from_pretrained(tmp_path / "ours").num_codes == 16
    SMALL.build().save_pretrained(tmp_path / "own")
    torch.save(SMALL.build().state_dict(), tmp_path / "own.pt")
    for source in (tmp_path / "own.pt", tmp_path / "own" / "model.safetensors"):
        status, _, errors = command("import", source, "-o", tmp_path / "again")
        assert (status, errors.count("\n")) == (2, 1)
        assert "VQVAE.from_pretrained" in errors
