"""A run's folder: its parts know what they are of, one program works in it, and what is refused changes nothing."""

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import SMALL, finish, make_images, start, wait_for, weights

from priors import Prior, TransformerPrior
from safefolder.locks import one_writer
from safefolder.options import option_fields
from vqvae import VQVAE, fingerprint
from vqvae.training import program
from vqvae.training.options import FitConfig, Run, load_run
from vqvae.training.parsing import parse


def content(folder: Path) -> dict[Path, bytes]:
    """Every file of a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `run`, and its images, `photos`; copied by those who change it."""
    root = tmp_path_factory.mktemp("finished")
    make_images(root / "photos")
    program.train(parse([*SMALL, "--data.source", str(root / "photos"), "--run", str(root / "run")]))
    return root


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """The run again, to be changed, beside the small run's own. Its images are in the place that it knows."""
    return Path(shutil.copytree(finished / "run", tmp_path / "finished"))


def test_parts_say_what_they_were_trained_on(finished):
    run = finished / "run"
    model = VQVAE.from_pretrained(run)
    images = json.loads((run / "state" / "images.json").read_text())
    for name in ("prior", "unigram", "ngram"):
        found = Prior.from_pretrained(run / name).trained_on
        assert found is not None
        assert found == (fingerprint.of_tokenizer(model), images["train"]["timeless"])
    figures = json.loads((run / "elbo.json").read_text())
    assert figures["tokenizer"] == fingerprint.of_tokenizer(model)
    assert figures["data_digest"] == images["test"]["timeless"]
    assert figures["data"] == "photos"
    saved = torch.load(run / "state" / "prior.ckpt", weights_only=True)
    assert saved["trained_on"] == list(found)


def test_case_01_a_prior_of_another_codebook_is_refused_and_trained_anew(run, fails, folder, tmp_path, capsys):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    run("--resume", "--stage", "codebook", "--run", folder, "--codebook-fit.num-steps", "12")
    errors = capsys.readouterr().err
    assert "was trained on the codes of another tokenizer" in errors
    assert f"`python train.py --resume --run {folder}`" in errors
    out, picture = tmp_path / "out", tmp_path / "x.png"
    Image.new("L", (8, 8)).save(picture)
    advice = f"vqvae train --resume --run {folder}"
    for args, said in (
        (("sample", folder, "-o", out), advice),
        (("evaluate", folder), advice),
        (("compress", folder, picture, "-o", out), advice),
        (("dream", folder, "--output", out), advice),
        (("reconstruct", folder, "--output", out), advice),
        (("push", folder, "owner/name"), advice),
        (("export", folder, "--to", "llama", "-o", out), advice),
        # A prior that is named by hand is held against the tokenizer too.
        (("sample", folder, "--prior", other / "prior", "-o", out), "train one by `vqvae train --tokenizer"),
    ):
        line = fails(*args)
        assert "of another tokenizer" in line, args
        assert said in line, args
        assert not out.exists()
    assert "of another tokenizer" in fails("--stage", "evaluate", "--run", folder)
    run("--resume", "--run", folder)
    assert "prior: trained anew" in capsys.readouterr().err
    run("sample", folder, "-o", tmp_path / "samples.png")
    tokenizer = fingerprint.of_tokenizer(VQVAE.from_pretrained(folder))
    for name in ("prior", "unigram", "ngram"):
        new, old = (Prior.from_pretrained(place / name).trained_on for place in (folder, other))
        assert new.tokenizer == tokenizer != old.tokenizer
    assert json.loads((folder / "elbo.json").read_text())["tokenizer"] == tokenizer
    # An n-gram of another run that was put in is noticed.
    shutil.rmtree(folder / "ngram")
    shutil.copytree(other / "ngram", folder / "ngram")
    assert str(folder / "ngram") in fails("--stage", "evaluate", "--run", folder)


def test_parts_of_older_runs_that_do_not_say_are_taken(run, folder, tmp_path):
    for name in ("prior", "unigram", "ngram"):
        path = folder / name / "config.json"
        plain = json.loads(path.read_text())
        del plain["trained_on"]
        path.write_text(json.dumps(plain))
    (folder / "state" / "images.json").unlink()
    saved = torch.load(folder / "state" / "prior.ckpt", weights_only=True)
    del saved["trained_on"]
    torch.save(saved, folder / "state" / "prior.ckpt")
    run("sample", folder, "-o", tmp_path / "x.png")
    before = weights(folder)
    run("--resume", "--run", folder)
    assert weights(folder) == before


