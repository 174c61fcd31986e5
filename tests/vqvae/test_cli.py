"""The `vqvae` command on a run, on its parts, and on what it must refuse in one line."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from priors import MixtureTransformerPrior, TransformerPrior, UnigramPrior
from vqvae import VQVAE, GaussianVAE, cli
from vqvae.cli import measuring
from vqvae.quantizers import EMAVectorQuantizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with untrained parts, and the images it is for."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    photos = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(30):
        pixels = torch.randint(0, 256, (16, 16), dtype=torch.uint8, generator=generator)
        (photos / str(index % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels.numpy()).save(photos / str(index % 2) / f"{index}.png")
    torch.manual_seed(0)
    config = VQVAE.Config(image_size=16, width=8, num_blocks=1, quantizer=EMAVectorQuantizer.Config(num_codes=8, dim=4))
    model = config.build()
    model.save_pretrained(folder / "codebook")
    sizes = {"num_codes": 8, "grid": model.grid}
    TransformerPrior(**sizes, num_classes=2, width=16, depth=1, num_heads=2).save_pretrained(folder / "prior")
    unigram = UnigramPrior(**sizes)
    unigram.fit(torch.zeros(2, *model.grid, dtype=torch.int64))
    unigram.save_pretrained(folder / "unigram")
    (folder / "state").mkdir()
    plain = {"data": {"source": str(photos), "root": None}}
    (folder / "state" / "run.json").write_text(json.dumps(plain))
    return folder


@pytest.fixture(scope="module")
def gaussian(run):
    """A run of real latents, for the same images."""
    folder = run.parent / "gaussian"
    torch.manual_seed(0)
    model = GaussianVAE(image_size=16, width=8, num_blocks=1, dim=3)
    model.save_pretrained(folder / "codebook")
    config = MixtureTransformerPrior.Config(dim=3, grid=model.grid, num_classes=2, width=16, depth=1, num_heads=2)
    config.build().save_pretrained(folder / "prior")
    shutil.copytree(run / "state", folder / "state")
    return folder


@pytest.fixture(scope="module")
def rate_aware(run):
    """The run again, with its prior in the loop."""
    folder = run.parent / "rate-aware"
    shutil.copytree(run, folder)
    config = json.loads((folder / "codebook" / "config.json").read_text())
    assert config["beta"] is None
    (folder / "codebook" / "config.json").write_text(json.dumps({**config, "beta": 1.0}))
    return folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run the command in this process and in an empty folder; its output comes back."""
    monkeypatch.chdir(tmp_path)

    def run_command(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["vqvae", *map(str, args)])
        if code:
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert stopped.value.code == code
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1
            return lines[0]
        cli.main()
        return capsys.readouterr().out

    return run_command


def test_reconstruct_takes_as_many_as_asked(call, run, monkeypatch):
    monkeypatch.setattr(measuring, "BATCH_SIZE", 2)
    assert "reconstructions.png: 3 images" in call("reconstruct", run, "--num", "3")


def test_reconstruct(call, run, tmp_path):
    out = call("reconstruct", run, "--num", "2")
    assert "reconstructions.png: 2 images" in out
    assert "PSNR" in out
    assert "SSIM" in out
    with Image.open(tmp_path / "reconstructions.png") as picture:
        assert picture.size[1] == 2 * (64 + 2) + 2


def test_reconstruct_a_model_on_images_of_ones_own(call, run, tmp_path):
    Image.new("RGBA", (50, 30), "red").save(tmp_path / "red.png")
    (tmp_path / "mine").mkdir()
    shutil.move(tmp_path / "red.png", tmp_path / "mine" / "red.png")
    Image.new("L", (20, 20), 9).save(tmp_path / "mine" / "grey.png")
    (tmp_path / "mine" / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "set").mkdir()
    shutil.move(tmp_path / "mine", tmp_path / "set" / "test")
    shutil.copytree(tmp_path / "set" / "test", tmp_path / "set" / "train")
    out = call("reconstruct", run / "codebook", "--data", tmp_path / "set", "--output", "pairs.png")
    assert "pairs.png: 2 images" in out


def test_sample_repeats_itself(call, run, tmp_path):
    pictures = []
    for seed in (3, 3, 4):
        call("sample", run, "--num", "4", "--seed", seed, "--label", "1", "--top-k", "4", "--guidance", "1.5")
        pictures.append((tmp_path / "samples.png").read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]


def test_sample_from_parts(call, run, tmp_path):
    call("sample", run / "codebook", "--prior", run / "unigram", "--num", "3", "--pixels", "--output", "x/y.png")
    assert (tmp_path / "x" / "y.png").exists()


def test_evaluate(call, run, tmp_path):
    table = call("evaluate", run, "--output", "elbo.json")
    assert "negative ELBO" in table
    whole = json.loads((tmp_path / "elbo.json").read_text())
    assert list(whole["rate"]) == ["uniform", "unigram", "transformer"]
    call(
        "evaluate",
        run / "codebook",
        "--data",
        json.loads((run / "state" / "run.json").read_text())["data"]["source"],
        "--output",
        "part.json",
    )
    part = json.loads((tmp_path / "part.json").read_text())
    assert list(part["rate"]) == ["uniform"]
    assert part["distortion"] == pytest.approx(whole["distortion"])
    assert part["rate"]["uniform"] == pytest.approx(whole["rate"]["uniform"])


