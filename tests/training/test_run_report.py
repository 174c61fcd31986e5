"""The page that a run leaves: what is in it, that it is of the run, and the command line that it states."""

import csv
import json
import shlex

import pytest
from report_pages import Read, check_alone
from run_files import SMALL, gaussian, stopped

from vqvae import VQVAE
from vqvae.quantizers import EMAVectorQuantizer
from vqvae.training.options import load_run
from vqvae.training.parsing import parse
from vqvae.training.reproducing import command_line, public_options


def test_a_run_ends_with_its_report(run, options, tmp_path, capsys):
    run(*options)
    assert "report.html" in capsys.readouterr().out
    page = tmp_path / "run" / "report.html"
    read = Read(page)
    check_alone(read)
    figures = json.loads((tmp_path / "run" / "elbo.json").read_text())
    for value in [*figures["rate"].values(), figures["distortion"], figures["negative_elbo"]]:
        assert f"{value:.2f}" in read.text
    assert f"{figures['bits_per_dim']:.4f}" in read.text
    assert f"{figures['psnr']:.2f} dB" in read.text
    assert f"perplexity {figures['perplexity']:,.1f}" in read.text
    for title in ("Bits", "Training", "Reconstructions", "Samples", "Usage of codes", "Image by image"):
        assert title in read.text
    for told in ("left", "right", figures["models"], figures["data_digest"]):
        assert told in read.text
    # Ten best and worst of six images are all of them, each with its reconstruction; and the first; and samples.
    assert read.names.count("img") == 3 * 2 * figures["images"] + 1
    assert str(tmp_path) not in page.read_text()
    assert not list((tmp_path / "run").glob(".report*"))
    for stage in ("codebook", "prior"):
        with (tmp_path / "run" / "metrics.csv").open() as file:
            assert stage in {row[0] for row in csv.reader(file)}
        assert f"Rate, {stage}" in read.text or f"Distortion, {stage}" in read.text

    # The command writes the same page but for what only the evaluation of the run knows; and twice the same bytes.
    run("report", tmp_path / "run")
    first = page.read_bytes()
    again = Read(page)
    check_alone(again)
    assert again.text == read.text
    run("report", tmp_path / "run", "-o", tmp_path / "other.html")
    assert (tmp_path / "other.html").read_bytes() == first


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--preset folder --quantizer ResidualQuantizer/FSQ --model.image-size 96 128 --data.augment.flip",
        "--latents gaussian --model.dim 16 --model.free-bits 0.1",
        "--prior-kind PixelCNN --likelihood LocalContext --no-labels --prior-fit.num-steps 7 --seed 5",
        "--model.beta 1 --schedule alternating --logger wandb",
        "--preset photo-64 --looks.perceptual 0 --looks.adversarial 0 --compile --test-images 5",
        "--preset folder --data.source hf:owner/name --prior.depth 2 --codebook-fit.ema 0.5",
    ],
)
def test_the_command_line_asks_for_the_same_run(words):
    asked = parse([*words.split(), "--run", "runs/mine"])
    said = shlex.split(command_line(asked))
    assert said[:2] == ["vqvae", "train"]
    assert parse(said[2:]) == asked
    # What the kind of prior brings along is not said.
    assert "--prior-fit.muon" not in said


@pytest.mark.parametrize("has_trained", [False, True])
def test_the_command_line_of_a_tokenizer_takes_it_as_the_run_did(tmp_path, monkeypatch, has_trained):
    monkeypatch.chdir(tmp_path)
    model = VQVAE(image_size=8, num_channels=1, width=8, num_blocks=1, quantizer=EMAVectorQuantizer.Config(num_codes=8))
    model.save_pretrained(tmp_path / "mine")
    words = [] if has_trained else ["--stage", "prior"]
    asked = parse(["--tokenizer", "mine", *words, "--prior.depth", "2", "--run", "runs/other"])
    if has_trained:
        (tmp_path / "runs" / "other" / "state").mkdir(parents=True)
        (tmp_path / "runs" / "other" / "state" / "codebook.ckpt").touch()
    said = shlex.split(command_line(asked))
    assert parse(said[2:]) == asked
    assert not [word for word in said if word.startswith("--model")]


def test_the_command_line_is_short_and_tells_no_paths(tmp_path):
    asked = parse([*SMALL, "--data.source", str(tmp_path / "my photos"), "--run", str(tmp_path / "run")])
    said = command_line(asked)
    assert str(tmp_path) not in said
    assert "'my photos'" in said
    assert "--model.downsampling" not in said  # as in the preset
    assert dict(public_options(asked))["data.source"] == "my photos"


def test_a_run_of_vectors_ends_with_its_report(run, options, tmp_path):
    run(*gaussian(options))
    read = Read(tmp_path / "run" / "report.html")
    check_alone(read)
    assert "active channels" in read.text
    assert "Usage of channels" in read.text
    assert "posterior entropy" in read.text
    assert "--latents gaussian" in read.text
    assert parse(shlex.split(command_line(load_run(tmp_path / "run")))[2:]).latents == "gaussian"


def test_a_run_that_was_stopped_has_a_report_of_its_last_checkpoint(run, options, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    stopped(run, monkeypatch, folder, options, codebook=[5])
    run("report", folder)
    read = Read(folder / "report.html")
    check_alone(read)
    assert "run is not finished: codebook of step 5 of 8" in read.text
    assert "no prior yet" in read.text
    assert "rate, uniform prior" in read.text
    assert str(folder) not in (folder / "report.html").read_text()
    # Nothing of the run has changed: it goes on.
    run(*options, "--resume")
    again = Read(folder / "report.html")
    assert "not finished" not in again.text
    assert "rate, transformer prior" in again.text
