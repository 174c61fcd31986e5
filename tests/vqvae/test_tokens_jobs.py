"""One job at a time makes a tokenized set; the others are told so, and change nothing."""

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from token_worlds import contents, copied, photos, plan, tokenize, tokenize_on_ray, tokenizer

import safefolder
from vqvae import cli
from vqvae.data import load_images
from vqvae.tokens import CodeDataset, ray_session
from vqvae.tokens.jobs import one_job

SIZES = {"batch_size": 4, "shard_size": 9}
REFUSED = "is being written by another job; wait until that has ended, or name another folder"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=30)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codes") / "train"
    tokenize(tokenizer(), load_images(source, size=8), folder, **SIZES)
    return folder


@pytest.fixture
def todo(source, tmp_path):
    return plan(tokenizer(), load_images(source, size=8), tmp_path / "codes", **SIZES)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 1), (0, 1)),
        ((0, 2), (0, 2)),
        ((1, 2), (1, 2)),
        ((0, 1), (1, 2)),
        ((1, 2), (0, 1)),
        ((3, 4), (1, 2)),
        ((0, 2), (2, 3)),
    ],
)
def test_case_06_the_second_job_is_refused_before_it_does_anything(source, whole, todo, first, second, monkeypatch):
    monkeypatch.setattr("vqvae.tokens.jobs._TRYING_SECONDS", 0.0)
    images, model = load_images(source, size=8), tokenizer()
    with one_job(todo, *first) as shards:
        assert shards == list(range(first[0], 4, first[1]))
        before, encode = names(todo.folder), model.encode
        model.encode = lambda images: pytest.fail("it encoded")
        with pytest.raises(ValueError, match=REFUSED) as caught:
            tokenize(model, images, todo.folder, rank=second[0], world_size=second[1], **SIZES)
        assert "\n" not in str(caught.value)
        assert names(todo.folder) == before
    assert not todo.folder.exists()  # it is as empty as it was, and the lock's file is gone
    model.encode = encode
    tokenize(model, images, todo.folder, **SIZES)
    assert contents(todo.folder) == contents(whole)


def test_ranks_of_one_job_work_at_the_same_time(source, whole, tmp_path):
    images, together = load_images(source, size=8), threading.Barrier(3, timeout=60)
    models = [tokenizer() for _ in range(3)]
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        model = models[rank]
        encode, calls = model.encode, []

        def meet(images: torch.Tensor) -> torch.Tensor:
            if not calls:
                together.wait()  # all have begun
            calls.append(rank)
            return encode(images)

        model.encode = meet
        try:
            tokenize(model, images, tmp_path / "codes", rank=rank, world_size=3, **SIZES)
        except BaseException as error:
            errors.append(error)

    ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert errors == []
    assert contents(tmp_path / "codes") == contents(whole)


def test_locks_that_killed_jobs_left_are_no_obstacle(source, whole, tmp_path):
    images, left = load_images(source, size=8), (".lock", ".rank-0-of-1.lock", ".rank-1-of-2.lock", ".rank-3-of-4.lock")
    for rank, world_size in ((0, 1), (1, 2)):
        folder = copied(whole, tmp_path / f"{world_size}")
        (folder / "codes-00001.safetensors").unlink()
        for name in left:
            (folder / name).touch()
        assert CodeDataset(copied(whole, tmp_path / f"as-{world_size}"))[:9].labels is not None
        tokenize(tokenizer(), images, folder, rank=rank, world_size=world_size, **SIZES)
        # Those that nobody waits for go with the next job of their own ranks.
        assert set(contents(folder)) - set(contents(whole)) <= {".lock", ".rank-1-of-2.lock"}
        assert {name: contents(folder)[name] for name in contents(whole)} == contents(whole)


def test_a_lock_or_scratch_beside_the_shards_disturbs_no_reader(whole, tmp_path):
    folder = copied(whole, tmp_path / "codes")
    (folder / ".index.json.writing" / "0a1b2c3d").mkdir(parents=True)
    with safefolder.locks.one_writer(folder, inside=True):
        assert len(CodeDataset(folder)[:].codes) == 30


def test_a_whole_set_that_nobody_may_write_to_needs_no_lock(source, whole, tmp_path, monkeypatch):
    folder = copied(whole, tmp_path / "codes")

    def refused(*args: object, **options: object) -> None:
        raise ValueError("could not write") from PermissionError()

    monkeypatch.setattr("safefolder.locks.one_writer", refused)
    images = load_images(source, size=8)
    assert tokenize(tokenizer(), images, folder, **SIZES).num_images == 0
    (folder / "codes-00001.safetensors").unlink()
    with pytest.raises(ValueError, match="could not write"):
        tokenize(tokenizer(), images, folder, **SIZES)


def test_case_06_the_command_says_so_in_one_line(source, tmp_path, monkeypatch, capsys):
    tokenizer().save_pretrained(tmp_path / "run" / "codebook")
    model, images = tokenizer(), load_images(source, size=8, channels=3)
    args = ["vqvae", "tokenize", str(tmp_path / "run"), str(source), "-o", str(tmp_path / "codes"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", args)
    with one_job(plan(model, images, tmp_path / "codes" / "train")), pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    place = tmp_path / "codes" / "train"
    assert lines == [f"error: {place} {REFUSED}"]
    assert not (tmp_path / "codes").exists()


def test_case_06_the_job_on_ray_is_one_too(source, todo, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_session.RaySession, "start", lambda self: pytest.fail("it started Ray"))
    with one_job(todo), pytest.raises(ValueError, match=REFUSED):
        tokenize_on_ray(tokenizer(), load_images(source, size=8), todo.folder, **SIZES)


@pytest.fixture(scope="module")
def processes(source) -> Iterator[list[subprocess.Popen[str]]]:
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", str(here / "tokenizing_process.py"), str(source)]
    with ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        found = [stack.enter_context(subprocess.Popen(command, env=environment, text=True, **pipes)) for _ in range(2)]
        for each in found:
            stack.callback(each.kill)
            assert each.stdout is not None
            assert each.stdout.readline() == "ready\n"
        yield found


@pytest.mark.slow
def test_case_06_two_jobs_at_random_moments_make_what_one_makes(processes, whole, tmp_path):
    chance = random.Random(0)
    refused = 0
    for number in range(60):
        folder = tmp_path / f"codes-{number}"
        if number % 3:  # some of it is there already, whole or not
            copied(whole, folder)
            for name in chance.sample(sorted(contents(whole)), chance.randint(1, 4)):
                (folder / name).unlink()
            for path in chance.sample(sorted(folder.iterdir()), 1 if any(folder.iterdir()) else 0):
                path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
        for each in processes:
            assert each.stdin is not None
            each.stdin.write(f"{chance.uniform(0, 0.04):.4f} {folder}\n")
            each.stdin.flush()
        answers = [each.stdout.readline().strip() for each in processes if each.stdout is not None]
        assert any(answer.startswith("done") for answer in answers), answers
        for answer in answers:
            assert answer.startswith("done") or REFUSED in answer, answers
        refused += sum(REFUSED in answer for answer in answers)
        assert contents(folder) == contents(whole), answers
    assert refused
