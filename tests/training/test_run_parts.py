"""A run's folder: its parts know what they are of, one program works in it, and what is refused changes nothing."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from PIL import Image
from run_files import SMALL, make_images, weights

import train
import vqvae.cli
from priors import NGramPrior, Prior
from safefolder.locks import one_writer
from vqvae import VQVAE, fingerprint
from vqvae.training.options import FitConfig, Run, load_run, parse

ROOT = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder, by what is in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run, `run`, and its images, `photos`; copied by those who change it."""
    root = tmp_path_factory.mktemp("finished")
    make_images(root / "photos")
    argv = ["train.py", *SMALL, "--data.source", str(root / "photos"), "--run", str(root / "run")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        train.main()
    return root


@pytest.fixture
def place(finished: Path, tmp_path: Path) -> Path:
    """The same, to be changed. Its images are in the place that the run knows."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Call `vqvae` in this process; its exit status and what it said on stderr."""

    def call(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vqvae", *args])
        status = 0
        try:
            vqvae.cli.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, capsys.readouterr().err

    return call


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


def test_case_01_a_codebook_trained_on_has_its_prior_trained_anew(run, place, capsys):
    before = {name: Prior.from_pretrained(place / "run" / name).trained_on for name in ("prior", "unigram", "ngram")}
    run("--resume", "--run", str(place / "run"), "--codebook-fit.num-steps", "12")
    assert "prior: trained anew" in capsys.readouterr().err
    tokenizer = fingerprint.of_tokenizer(VQVAE.from_pretrained(place / "run"))
    for name, old in before.items():
        new = Prior.from_pretrained(place / "run" / name).trained_on
        assert new.tokenizer == tokenizer != old.tokenizer
    assert json.loads((place / "run" / "elbo.json").read_text())["tokenizer"] == tokenizer


def test_case_01_a_prior_of_another_codebook_is_refused_everywhere(run, fails, command, place, capsys):
    folder = str(place / "run")
    run("--resume", "--stage", "codebook", "--run", folder, "--codebook-fit.num-steps", "12")
    errors = capsys.readouterr().err
    assert "was trained on the codes of another tokenizer" in errors
    assert f"`python train.py --resume --run {folder}`" in errors
    Image.new("L", (8, 8)).save(place / "x.png")
    for args in (
        ("sample", folder, "-o", str(place / "samples.png")),
        ("evaluate", folder),
        ("compress", folder, str(place / "x.png"), "-o", str(place / "x.vq")),
        ("dream", folder, "--output", str(place / "dream.png")),
        ("reconstruct", folder, "--output", str(place / "pairs.png")),
        ("push", folder, "owner/name"),
        ("export", folder, "--to", "llama", "-o", str(place / "llama")),
    ):
        status, errors = command(*args)
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert status == 2, args
        assert "of another tokenizer" in lines[0], args
        assert f"vqvae train --resume --run {folder}" in lines[0], args
    assert {path.name for path in place.iterdir()} == {"run", "x.png"}
    assert "of another tokenizer" in fails("--stage", "evaluate", "--run", folder)
    run("--resume", "--run", folder)
    assert command("sample", folder, "-o", str(place / "samples.png"))[0] == 0


def test_a_prior_named_by_hand_is_held_against_the_tokenizer_too(run, options, command, tmp_path):
    run(*options, "--stage", "codebook")
    run(*options, "--run", str(tmp_path / "other"), "--seed", "1")
    status, errors = command("sample", str(tmp_path / "run"), "--prior", str(tmp_path / "other" / "prior"))
    assert status == 2
    assert "of another tokenizer" in errors
    assert "train one by `vqvae train --tokenizer" in errors


def test_parts_of_older_runs_that_do_not_say_are_taken(run, command, place):
    for name in ("prior", "unigram", "ngram"):
        path = place / "run" / name / "config.json"
        plain = json.loads(path.read_text())
        del plain["trained_on"]
        path.write_text(json.dumps(plain))
    (place / "run" / "state" / "images.json").unlink()
    saved = torch.load(place / "run" / "state" / "prior.ckpt", weights_only=True)
    del saved["trained_on"]
    torch.save(saved, place / "run" / "state" / "prior.ckpt")
    assert command("sample", str(place / "run"), "-o", str(place / "x.png"))[0] == 0
    before = weights(place / "run")
    run("--resume", "--run", str(place / "run"))
    assert weights(place / "run") == before


def test_case_05_a_second_program_in_a_run_is_refused(options, fails, tmp_path):
    with one_writer(tmp_path / "run", inside=True):
        line = fails(*options)
        assert "is being written by another process" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_case_05_of_two_programs_at_once_one_trains_and_one_is_refused(options, tmp_path):
    args = [sys.executable, str(ROOT / "train.py"), *options, "--codebook-fit.num-steps", "40"]
    both = [
        subprocess.Popen([*args, "--seed", seed], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in ("0", "5")
    ]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    refused = [process.returncode for process in both].index(2)
    # The second says so too where the first was so quick that its codebook is there already.
    line = errors[refused].splitlines()[-1]
    assert "is being written by another process" in line or "already holds a codebook" in line
    known = load_run(tmp_path / "run")
    assert known.seed == (0, 5)[1 - refused]
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [line.split(",")[:4] for line in file]
    assert len(rows) == len({tuple(row) for row in rows})
    assert not list((tmp_path / "run").glob(".lock"))


@pytest.mark.parametrize("what", ["deleted", "renamed", "replaced"])
def test_case_08_a_run_does_not_go_on_with_other_images(run, options, fails, tmp_path, what):
    photos = make_images(tmp_path / "photos")
    run(*options, "--data.source", str(photos), "--stage", "codebook", "--codebook-fit.num-steps", "2")
    before = content(tmp_path / "run")
    first = sorted((photos / "left").iterdir())[0]
    if what == "replaced":
        Image.effect_noise((300, 300), 100).save(first)
    elif what == "renamed":
        first.rename(first.with_name("zz.png"))
    else:
        first.unlink()
    line = fails("--resume", "--run", str(tmp_path / "run"), "--codebook-fit.num-steps", "4")
    assert "was begun with other" in line
    assert f"vqvae evaluate {tmp_path / 'run'} --data {photos}" in line
    assert content(tmp_path / "run") == before


def test_case_08_kept_latents_are_those_of_the_images(run, options, tmp_path):
    """Images of the same names, sizes and number: what was encoded before is not taken for theirs."""
    photos = tmp_path / "photos"
    for index in range(20):
        (photos / "a").mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 10 * index).save(photos / "a" / f"{index:02}.bmp")
    args = [*options, "--data.source", str(photos), "--stage"]
    run(*args, "codebook")
    run(*args, "prior")
    kept = [path.read_bytes() for path in sorted((tmp_path / "run" / "state").glob("codes-*"))]
    for index in range(20):
        Image.new("L", (8, 8), 250 - 10 * index).save(photos / "a" / f"{index:02}.bmp")
    run("--resume", "--stage", "prior", "--run", str(tmp_path / "run"), "--prior-fit.num-steps", "8")
    assert [path.read_bytes() for path in sorted((tmp_path / "run" / "state").glob("codes-*"))] != kept


def test_images_that_were_only_moved_or_copied_are_the_same(run, options, tmp_path, capsys):
    photos = make_images(tmp_path / "photos")
    run(*options, "--data.source", str(photos), "--stage", "codebook", "--codebook-fit.num-steps", "2")
    photos.rename(tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied", copy_function=shutil.copyfile)
    capsys.readouterr()
    more = ["--stage", "codebook", "--codebook-fit.num-steps"]
    run("--resume", "--run", str(tmp_path / "run"), "--data.source", str(tmp_path / "moved"), *more, "4")
    assert "note:" not in capsys.readouterr().err
    run("--resume", "--run", str(tmp_path / "run"), "--data.source", str(tmp_path / "copied"), *more, "6")
    assert "note: files of the train and test images were written again" in capsys.readouterr().err
    assert load_run(tmp_path / "run").data.source == str(tmp_path / "copied")


def test_case_31_a_finished_run_is_not_evaluated_on_other_images(fails, place):
    make_images(place / "others")
    (place / "others" / "left" / "00.png").unlink()
    before = content(place / "run")
    line = fails("--resume", "--run", str(place / "run"), "--data.source", str(place / "others"))
    assert f"vqvae evaluate {place / 'run'} --data {place / 'others'}" in line
    assert content(place / "run") == before


REFUSED = [
    ("--model.quantizer.num-codes", "32"),
    ("--model.image-size", "16"),
    ("--model.num-channels", "3"),
    ("--model.quantizer.commitment-weight", "0.5"),
    ("--stage", "prior", "--prior.width", "17"),
    ("--stage", "prior", "--prior.width", "32"),
    ("--stage", "prior", "--model.width", "16"),
    ("--stage", "evaluate", "--model.quantizer.num-codes", "4"),
    ("--prior.dropout", "0.5"),
    ("--codebook-fit.num-steps", "4"),
    ("--prior-fit.num-steps", "2"),
    ("--codebook-fit.num-steps", "12", "--codebook-fit.ema", "0.9"),
    ("--stage", "prior", "--prior-fit.num-steps", "12", "--prior-fit.ema", "0.9"),
    ("--stage", "prior", "--prior-fit.num-steps", "12", "--prior.num-heads", "1"),
    ("--seed", str(2**64)),
    ("--num-nodes", "2"),
]


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_case_13_what_is_refused_leaves_the_run_as_it_was(fails, place, args):
    before = content(place / "run")
    fails("--resume", "--run", str(place / "run"), *args)
    assert content(place / "run") == before


def every_option() -> list[tuple[str, str]]:
    """Each option of `train` with a value that it does not have, wrong or right."""
    found = []
    for name, kind in (("", Run), ("codebook-fit.", FitConfig), ("prior-fit.", FitConfig)):
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(field.type) or field.name in (
                "run",
                "resume",
                "live",
                "model",
                "prior",
                "data",
            ):
                continue
            if field.name.endswith("_fit"):
                continue
            option = f"--{name}{field.name.replace('_', '-')}"
            values = [*map(str, get_args(field.type)[-1:]), "-1", "0", "nonsense", "1e30"]
            found += [(option, value) for value in values if "<class" not in value and value != "None"]
    for name in ("width", "num-blocks", "downsampling", "image-size", "attention"):
        found += [(f"--model.{name}", value) for value in ("-1", "0", "3", "nonsense", "1000000000")]
    for name in ("num-codes", "dim", "decay", "commitment-weight", "revival"):
        found += [(f"--model.quantizer.{name}", value) for value in ("-1", "0", "3", "nonsense", "1e30")]
    for name in ("width", "depth", "num-heads", "dropout", "label-dropout", "code-noise"):
        found += [(f"--prior.{name}", value) for value in ("-1", "0", "3", "nonsense", "1e30")]
    found += [("--data.source", "/nowhere"), ("--data.root", "/nowhere"), ("--data.num-workers", "-1")]
    return found


EVERY_OPTION = """
import contextlib, hashlib, io, json, pathlib, shutil, sys
import train

folder, good, options = json.loads(sys.argv[1])


def content():
    paths = [path for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def call(*args):
    sys.argv = ["train.py", "--resume", "--run", folder, *args]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            train.main()
        except SystemExit as stop:
            return stop.code or 0, said.getvalue()
    return 0, said.getvalue()


before, wrong, counts = content(), [], {}
for option in options:
    status, said = call("--stage", "codebook", "--codebook-fit.num-steps", "9", *option)
    counts[str(status)] = counts.get(str(status), 0) + 1
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    is_one_line = status == 2 and len(lines) == 1 and "Traceback" not in said and "not foreseen" not in said
    if status and not (is_one_line and content() == before):
        wrong.append((option, status, said[-500:]))
    if content() != before:
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
print(json.dumps([wrong, counts, call("--codebook-fit.num-steps", "9")]))
"""


@pytest.mark.slow
def test_a_refused_option_leaves_the_run_as_it_was_and_it_goes_on(place, finished):
    """Every option of train.py, one by one, resuming a run that is not finished; those that are taken start anew."""
    folder, script = place / "run", place / "all.py"
    script.write_text(EVERY_OPTION)  # one process for all, as each would import torch
    given = json.dumps([str(folder), str(finished / "run"), every_option()])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), given], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    wrong, counts, (status, said) = json.loads(done.stdout.splitlines()[-1])
    assert not wrong, wrong
    assert counts["2"] > 50
    assert status == 0, said


def test_case_30_a_run_is_resumed_from_anywhere(run, options, tmp_path, monkeypatch):
    make_images(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    run(*options, "--data.source", "photos", "--run", "run", "--stage", "codebook", "--codebook-fit.num-steps", "2")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("--resume", "--run", "../run", "--stage", "codebook", "--codebook-fit.num-steps", "4")
    assert load_run(tmp_path / "run").data.source == str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--prior.widht", "17"), ("--prior.widht", "perhaps you meant --prior.width")),
        (("--preset", "folder"), ("--data.source",)),
        (("--preset",), ("--preset",)),
        (("--stage", "everything"), ("--stage", "codebook")),
        (("--accelerator", "cuda"), ("CUDA", "['cpu']")),
        (("--devices", "100000", "--accelerator", "cpu"), ("--devices", "at most")),
        (("--model.width", "1000000000"), ("--model", "1000000000")),
        (("--model.quantizer.num-codes", "1000000000000"), ("--model.quantizer", "GB")),
    ],
)
def test_case_33_mistakes_name_the_option(fails, tmp_path, args, words):
    line = fails(*args, "--run", str(tmp_path / "run"))
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_case_33_the_words_after_an_interruption_are_the_whole_command(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--run", str(place / "run")])

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vqvae.training.program.evaluate_run", interrupted)
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == 130
    assert f"go on with `python train.py --resume --run {place / 'run'}`" in capsys.readouterr().err


def test_a_run_of_a_finished_stage_is_not_cast_by_a_precision(run, place):
    before = weights(place / "run")
    run("--resume", "--run", str(place / "run"), "--precision", "64-true")
    assert weights(place / "run") == before
    assert load_run(place / "run").precision == "32-true"


def test_a_damaged_run_json_is_one_line(fails, place):
    path = place / "run" / "state" / "run.json"
    good = json.loads(path.read_text())
    for change in (
        {"model": []},
        {"model": {**good["model"], "width": 10**9}},
        {"prior": {"width": "x"}},
        {"prior_kind": []},
        {"data": 5},
        {"codebook_fit": {}},
        {"seed": "x"},
        {"devices": []},
    ):
        path.write_text(json.dumps({**good, **change}))
        line = fails("--resume", "--run", str(place / "run"))
        assert str(path) in line or "--model: " in line, change
    path.write_text("[" * 100_000)
    assert str(path) in fails("--resume", "--run", str(place / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_case_23_a_killed_rank_is_named_and_how_to_go_on(options, tmp_path, killed):
    args = [*options, "--codebook-fit.num-steps", "1000000", "--devices", "2", "--strategy", "ddp"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *args, "--accelerator", "cpu"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "state" / "codebook.ckpt").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (other,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    os.kill((process.pid, other)[killed], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert f"rank {killed} ended" in lines[0]
    assert f"`python train.py --resume --run {tmp_path / 'run'}`" in lines[0]
    assert "Traceback" not in errors
    if killed:
        assert process.returncode == 2


def test_an_ngram_of_another_run_put_in_is_noticed(fails, place):
    prior = NGramPrior.from_pretrained(place / "run" / "ngram")
    prior.trained_on = prior.trained_on._replace(tokenizer="0" * 64)
    prior.save_pretrained(place / "run" / "ngram")
    line = fails("--stage", "evaluate", "--run", str(place / "run"))
    assert str(place / "run" / "ngram") in line


def test_options_are_those_of_the_last_checkpoint(run, place):
    """A resumption that fails before it saves leaves the options, too."""
    assert parse(["--resume", "--run", str(place / "run"), "--seed", "3"]).seed == 3
    run("--resume", "--run", str(place / "run"), "--seed", "3")
    assert load_run(place / "run").seed == 0, "nothing was left to train"
    run("--resume", "--run", str(place / "run"), "--seed", "3", "--prior-fit.num-steps", "8")
    assert load_run(place / "run").seed == 3
