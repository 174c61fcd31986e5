"""Runs whose networks are compiled, or compute activations again."""

import json
import shutil

import pytest
from run_files import finish, start, wait_for, weights

from vqvae.networks.blocks import Recomputing
from vqvae.training import networks
from vqvae.training.options import load_run


def test_activations_that_are_computed_again_change_no_weight(run, options, tmp_path, monkeypatch):
    recomputed = []
    monkeypatch.setattr(
        "vqvae.networks.blocks.checkpoint", lambda call, *inputs, **_: recomputed.append(1) or call(*inputs)
    )
    run(*options, "--stage", "codebook")
    assert not recomputed
    run(*options[:-1], tmp_path / "again", "--stage", "codebook", "--checkpointing")
    assert len(recomputed) > 8
    assert weights(tmp_path / "run") == weights(tmp_path / "again")
    assert load_run(tmp_path / "again").checkpointing
    assert not Recomputing.recomputes


@pytest.mark.slow
def test_a_compiled_run_is_the_run_and_goes_on_to_the_bit(run, options, tmp_path):
    """In processes of their own: shapes are not checked there, which torch's compiler would not get through."""
    run(*options)
    whole, parts = ([*options[:-1], tmp_path / name, "--compile"] for name in ("whole", "parts"))
    finish(start(*whole))
    plain, compiled = (
        json.loads((tmp_path / name / "elbo.json").read_text())["bits_per_dim"] for name in ("run", "whole")
    )
    assert compiled == pytest.approx(plain, rel=0.02)
    process = start(*parts)
    wait_for(tmp_path / "parts" / "state" / "codebook.ckpt", process)
    process.kill()
    finish(process, None)
    finish(start("--resume", "--run", tmp_path / "parts"))
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_without_a_compiler_it_is_one_line(fails, options, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert networks.shutil is shutil
    said = fails(*options, "--compile", "--accelerator", "cpu")
    assert "--compile needs a C++ compiler on a CPU, got none of c++, g++, clang++" in said
    assert not (tmp_path / "run").exists()