def test_case_05_a_second_program_in_a_run_is_refused(options, fails, tmp_path):
    with one_writer(tmp_path / "run", inside=True):
        assert "is being written by another process" in fails(*options)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_case_05_of_two_programs_at_once_one_trains_and_one_is_refused(options, tmp_path):
    both = [start(*options, "--codebook-fit.num-steps", "40", "--seed", seed) for seed in (0, 5)]
    errors = [finish(process, None) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    refused = [process.returncode for process in both].index(2)
    # The second says so too where the first was so quick that its codebook is there already.
    line = errors[refused].splitlines()[-1]
    assert "is being written by another process" in line or "already holds a codebook" in line
    assert load_run(tmp_path / "run").seed == (0, 5)[1 - refused]
    rows = [line.split(",")[:4] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert len(rows) == len({tuple(row) for row in rows})
    assert not list((tmp_path / "run").glob(".lock"))


@pytest.fixture
def begun(run, options, tmp_path) -> tuple[Path, Path]:
    """A run of two steps, and its images, which may be changed."""
    photos = make_images(tmp_path / "photos")
    run(*options, "--data.source", photos, "--stage", "codebook", "--codebook-fit.num-steps", "2")
    return tmp_path / "run", photos


def test_case_08_a_run_does_not_go_on_with_other_images(begun, fails, tmp_path):
    folder, photos = begun
    before = content(folder)
    first = sorted((photos / "left").iterdir())[0]

    def refused() -> None:
        line = fails("--resume", "--run", folder, "--codebook-fit.num-steps", "4")
        assert "was begun with other" in line
        assert f"vqvae evaluate {folder} --data {photos}" in line
        assert content(folder) == before

    renamed = first.rename(first.with_name("zz.png"))
    refused()
    renamed.unlink()
    refused()
    Image.effect_noise((300, 300), 100).save(first)
    refused()


def test_case_08_kept_latents_are_those_of_the_images(run, options, tmp_path):
    """Images of the same names, sizes and number: what was encoded before is not taken for theirs."""
    folder, photos = tmp_path / "run", tmp_path / "photos" / "a"
    photos.mkdir(parents=True)
    kept = []
    for first, step in ((0, 10), (250, -10)):
        for index in range(20):
            Image.new("L", (8, 8), first + step * index).save(photos / f"{index:02}.bmp")
        if not kept:
            run(*options, "--data.source", photos.parent, "--stage", "codebook")
        run("--run", folder, "--stage", "prior", "--resume", "--prior-fit.num-steps", 6 + len(kept))
        kept.append([path.read_bytes() for path in sorted((folder / "state").glob("codes-*"))])
    assert len(kept[0]) == 2
    assert kept[0] != kept[1]


def test_images_that_were_only_moved_or_copied_are_the_same(run, begun, tmp_path, capsys):
    folder, photos = begun
    photos.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", copy_function=shutil.copyfile)
    capsys.readouterr()
    for name, steps in (("moved", 4), ("copied", 6)):
        words = ("--data.source", tmp_path / name, "--stage", "codebook", "--codebook-fit.num-steps", steps)
        run("--resume", "--run", folder, *words)
        said = capsys.readouterr().err
        assert ("note: files of the train and test images were written again" in said) == (name == "copied")
        assert load_run(folder).data.source == str(tmp_path / name)


REFUSED = [
    ("--model.quantizer.num-codes", "32"),
    ("--model.image-size", "16"),
    ("--model.num-channels", "3"),
    ("--model.quantizer.commitment-weight", "0.5"),
    ("--stage", "prior", "--prior.width", "32"),
    ("--stage", "prior", "--model.width", "16"),
    ("--stage", "evaluate", "--model.quantizer.num-codes", "4"),
    ("--prior.dropout", "0.5"),
    ("--codebook-fit.num-steps", "4"),
    ("--codebook-fit.num-steps", "12", "--codebook-fit.ema", "0.9"),
    ("--stage", "prior", "--prior-fit.num-steps", "12", "--prior-fit.ema", "0.9"),
    ("--stage", "prior", "--prior-fit.num-steps", "12", "--prior.num-heads", "1"),
    ("--seed", str(2**64)),
    ("--num-nodes", "2"),
]


def test_case_13_what_is_refused_leaves_the_run_as_it_was(fails, folder, tmp_path):
    before = content(folder)
    for args in REFUSED:
        fails("--resume", "--run", folder, *args)
        assert content(folder) == before, args
    # Nor is a finished run evaluated on other images.
    others = make_images(tmp_path / "others")
    (others / "left" / "00.png").unlink()
    line = fails("--resume", "--run", folder, "--data.source", others)
    assert f"vqvae evaluate {folder} --data {others}" in line
    assert content(folder) == before


def every_option() -> list[tuple[str, str]]:
    """Each option of `train` with values that are wrong, or right for some."""
    parts = ("run", "resume", "live", "model", "prior", "data", "codebook_fit", "prior_fit")
    names = [f"--{each.name}" for each in dataclasses.fields(Run) if each.name not in parts]
    for part in ("codebook_fit", "prior_fit"):
        names += [f"--{part}.{each.name}" for each in dataclasses.fields(FitConfig)]
    names += [f"--model.{name}" for name in ("width", "num-blocks", "downsampling", "image-size", "attention")]
    names += [f"--model.quantizer.{name}" for name in ("num-codes", "dim", "decay", "commitment-weight", "revival")]
    names += [f"--prior.{each.name}" for each in option_fields(TransformerPrior.Config)]
    found = [(name.replace("_", "-"), value) for name in names for value in ("-1", "0", "nonsense", "1e30")]
    return [*found, ("--data.source", "/nowhere"), ("--data.root", "/nowhere"), ("--data.num-workers", "-1")]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_refused_option_leaves_the_run_as_it_was_and_it_goes_on(run, folder, finished, capsys):
    """Every option of train.py, one by one, resuming a run that is not finished; those that are taken start anew."""
    before, num_refused = content(folder), 0
    for option in every_option():
        status = 0
        try:
            run("--resume", "--run", folder, "--stage", "codebook", "--codebook-fit.num-steps", "9", *option)
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr().err
        if status:
            num_refused += 1
            assert (status, said.count("error: ")) == (2, 1), (option, said)
            assert "not foreseen" not in said, option
            assert content(folder) == before, option
        else:
            shutil.rmtree(folder)
            shutil.copytree(finished / "run", folder)
    assert num_refused > 50
    run("--resume", "--run", folder, "--codebook-fit.num-steps", "9")


def test_case_30_a_run_is_resumed_from_anywhere(run, options, tmp_path, monkeypatch):
    make_images(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    run(*options, "--data.source", "photos", "--run", "run", "--stage", "codebook", "--codebook-fit.num-steps", "2")
    monkeypatch.chdir(tmp_path / "photos")
    run("--resume", "--run", "../run", "--stage", "codebook", "--codebook-fit.num-steps", "4")
    assert load_run(tmp_path / "run").data.source == str(tmp_path / "photos")


def test_case_33_the_words_after_an_interruption_are_the_whole_command(run, folder, monkeypatch, capsys):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqvae.training.program.evaluate_run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run("--resume", "--run", folder)
    assert stopped.value.code == 130
    assert f"go on with `python train.py --resume --run {folder}`" in capsys.readouterr().err


def test_options_are_those_of_the_last_checkpoint(run, folder):
    """A resumption that trains nothing leaves the options, and the weights, too."""
    before = weights(folder)
    run("--resume", "--run", folder, "--seed", "3", "--precision", "64-true")
    assert weights(folder) == before
    assert (load_run(folder).seed, load_run(folder).precision) == (0, "32-true")
    run("--resume", "--run", folder, "--seed", "3", "--prior-fit.num-steps", "8")
    assert load_run(folder).seed == 3


def test_a_damaged_run_json_is_one_line(fails, folder):
    path = folder / "state" / "run.json"
    good = json.loads(path.read_text())
    for change in (
        {"model": []},
        {"model": {**good["model"], "width": 10**9}},
        {"prior": {"width": "x"}},
        {"data": 5},
        {"codebook_fit": {}},
        {"seed": "x"},
        {"devices": []},
    ):
        path.write_text(json.dumps({**good, **change}))
        line = fails("--resume", "--run", folder)
        assert str(path) in line or "--model: " in line, change
    for name in ("prior_kind", "model", "prior"):
        path.write_text(json.dumps({key: value for key, value in good.items() if key != name}))
        assert f"is not a run of this version: '{name}'" in fails("--resume", "--run", folder)
    path.write_text("[" * 100_000)
    assert str(path) in fails("--resume", "--run", folder)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_case_23_a_killed_rank_is_named_and_how_to_go_on(options, tmp_path, killed):
    args = ["--codebook-fit.num-steps", "1000000", "--devices", "2", "--strategy", "ddp", "--accelerator", "cpu"]
    process = start(*options, *args)
    wait_for(tmp_path / "run" / "state" / "codebook.ckpt", process)
    (other,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill((process.pid, other)[killed], signal.SIGKILL)
    errors = finish(process, 2 if killed else None)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert f"rank {killed} ended" in lines[0]
    assert f"`python train.py --resume --run {tmp_path / 'run'}`" in lines[0]
    assert "Traceback" not in errors
