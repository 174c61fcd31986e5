"""--time-budget: as many steps as fit, settled once, and a run like any other of so many steps."""

import dataclasses
import json

import pytest
from run_files import gaussian, stopped, weights, without

from vqvae.training import program, rehearsal
from vqvae.training.costs import Costs, seconds_of, settled
from vqvae.training.options import FitConfig, load_run
from vqvae.training.presets import PRESETS

STAGES = ("codebook", "prior", "evaluate")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1.5h", 5400), ("1h30m", 5400), (" 2M ", 120), ("0.5s", 0.5)]
)
def test_times_are_read(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "20", "-5m", "20 parsecs", "m", "1e3s", "nan", "infs", "5m x", "9" * 400 + "h", "1d"]
)
def test_what_is_no_time_is_refused(fails, options, tmp_path, text):
    with pytest.raises(ValueError, match=r"expected a time such as 90s, 20m or 1\.5h"):
        seconds_of(text)
    if text:
        assert "expected a time such as" in fails(*options, f"--time-budget={text}")
        assert not (tmp_path / "run").exists()


def test_the_steps_are_those_that_fit_in_the_options_proportions():
    fits = {"codebook_fit": FitConfig(num_steps=3200), "prior_fit": FitConfig(num_steps=1500)}  # 100 of warm-up
    run = dataclasses.replace(PRESETS["fashion-mini"], time_budget="20m", **fits)
    costs = Costs(codebook=0.5, prior=0.2, encoding=40.0, evaluation=60.0)
    found = settled(run, STAGES, costs, 1200.0)
    k = (1200 - 100) / (3200 * 0.5 + 1500 * 0.2)
    assert (found.codebook_fit.num_steps, found.prior_fit.num_steps) == (int(3200 * k), int(1500 * k))
    assert (found.codebook_fit.num_warmup, found.prior_fit.num_warmup) == (100, 87)
    taken = found.codebook_fit.num_steps * 0.5 + found.prior_fit.num_steps * 0.2 + 100
    assert 1200 - 0.7 < taken <= 1200
    alone = settled(run, ("codebook",), Costs(codebook=0.5), 60.0)
    assert alone.codebook_fit.num_steps == 120
    assert alone.codebook_fit.num_warmup == 12
    assert alone.prior_fit == run.prior_fit
    for left in (-5.0, 100.0, 100.4):
        with pytest.raises(ValueError, match=r"20m is too short: .* takes 1 min 40 s, with one step .*; expected more"):
            settled(run, STAGES, costs, left)


@pytest.mark.parametrize("kind", ["codes", "gaussian", "loop", "rival"])
def test_a_run_with_a_budget_is_one_of_so_many_steps_to_the_bit(run, options, fails, tmp_path, monkeypatch, kind):
    """Also where it is stopped and resumed, and whatever was tried on the weights that are thrown away."""
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    args = gaussian(options) if kind == "gaussian" else options
    if kind == "loop":
        sizes = ["--model.quantizer.num-codes", "8", "--model.quantizer.dim", "4"]
        args = [*without("--model.quantizer.", options), *sizes, "--quantizer", "GumbelQuantizer", "--model.beta", "1"]
    if kind == "rival":
        args = [*options, "--looks.adversarial", "0.1", "--looks.width", "8", "--looks.num-halvings", "0"]
    seen = []

    def fixed(of, wanted, costs, left):
        seen.append(costs)
        assert left < 3600
        return settled(of, wanted, Costs(codebook=1.0, prior=1.0), 25.0)

    monkeypatch.setattr(program, "settled", fixed)
    folder = tmp_path / "run"
    run(*args, "--time-budget", "1h")
    (costs,) = seen
    assert all(value > 0 for value in dataclasses.asdict(costs).values())
    known = load_run(folder)
    assert (known.codebook_fit.num_steps, known.prior_fit.num_steps) == (14, 10)
    assert (known.codebook_fit.num_warmup, known.prior_fit.num_warmup) == (2, 1)
    budget = folder.rename(tmp_path / "budget")

    lengths = ["--codebook-fit.num-steps", "14", "--prior-fit.num-steps", "10", "--prior-fit.num-warmup", "1"]
    plain = without("--prior-fit.num-warmup", without("--prior-fit.num-steps", args))
    run(*without("--codebook-fit.num-steps", plain), *lengths)
    assert weights(folder) == weights(budget)
    folder.rename(tmp_path / "plain")

    stopped(run, monkeypatch, folder, [*args, "--time-budget", "1h"], codebook=(3,))
    assert "was settled then" in fails("--resume", "--run", folder, "--time-budget", "2h")
    run("--resume", "--run", folder)
    assert len(seen) == 2, "settled once for each run, and not when it goes on"
    assert weights(folder) == weights(budget)


def test_a_budget_that_has_no_say_is_refused(run, options, fails, tmp_path):
    run(*options, "--stage", "codebook")
    folder = tmp_path / "run"
    assert "which trains nothing" in fails("--stage", "evaluate", "--run", folder, "--time-budget", "1m")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "too short" in fails("--stage", "prior", "--run", folder, "--time-budget", "0.001s")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert "--strategy fsdp" in fails("--stage", "prior", "--run", folder, "--time-budget", "1m", "--strategy", "fsdp")


def test_a_run_of_a_version_without_budgets_loads(run, options, tmp_path):
    run(*options, "--stage", "codebook")
    path = tmp_path / "run" / "state" / "run.json"
    plain = json.loads(path.read_text())
    del plain["time_budget"]
    path.write_text(json.dumps(plain))
    assert load_run(tmp_path / "run").time_budget is None


def test_a_long_run_is_told_of_what_comes_later(run, options, monkeypatch, capsys):
    """The later stages are tried; what the rehearsal cannot do is no matter."""
    monkeypatch.setattr(program, "MANY_STEPS", 1)
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)
    seen = []

    def tried(fabric, metrics, of, model, data, wanted):
        seen.append(tuple(wanted))
        if len(seen) == 2:
            raise ValueError("cannot be")
        found = real(fabric, metrics, of, model, data, wanted)
        assert found.codebook == 0
        assert min(found.prior, found.encoding, found.evaluation) > 0
        return found

    real = program.rehearse
    monkeypatch.setattr(program, "rehearse", tried)
    run(*options)
    run(*options, "--resume", "--codebook-fit.num-steps", "10")
    run(*options, "--resume", "--stage", "prior", "--prior-fit.num-steps", "10")
    assert seen == [("prior", "evaluate"), ("prior", "evaluate")]
