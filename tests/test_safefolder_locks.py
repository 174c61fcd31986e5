"""One writer at a time, scratch files of one's own, and readers that never see half."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import safefolder
from safefolder.files import replacing
from safefolder.locks import one_writer

FRESH = multiprocessing.get_context("forkserver")


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_case_06_each_writer_of_a_file_has_a_scratch_of_its_own(tmp_path):
    path = tmp_path / "p"
    first, second = replacing(path), replacing(path)
    first.__enter__().write_text("A, whole")
    with second.__enter__().open("w") as file:
        file.write("B, ha")
        file.flush()
        first.__exit__(None, None, None)
        assert path.read_text() == "A, whole"
        file.write("lf")
    second.__exit__(None, None, None)
    assert path.read_text() == "B, half"
    assert left_in(tmp_path) == {"p"}


def test_case_06_two_savers_of_a_folder_leave_one_whole(tmp_path):
    first, second = replacing(tmp_path / "m"), replacing(tmp_path / "m")
    for name, each in (("a", first), ("b", second)):
        folder = each.__enter__()
        folder.mkdir()
        for part in "xy":
            (folder / part).write_text(name)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert {(tmp_path / "m" / part).read_text() for part in "xy"} == {"b"}
    assert left_in(tmp_path) == {"m"}


@pytest.mark.parametrize("inside", [False, True])
def test_a_second_writer_is_refused_by_a_sentence(tmp_path, inside):
    path = tmp_path / "deep" / "thing"
    said = []

    def write() -> None:
        try:
            with one_writer(path, inside=inside):
                said.append("in")
        except ValueError as error:
            said.append(str(error))

    with one_writer(path, inside=inside):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
        write()
    write()
    assert [f"{path} is being written by another process" in each for each in said] == [True, True, False]
    assert said[2] == "in"
    assert not (tmp_path / "deep").exists(), "what was made for the lock alone is gone again"


def test_a_lock_is_that_of_what_a_link_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        one_writer(tmp_path / "link", inside=True),
        pytest.raises(ValueError, match="another process"),
        one_writer(tmp_path / "real", inside=True),
    ):
        pass


def test_a_lock_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="could not write"), one_writer(tmp_path / "file" / "x"):
        pass


HOLD = """
import sys, time
from safefolder.files import replacing
from safefolder.locks import one_writer
with one_writer(sys.argv[1]), replacing(__import__("pathlib").Path(sys.argv[1])) as scratch:
    scratch.write_text("half")
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_ends_with_its_process_and_what_it_was_writing_is_swept_up(tmp_path):
    path = tmp_path / "thing"
    path.write_text("old")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another process"), one_writer(path):
        pass
    with replacing(path) as scratch:  # which needs no lock, and leaves what others are at work on
        scratch.write_text("new")
    assert (tmp_path / ".thing.writing").is_dir()
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with one_writer(path), replacing(path) as scratch:
        scratch.write_text("newer")
    assert path.read_text() == "newer"
    assert left_in(tmp_path) == {"thing"}


def _append(path: Path, who: int, rounds: int, seed: int) -> list[str]:
    """Add lines to a file as `append` does: read, wait, write. Lines that it was allowed to add."""
    added, rng = [], random.Random(seed)
    for number in range(rounds):
        time.sleep(rng.random() * 0.002)
        line = f"{who} {number}"
        try:
            with one_writer(path):
                before = path.read_text()
                time.sleep(rng.random() * 0.002)
                with replacing(path) as scratch:
                    scratch.write_text(f"{before}{line}\n")
        except ValueError as error:
            if "another process" not in str(error):
                raise
        else:
            added.append(line)
    return added


@pytest.mark.slow
def test_two_processes_that_write_at_random_moments_lose_nothing(tmp_path):
    """A hundred rounds each: what was not refused is there, once."""
    path = tmp_path / "lines"
    path.write_text("")
    with FRESH.Pool(2) as pool:
        parts = [pool.apply_async(_append, (path, who, 100, who)) for who in range(2)]
        added = [line for part in parts for line in part.get(60)]
    assert len({line.split()[0] for line in added}) == 2, "each had its turn"
    assert sorted(path.read_text().splitlines()) == sorted(added)
    assert left_in(tmp_path) == {"lines"}


def _save_often(folder: Path, value: float, times: int) -> None:
    for _ in range(times):
        safefolder.save(folder, {"class": "Thing", "value": value}, {"x": torch.full((1000,), value)})


@pytest.mark.slow
def test_a_reader_of_a_folder_that_is_replaced_sees_one_model_whole(tmp_path):
    folder = tmp_path / "model"
    _save_often(folder, 0.0, 1)
    with FRESH.Pool(2) as pool:
        writers = [pool.apply_async(_save_often, (folder, float(value), 20)) for value in (1, 2)]
        seen = set()
        while not all(writer.ready() for writer in writers):
            config, tensors = safefolder.load(folder)
            assert set(tensors["x"].tolist()) == {config["value"]}
            seen.add(config["value"])
        for writer in writers:
            writer.get()
    assert len(seen) > 1
    assert left_in(tmp_path) == {"model"}


def test_an_exchange_that_is_under_way_is_waited_for_and_not_undone(tmp_path):
    """A reader that comes between the two renames of a writer."""
    folder = tmp_path / "model"
    _save_often(folder, 1.0, 1)
    new = tmp_path / "new"
    _save_often(new, 2.0, 1)
    read = []
    with one_writer(folder):
        os.replace(folder, tmp_path / ".model.previous")
        reader = threading.Thread(target=lambda: read.append(safefolder.load(folder)[0]["value"]))
        reader.start()
        time.sleep(0.05)
        os.replace(new, folder)
    reader.join()
    assert read == [2.0]
