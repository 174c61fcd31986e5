"""Codes of images of several sizes, read together."""

import itertools
import json

import pytest
import torch
from test_any_size import KINDS, built, noise

from vqvae.data import ImageTensors
from vqvae.tokens import CodeBuckets, tokenize
from vqvae.tokens.buckets import bucket_name

SIZES = {(8, 12): 7, (12, 8): 4, (8, 8): 10}


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    model = built(KINDS["plain"])
    for size, num in SIZES.items():
        images = ImageTensors(noise(*size, num=num), name=bucket_name(size))
        tokenize(model.resized(size), images, folder / bucket_name(size) / "train")
    (folder / "notes").mkdir()
    return CodeBuckets(folder)


def rows(batches):
    return [tuple(row.flatten().tolist()) + tuple(row.shape) for batch in batches for row in batch.codes]


def test_each_size_is_a_set(buckets):
    assert list(buckets) == [(8, 8), (8, 12), (12, 8)]
    assert len(buckets) == 3
    assert buckets[8, 12].grid == (2, 3)
    assert buckets.num_codes == 8
    assert {size: len(found) for size, found in buckets.items()} == SIZES


def test_a_pass_has_every_row_once_and_a_batch_one_grid(buckets):
    batches = list(buckets.batches(3))
    assert [tuple(batch.codes.shape) for batch in batches] == [
        *[(3, 2, 2)] * 3, (1, 2, 2), (3, 2, 3), (3, 2, 3), (1, 2, 3), (3, 3, 2), (1, 3, 2)
    ]  # fmt: skip
    whole = torch.cat([batch.codes for batch in batches[:4]])
    assert torch.equal(whole, buckets[8, 8][:].codes)
    assert len(list(buckets.batches(3, drop_last=True))) == 3 + 2 + 1


def test_a_shuffled_epoch_has_every_row_once(buckets):
    first, second = (rows(itertools.islice(buckets.batches(1, seed=3, start=at), 21)) for at in (0, 21))
    everything = rows(buckets.batches(5))
    assert sorted(first) == sorted(second) == sorted(everything)
    assert first != second
    assert first != everything
    assert rows(itertools.islice(buckets.batches(1, seed=4), 21)) != first


def test_it_goes_on_where_it_was(buckets):
    whole = rows(itertools.islice(buckets.batches(2, seed=1), 40))
    for start in (1, 7, 25):
        before = rows(itertools.islice(buckets.batches(2, seed=1), start))
        rest = rows(itertools.islice(buckets.batches(2, seed=1, start=start), 40 - start))
        assert before + rest == whole


def test_what_is_none_is_refused(buckets, tmp_path):
    for folder, split in ((tmp_path, "train"), (buckets.folder, "test"), (tmp_path / "none", "train")):
        with pytest.raises(ValueError, match="holds no codes of images of several sizes"):
            CodeBuckets(folder, split)
    for options in ({"batch_size": 0}, {"batch_size": 2, "start": -1}):
        with pytest.raises(ValueError, match="expected at least 1 and 0"):
            next(buckets.batches(**options))
    tokenize(built(KINDS["smooth"]), ImageTensors(noise(8, 12), name="noise"), tmp_path / "8x12" / "train")
    tokenize(built(KINDS["plain"]).resized(8), ImageTensors(noise(8, 8), name="noise"), tmp_path / "8x8" / "train")
    with pytest.raises(ValueError, match="codes of several tokenizers: those of 8x12 are of another than those of 8x8"):
        CodeBuckets(tmp_path)


def test_tokenizers_of_other_weights_are_told_apart(tmp_path):
    model, other = built(KINDS["plain"]), built(KINDS["plain"])
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(1.5)
    for each, size in ((model, (8, 8)), (model, (8, 12)), (other, (12, 8))):
        tokenize(each.resized(size), ImageTensors(noise(*size), name="noise"), tmp_path / bucket_name(size) / "train")
    says = "those of 12x8 are of another than those of 8x8, as their weights tell"
    with pytest.raises(ValueError, match=says):
        CodeBuckets(tmp_path)
    # As a version before wrote it: what it does not say cannot differ.
    path = tmp_path / "12x8" / "train" / "index.json"
    plain = json.loads(path.read_text())
    del plain["tokenizer"]["any_size"], plain["crc32"]
    path.write_text(json.dumps(plain))
    assert list(CodeBuckets(tmp_path)) == [(8, 8), (8, 12), (12, 8)]
    tokenize(other.resized((12, 8)), ImageTensors(noise(12, 8), name="noise"), tmp_path / "12x8" / "train")
    with pytest.raises(ValueError, match=says):
        CodeBuckets(tmp_path)
