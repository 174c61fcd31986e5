"""A short trial is short: no more is encoded, counted and looked at than its steps pay for, or than was asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
from run_files import weights, without
from safetensors.torch import load_file

from priors import Prior
from vqvae.training.options import load_run
from vqvae.training.prior_data import rows_seen


@pytest.fixture
def short(options: list[str]) -> list[str]:
    """Of 54 training images the prior's two steps see sixteen."""
    return [*without("--prior-fit.num-steps", options), "--prior-fit.num-steps", "2"]


def test_only_what_a_prior_sees_is_encoded_and_counted(run, short: list[str], tmp_path: Path) -> None:
    run(*short)
    folder = tmp_path / "run"
    codes = load_file(folder / "state" / "codes-train.safetensors")
    assert len(codes["values"]) == len(codes["labels"]) == 16
    ngram = Prior.from_pretrained(folder / "ngram")
    assert int(ngram.counts.sum()) == 16 * ngram.num_positions
    before = weights(folder)
    run("--resume", "--run", folder)
    assert weights(folder) == before
    # More steps see all of it.
    run("--resume", "--run", folder, "--prior-fit.num-steps", "6")
    assert len(load_file(folder / "state" / "codes-train.safetensors")["values"]) == 54
    assert int(Prior.from_pretrained(folder / "ngram").counts.sum()) == 54 * ngram.num_positions


def test_a_short_prior_takes_what_is_there(run, options: list[str], tmp_path: Path) -> None:
    run(*options)
    path = tmp_path / "run" / "state" / "codes-train.safetensors"
    before = path.read_bytes()
    (tmp_path / "run" / "state" / "prior.ckpt").unlink()
    run("--run", tmp_path / "run", "--stage", "prior", "--prior-kind", "AnyOrder", "--prior-fit.num-steps", "1")
    assert path.read_bytes() == before


def test_rows_are_those_of_the_first_steps(run, short: list[str], tmp_path: Path) -> None:
    run(*short)
    options = load_run(tmp_path / "run")
    found = rows_seen(options, 1000, 2)
    assert found is not None
    assert len(np.unique(found)) == 2 * 8 * 2
    assert (np.diff(found) > 0).all()
    assert rows_seen(options, 33, 1) is not None
    assert rows_seen(options, 31, 1) is None


def test_of_the_test_images_so_many(run, fails, options: list[str], tmp_path: Path) -> None:
    run(*options, "--test-images", "4")
    assert json.loads((tmp_path / "run" / "elbo.json").read_text())["images"] == 4
    run("--resume", "--run", tmp_path / "run", "--test-images", "100")
    assert json.loads((tmp_path / "run" / "elbo.json").read_text())["images"] == 6
    assert "--test-images 0" in fails("--resume", "--run", tmp_path / "run", "--test-images", "0")
