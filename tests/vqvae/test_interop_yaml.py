"""Yamls that others wrote: what is read, and one short line for each that is not."""

import os
import tracemalloc

import pytest
import yaml

from vqvae.interop.plain_yaml import read_yaml


def refuses(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(path)
    said = str(caught.value).replace(str(path), "")
    assert "\n" not in said
    assert len(said) < 150


LAUGHS = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{number}: &a{number + 1} [{', '.join([f'*a{number}'] * 10)}]\n" for number in range(9)
)
MERGED = "a: &a0 {x: 1, y: 2}\n" + "".join(
    f"b{number}: &a{number + 1} {{<<: [*a{number}, *a{number}]}}\n" for number in range(25)
)
REFUSED = {
    "a list of 600 kB": ("[" + "1, " * 200_000 + "1]", "it has 600,003 bytes, expected at most 262,144"),
    "billion laughs": (LAUGHS, "it has over 20,000 values"),
    "merged laughs": (MERGED, "it has over 20,000 values"),
    "depth": ("[" * 60 + "]" * 60, "it is nested too deeply, expected at most 50 levels"),
    "open brackets": ("[" * 100_000, r"nested too deeply|exceeded maximum nesting depth, line 1"),
    "block depth": ("\n".join(" " * depth + "a:" for depth in range(400)), "nested too deeply"),
    "a timestamp that is none": ("ch: !!timestamp x", "cannot be read as yaml: "),
    "an integer of many digits": ("ch: " + "9" * 9_000, "cannot be read as yaml: "),
    "bytes that are none": ("ch: !!binary 'é'", "cannot be read as yaml: "),
    "a long text": ("ch: " + "x" * 20_000, "it has a text of 20,000 characters, expected at most 10,000"),
    "a tag of Python's": ("!!python/object/apply:os.system ['true']", "cannot be read as yaml: "),
    "an alias of what it is in": ("&a [*a]", r"it has the alias 'a' before what it stands for"),
    "a key of another kind": ("{[1]: 2}", "cannot be read as yaml: "),
    "two documents": ("a: 1\n---\nb: 2", "cannot be read as yaml: "),
    "control characters": (b"a: \x01", "cannot be read as yaml: "),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("is_fast", [True, False])
def test_case_18_a_yaml_that_harms_is_one_short_line(name, is_fast, tmp_path, monkeypatch):
    """By libyaml, and by the parser of a PyYAML without it."""
    if not is_fast:
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
        monkeypatch.setattr("vqvae.interop.plain_yaml.MOST_VALUES", 500)
    text, message = REFUSED[name]
    message = message if is_fast else message.replace("20,000 values", "500 values")
    path = tmp_path / "model.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    tracemalloc.start()
    try:
        refuses(path, message)
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


def test_a_yaml_is_read_from_a_regular_file(tmp_path):
    refuses(tmp_path, "it is a folder")
    os.mkfifo(tmp_path / "pipe.yaml")
    refuses(tmp_path / "pipe.yaml", "it is no file but a pipe or device")


def test_yamls_with_aliases_are_read(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("base: &base {ch: 32, ch_mult: [1, 2]}\nmodel: {<<: *base, z: 4}\n")
    base = {"ch": 32, "ch_mult": [1, 2]}
    assert read_yaml(path) == {"base": base, "model": {**base, "z": 4}}
