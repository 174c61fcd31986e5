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


def left_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_case_06_each_writer_has_a_scratch_of_its_own(tmp_path):
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
    assert said[0].startswith(f"{path} is being written by another process")
    assert said[1:] == ["in"]
    assert not (tmp_path / "deep").exists(), "what was made for the lock alone is gone again"
    (tmp_path / "deep").write_text("")
    write()
    assert said[2].startswith(f"could not write {path}")


def test_a_lock_is_that_of_what_a_link_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        one_writer(tmp_path / "link", inside=True),
        pytest.raises(ValueError, match="another process"),
        one_writer(tmp_path / "real", inside=True),
    ):
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


def _save_often(folder: Path, values: list[int]) -> None:
    for value in values:
        safefolder.save(folder, {"class": "Thing", "value": value}, {"x": torch.full((1000,), float(value))})


def _add(folder: Path, value: int) -> int:
    """Add a number to a file of numbers as `append` does, 50 times: read, wait, write. How often it might not."""
    refused = 0
    for _ in range(50):
        time.sleep(random.random() * 0.002)
        try:
            with one_writer(folder / "sum"):
                before = int((folder / "sum").read_text())
                time.sleep(random.random() * 0.001)
                with replacing(folder / "sum") as scratch:
                    scratch.write_text(str(before + value))
        except ValueError as error:
            if "another process" not in str(error):
                raise
            refused += 1
    return (50 - refused) * value


@pytest.mark.slow
def test_two_processes_lose_nothing_and_a_reader_sees_one_model_whole(tmp_path):
    (tmp_path / "sum").write_text("0")
    folder = tmp_path / "model"
    _save_often(folder, [0])
    with multiprocessing.get_context("forkserver").Pool(2) as pool:
        adders = [pool.apply_async(_add, (tmp_path, value)) for value in (1, 1000)]
        added = [adder.get(60) for adder in adders]
        writers = [pool.apply_async(_save_often, (folder, [value] * 20)) for value in (1, 2)]
        seen = set()
        while not all(writer.ready() for writer in writers):
            config, tensors = safefolder.load(folder)
            assert set(tensors["x"].tolist()) == {config["value"]}
            seen.add(config["value"])
        for writer in writers:
            writer.get()
    assert all(added), "each had its turn"
    assert int((tmp_path / "sum").read_text()) == sum(added)
    assert len(seen) > 1
    assert left_in(tmp_path) == {"model", "sum"}


def test_an_exchange_that_is_under_way_is_waited_for_and_not_undone(tmp_path):
    """A reader that comes between the two renames of a writer."""
    folder = tmp_path / "model"
    _save_often(folder, [1])
    new = tmp_path / "new"
    _save_often(new, [2])
    read = []
    with one_writer(folder):
        os.replace(folder, tmp_path / ".model.previous")
        reader = threading.Thread(target=lambda: read.append(safefolder.load(folder)[0]["value"]))
        reader.start()
        time.sleep(0.05)
        os.replace(new, folder)
    reader.join()
    assert read == [2]
