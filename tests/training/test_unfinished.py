"""A run that is still training, or was stopped, is looked at through its last checkpoint."""

import json
import re
import shutil

import pytest
import torch
from run_files import gaussian, stopped, without

from priors import Prior
from vqvae import VQVAE
from vqvae.training import unfinished
from vqvae.training.unfinished import unfinished_codebook, unfinished_prior

SIZES = ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]


@pytest.mark.parametrize("extra", [[], ["--codebook-fit.ema", "0.9", "--prior-fit.ema", "0.9"]])
def test_what_a_checkpoint_has_is_what_training_would_have_kept(run, options, tmp_path, monkeypatch, extra):
    """The last step's, before the model was written, is the model; and a step before it is the model of a run to it."""
    args = [*options, *extra]
    run(*args)
    folder = tmp_path / "run"
    codebook, prior = VQVAE.from_pretrained(folder / "codebook"), Prior.from_pretrained(folder / "prior")
    assert unfinished_codebook(folder) is None
    assert unfinished_prior(folder, codebook) is None
    (folder / "prior").rename(tmp_path / "prior")
    found = unfinished_prior(folder, codebook)
    assert found is not None
    assert (found.step, found.num_steps, str(found)) == (6, 6, "prior of step 6 of 6")
    assert found.prior.fingerprint() == prior.fingerprint()
    assert (found.prior.trained_on, found.prior.class_names) == (prior.trained_on, ("left", "right"))
    (folder / "codebook").rename(tmp_path / "codebook")
    found = unfinished_codebook(folder)
    assert found is not None
    assert found.model.fingerprint() == codebook.fingerprint()
    assert found.prior is None
    assert not found.model.training
    # Checkpoints of versions that did not note classes: the images are asked.
    path = folder / "state" / "prior.ckpt"
    held = torch.load(path, weights_only=True)
    del held["num_classes"], held["class_names"]
    torch.save(held, path)
    found = unfinished_prior(folder, codebook)
    assert found.prior.fingerprint() == prior.fingerprint()
    assert found.prior.class_names == ("left", "right")


@pytest.mark.parametrize("kind", ["codes", "gaussian", "loop"])
def test_commands_look_at_a_run_that_was_stopped(run, fails, options, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    args = gaussian(options) if kind == "gaussian" else options
    if kind == "loop":
        args = [*without("--model.quantizer.", options), *SIZES, "--quantizer", "GumbelQuantizer", "--model.beta", "1"]
    folder = tmp_path / "run"
    stopped(run, monkeypatch, folder, args, codebook=(6,))
    capsys.readouterr()
    run("reconstruct", folder, "--num", "2")
    said = capsys.readouterr()
    assert f"note: {folder} is not finished: codebook of step 6 of 8" in said.err
    assert "reconstructions.png: 2 images" in said.out
    run("evaluate", folder, "--output", "elbo.json")
    rates = json.loads((tmp_path / "elbo.json").read_text())["rate"]
    if kind == "loop":  # it joined in at step 5, and is the run's prior until the next one is trained
        assert list(rates) == ["uniform", "transformer"]
        run("sample", folder, "--num", "2")
    else:
        assert list(rates) == [{"codes": "uniform", "gaussian": "normal"}[kind]]
        assert "has no prior yet, only the codebook of step 6 of 8" in fails("sample", folder)
    # What is made with a model that changes is of no use to anybody later.
    assert "codebook is not finished" in fails("tokenize", folder, "photos", "-o", "codes")
    capsys.readouterr()

    monkeypatch.undo()
    stop_prior(run, monkeypatch, folder)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    run("sample", folder, "--num", "2")
    said = capsys.readouterr()
    assert f"note: {folder} is not finished: prior of step 4 of 6" in said.err
    assert "codebook of step" not in said.err
    assert "samples.png: 2 images" in said.out
    run("evaluate", folder, "--output", "elbo.json")
    assert list(json.loads((tmp_path / "elbo.json").read_text())["rate"])[-1] == "transformer"
    capsys.readouterr()
    run("reconstruct", folder, "--num", "2")
    assert ("prior of step" in capsys.readouterr().err) == (kind == "loop")


def stop_prior(run, monkeypatch, folder) -> None:
    from vqvae.training.records import Stop

    with monkeypatch.context() as patch:
        patch.setattr(Stop, "requested", lambda self, fabric, step: 15 * ((folder / "codebook").exists() and step == 3))
        with pytest.raises(SystemExit):
            run("--resume", "--run", folder)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_read_again(run, options, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    stopped(run, monkeypatch, folder, options, codebook=(3, 6))
    path, late = folder / "state" / "codebook.ckpt", tmp_path / "late.ckpt"
    shutil.copy(path, late)
    held = torch.load(path, weights_only=True)
    torch.save({**held, "step": 5}, path)
    read, tried = unfinished.checkpoint, []

    def replaced(of):
        tried.append(read(of)["step"])
        if len(tried) == 1:  # as the run goes on
            shutil.copy(late, tmp_path / "next")
            (tmp_path / "next").rename(of)
            raise ValueError("half of one and half of another")
        return read(of)

    monkeypatch.setattr(unfinished, "checkpoint", replaced)
    assert unfinished_codebook(folder).step == 6
    assert tried == [5, 6]
    path.write_bytes(b"no checkpoint")
    monkeypatch.setattr(unfinished, "checkpoint", read)
    with pytest.raises(ValueError, match=re.escape(str(path)) + " is corrupt"):
        unfinished_codebook(folder)


def test_a_prior_of_another_codebook_is_refused(run, options, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    run(*options)
    shutil.rmtree(folder / "prior")
    run("--resume", "--stage", "codebook", "--run", folder, "--codebook-fit.num-steps", "12")
    assert "train it again by" in fails("sample", folder, "--num", "2")


def test_a_finished_run_that_trains_on_says_so(run, options, tmp_path, monkeypatch, capsys):
    """What is looked at are its finished models, until there are others."""
    folder = tmp_path / "run"
    run(*options)
    capsys.readouterr()
    run("sample", folder, "--num", "2", "--output", tmp_path / "a.png")
    assert "trains on" not in capsys.readouterr().err
    stopped(run, monkeypatch, folder, ["--resume", "--run", str(folder), "--prior-fit.num-steps", "12"], prior=[10])
    capsys.readouterr()
    run("sample", folder, "--num", "2", "--output", tmp_path / "b.png")
    said = capsys.readouterr().err
    assert "trains on: the prior is its finished one, and the checkpoint of step 10 of 12 is not looked at" in said
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