def test_a_gaussian_run(call, gaussian, tmp_path):
    assert "reconstructions.png: 3 images" in call("reconstruct", gaussian, "--num", "3")
    drawn = []
    for seed in (3, 3, 4):
        call("sample", gaussian, "--num", "4", "--seed", seed, "--label", "1", "--temperature", "0.8")
        drawn.append((tmp_path / "samples.png").read_bytes())
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    table = call("evaluate", gaussian, "--output", "elbo.json")
    assert "active channels" in table
    assert "most probable" not in table
    result = json.loads((tmp_path / "elbo.json").read_text())
    assert list(result["rate"]) == ["normal", "transformer"]
    assert result["perplexity"] is None
    assert len(result["kl_by_channel"]) == 3
    source = json.loads((gaussian / "state" / "run.json").read_text())["data"]["source"]
    call("evaluate", gaussian / "codebook", "--data", source, "--output", "part.json")
    part = json.loads((tmp_path / "part.json").read_text())
    assert list(part["rate"]) == ["normal"]
    assert part["rate"]["normal"] == pytest.approx(result["rate"]["normal"])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--top-k", "4"), "--top-k cannot be had of a prior over real vectors"),
        (("--top-p", "0.5", "--guidance", "2"), "--top-p and --guidance cannot be had of a prior over real vectors"),
    ],
)
def test_what_is_for_codes_is_refused_for_real_vectors(call, gaussian, tmp_path, options, named):
    assert named in call("sample", gaussian, *options, code=2)
    assert not (tmp_path / "samples.png").exists()


def test_real_latents_and_codes_do_not_mix(call, run, gaussian):
    for command in ("sample", "evaluate"):
        assert "dim=3" in call(command, run, "--prior", gaussian / "prior", code=2)
        assert "num_codes=8" in call(command, gaussian, "--prior", run / "prior", code=2)


def test_a_run_with_a_prior_in_the_loop(call, run, rate_aware, tmp_path):
    assert "reconstructions.png: 3 images" in call("reconstruct", rate_aware, "--num", "3")
    assert "samples.png: 4 images" in call("sample", rate_aware, "--num", "4", "--top-k", "4")
    table = call("evaluate", rate_aware, "--output", "elbo.json")
    assert "draws together" in table
    result = json.loads((tmp_path / "elbo.json").read_text())
    assert result["entropy"] > 0
    call("evaluate", run, "--output", "plain.json")
    plain = json.loads((tmp_path / "plain.json").read_text())
    # The prior has its say: codes cost less than the nearest ones do.
    assert result["deterministic"]["rate"]["transformer"] < plain["rate"]["transformer"]
    UnigramPrior(num_codes=9, grid=(4, 4)).save_pretrained(tmp_path / "other")
    assert "num_codes=9" in call("evaluate", rate_aware, "--prior", tmp_path / "other", code=2)


def test_mistakes_are_one_line(call, run, tmp_path):
    (tmp_path / "empty").mkdir()
    for args, message in (
        (("reconstruct", "nowhere"), "no model folder at nowhere"),
        (("reconstruct", tmp_path / "empty"), "has no config.json"),
        (("reconstruct", run, "--num", "0"), "--num must be at least 1"),
        (("reconstruct", run, "--data", tmp_path / "empty"), "empty"),
        (("reconstruct", run / "codebook"), "name some with --data"),
        (("reconstruct", run / "prior"), "holds a TransformerPrior, expected a GaussianVAE or VQGAN or VQVAE"),
        (("sample", run / "codebook"), "has no prior"),
        (("sample", run, "--prior", run / "codebook"), "VQVAE"),
        (("sample", run, "--label", "2"), "--label must lie in [0, 2), got 2"),
        (("sample", run, "--prior", run / "unigram", "--label", "0"), "knows no classes"),
        (("sample", run, "--temperature", "-1"), "temperature"),
        (("sample", run, "--top-p", "0"), "top_p"),
        (("evaluate", run, "--data", "nothing-known"), "nothing-known"),
    ):
        assert message in call(*args, code=2)
    assert os.listdir(tmp_path) == ["empty"]


def test_a_foreign_prior_does_not_fit(call, run, tmp_path):
    UnigramPrior(num_codes=9, grid=(4, 4)).save_pretrained(tmp_path / "other")
    for command in ("sample", "evaluate"):
        assert "num_codes=9" in call(command, run, "--prior", tmp_path / "other", code=2)


def test_unwritable_output_is_one_line(call, run, tmp_path):
    (tmp_path / "file").write_text("no folder")
    assert "could not write" in call("sample", run, "--num", "1", "--output", tmp_path / "file" / "x.png", code=2)


@pytest.mark.parametrize("command", ["reconstruct", "sample", "evaluate"])
def test_help_shows_an_example(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vqvae", command, "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert f"Example: vqvae {command} runs/fashion-mini" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_python_m_vqvae():
    done = subprocess.run([sys.executable, "-m", "vqvae", "--help"], capture_output=True, text=True, check=True)
    assert "reconstruct" in done.stdout
