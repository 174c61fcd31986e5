"""What stands where a folder is written: only a model of ours is replaced, and a link to a folder is followed."""

import os

import pytest
import torch

import safefolder
from safefolder.files import replacing_folder

CONFIG = {"class": "Thing", "size": 3}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}


@pytest.mark.parametrize("name", ["thesis.tex", "README.md", "elbo.json", "samples.png", "unet/weights.bin", ".hidden"])
def test_what_is_not_a_model_s_is_not_removed(name, tmp_path):
    """A card or a figure tells of the model that is there, so it is neither lost nor put beside another."""
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    path = tmp_path / "thing" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other things, {name.split('/')[0]}, .* take another folder"):
        safefolder.save(tmp_path / "thing", {**CONFIG, "size": 4}, TENSORS)
    assert path.read_text() == "mine"
    assert safefolder.load(tmp_path / "thing")[0]["size"] == 3
    assert os.listdir(tmp_path) == ["thing"]


def test_what_comes_while_a_folder_is_written_stays(tmp_path):
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    names = ("config.json", "model.safetensors")
    with (
        pytest.raises(ValueError, match=r"holds other things, notes\.txt"),
        replacing_folder(tmp_path / "thing", names),
    ):
        (tmp_path / "thing" / "notes.txt").write_text("mine")
    assert (tmp_path / "thing" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["thing"]


def test_our_own_leavings_are_replaced(tmp_path):
    """Shards of an earlier model, and a file that was being written when the process died."""
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS, max_shard_size=10)
    (tmp_path / "thing" / ".config.json.writing").write_text("{")
    safefolder.save(tmp_path / "thing", CONFIG, TENSORS)
    assert sorted(os.listdir(tmp_path / "thing")) == ["config.json", "model.safetensors"]


def test_others_files_of_the_same_names_are_not_replaced(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(ValueError, match="holds something else under the same names"):
        safefolder.save(folder, CONFIG, TENSORS)
    assert (folder / "model.safetensors").read_bytes() == b"theirs"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        safefolder.save(tmp_path / "file", CONFIG, TENSORS)
    assert (tmp_path / "file").read_text() == "mine"


def test_the_folder_that_we_stand_in_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is the folder that this program runs in"):
        safefolder.save(".", CONFIG, TENSORS)


def test_a_link_to_a_folder_is_followed_and_one_to_a_file_is_not(tmp_path):
    safefolder.save(tmp_path / "disk" / "thing", CONFIG, TENSORS)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "thing")
    safefolder.save(tmp_path / "link", {**CONFIG, "size": 4}, TENSORS)
    assert (tmp_path / "link").is_symlink()
    assert safefolder.load(tmp_path / "disk" / "thing")[0]["size"] == 4
    os.replace(tmp_path / "disk" / "thing", tmp_path / "disk" / ".thing.previous")
    assert safefolder.load(tmp_path / "link")[0]["size"] == 4  # killed between the renames
    (tmp_path / "disk" / "text").write_text("theirs")
    (tmp_path / "text").symlink_to(tmp_path / "disk" / "text")
    safefolder.files.write_text(tmp_path / "text", "new")
    assert not (tmp_path / "text").is_symlink()
    assert (tmp_path / "disk" / "text").read_text() == "theirs"
    assert sorted(os.listdir(tmp_path)) == ["disk", "link", "text"]
