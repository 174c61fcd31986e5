"""JSON that others may have written: what is read, and one short line for each that is not."""

import json
import os

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safefolder.messages import shown
from safefolder.tensors import few, in_short, read_json, read_safetensors, wrapped_by


def refuses(path, message, **options):
    with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$") as caught:
        read_json(path, **options)
    assert len(str(caught.value).replace(str(path), "")) < 250


HOSTILE = {
    "nested too deeply": [b"[" * 100_000, b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}"],
    "expected finite numbers": [b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}'],
    "a number of 5000 digits": [b'{"a": ' + b"7" * 5000 + b"}"],
    "the key 'a' twice": [b'{"a": 1, "a": 2}', b'{"b": [{"a": 1, "c": 2, "a": 1}]}'],
    "surrogates not allowed": [b'{"a": "\\ud800"}', b'["\\uD83D"]'],
    "cannot be read as JSON": [b"", b"{", b"\xff\xfe{\x00}\x00", b'{"a": 1} b', b'{"a": "\n"}'],
    "holds a list, expected an object": [b"[]"],
}


@pytest.mark.parametrize("message", HOSTILE)
def test_case_22_json_that_harms_is_one_short_line(message, tmp_path):
    path = tmp_path / "index.json"
    for data in HOSTILE[message]:
        path.write_bytes(data)
        refuses(path, message)


def test_case_22_json_is_read_from_regular_files_of_a_stated_size(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    refuses(path, "109 bytes, expected at most 108", most_bytes=108)
    assert read_json(path, most_bytes=109) == {"a": "x" * 100}
    refuses(tmp_path / "absent", "No such file")
    refuses(tmp_path / ("x" * 300), "File name too long")
    os.mkfifo(tmp_path / "pipe")
    refuses(tmp_path / "pipe", "a pipe or device")
    with pytest.raises(ValueError, match=r"^the label cannot be read as JSON: it is a folder$"):
        read_json(tmp_path, "the label")
    path.write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": "\xc3\xa9", "c": ' + b"[" * 99 + b"]" * 99 + b"}")
    assert read_json(path).items() >= {"a": "😀", "b": "é"}.items()


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**99), 10**99) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=5), inside, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=5), plain, max_size=3), escaped=st.booleans(), damage=st.randoms())
@settings(max_examples=40, deadline=None)
def test_json_is_what_was_written_and_where_it_is_damaged_read_or_refused(tmp_path_factory, value, escaped, damage):
    path = tmp_path_factory.getbasetemp() / "any.json"
    data = json.dumps(value, ensure_ascii=escaped).encode()
    path.write_bytes(data)
    assert read_json(path) == value
    at = damage.randrange(len(data))
    path.write_bytes(data[:at] + damage.randbytes(1) + data[at + 1 :])
    said = ""
    try:
        assert type(read_json(path)) is dict
    except ValueError as error:
        said = str(error)
    assert len(said.replace(str(path), "")) < 250


def test_what_errors_quote_is_short_and_one_line():
    for value in ("x" * 10**6, [1] * 10**6, 10**4000, 16**9999, {"a": {"b": {"c": {"d": [1] * 99}}}}, ["\n" * 9] * 9):
        assert len(shown(value)) <= 100
        assert "\n" not in shown(value)
    assert [shown(value) for value in ("a", [1, 2], 2.5, None)] == ["'a'", "[1, 2]", "2.5", "None"]
    assert few(["a\nb", "\x1b[2J", "c" * 1000, "d"]) == "a b,  [2J, " + "c" * 197 + "... and 1 more"
    assert in_short(ValueError("one\ntwo")) == "one"
    assert in_short(MemoryError()) == "MemoryError"


def test_headers_of_safetensors_are_bounded(tmp_path):
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is no file"):
        read_safetensors(path)
    path.unlink()
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    data = path.read_bytes()
    for changed, message in (
        ((1 << 40).to_bytes(8, "little") + b"{}", "1,099,511,627,776 bytes"),
        (data.replace(b"F32", b"F33"), "corrupt"),
        (data.replace(b"[2]", b"[3]"), "corrupt"),
    ):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            read_safetensors(path)
    safetensors.torch.save_file({"a": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, path)
    with pytest.raises(ValueError, match=r"a in torch\.float4_e2m1fn_x2"):
        read_safetensors(path)
    safetensors.torch.save_file({"a": torch.ones(4).to(torch.float8_e4m3fn), "b": torch.ones(2).bfloat16()}, path)
    assert read_safetensors(path).keys() == {"a", "b"}


def test_names_with_a_wrapper_s_part_are_told_from_others():
    own = ["encoder.weight", "module.bias"]
    for given_names, part in (
        (own, None),
        (["_orig_mod.encoder.weight", "_orig_mod.module.bias"], None),  # taken off, its `module` would go too
        (["_orig_mod.encoder.weight", "module.bias"], "'_orig_mod', which torch.compile puts there"),
        (["encoder._fsdp_wrapped_module.weight"], "'_fsdp_wrapped_module', which FullyShardedDataParallel puts there"),
        (["other.encoder.weight"], None),
    ):
        said = wrapped_by(own, given_names)
        assert (said is None) if part is None else (part in said)
