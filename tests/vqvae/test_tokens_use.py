"""Tokenized sets as they are read: rows, slices and batches, by torch's loaders, as parquet and by other programs."""

import dataclasses
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from token_worlds import equal, joined, loaded, photos, refused, tokenize, tokenizer
from torch.utils.data import ConcatDataset, DataLoader, Subset

from priors import UniformPrior
from vqvae import fingerprint
from vqvae.codec.model_fingerprint import fingerprint as of_codec
from vqvae.data import ImageTensors, batches
from vqvae.likelihoods import Categorical
from vqvae.tokens import CodeBatch, CodeDataset, write_parquet

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # one of torch itself, which tells of few cores
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return photos(tmp_path_factory.mktemp("source") / "photos", num=30)


@pytest.fixture(scope="module", params=["labels", "no labels"])
def world(request, source, tmp_path_factory) -> tuple[CodeDataset, CodeBatch]:
    """A set, and what it has to hold: as 30 rows in 4 shards, of 2 classes or without labels."""
    folder, images, model = tmp_path_factory.mktemp("codes"), loaded(source), tokenizer("residual")
    batch = images.__getitems__(range(30))
    if request.param == "no labels":
        images = ImageTensors(batch.images)
    tokenize(images, folder, model, tokenizer_source="runs/small")
    labels = None if request.param == "no labels" else batch.labels
    return CodeDataset(folder), CodeBatch(model.encode(batch.images), labels)


@pytest.fixture
def codes(world) -> CodeDataset:
    return CodeDataset(world[0].folder)


def test_rows_slices_and_lists_of_indices(codes, world):
    everything = codes[:]
    assert equal(everything, world[1])
    has_labels = codes.num_classes is not None
    for source in (codes, everything):
        assert len(source) == 30
        row = source[-1]
        assert torch.equal(row[0], everything.codes[29])
        assert row[1:] == ((1,) if has_labels else ())
        assert len(list(source[:3])) == 3
        two = CodeBatch(everything.codes[[2, 0]], torch.tensor([0, 0]) if has_labels else None)
        for index in ([2, 0], (2, 0), np.array([2, 0]), torch.tensor([2, 0]), [-28, -30], slice(2, None, -2)):
            assert equal(source[index], two)
        assert len(source[[]]) == len(source[torch.tensor([])]) == len(source[30:]) == 0
        for index in (np.int64(4), np.array(4), torch.tensor(4)):
            assert torch.equal(source[index][0], everything.codes[4])
        for outside in (30, -31, [30], [-31]):
            with pytest.raises(IndexError):
                source[outside]
        for wrong in ([0.5], torch.ones(30).bool(), [[1, 2]], "ab", None, [[1], [2, 3]]):
            with pytest.raises(ValueError, match="choose rows by"):
                source[wrong]
    for outside in ([50], [-1], [0, 51]):
        with pytest.raises(IndexError, match="expected 0 to 29"):
            codes.__getitems__(outside)
    with pytest.raises(IndexError):
        codes.keys(4)
    assert equal(everything.to("cpu"), everything)
    assert codes.class_names == (("a", "b") if has_labels else None)
    assert codes.split == "train"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_case_27_a_loader_of_torch_needs_nothing_else(codes, num_workers):
    def load(**options) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(codes, 4, num_workers=num_workers, generator=generator, **options)

    found = list(load())
    assert all(len(batch) == (1 if codes.num_classes is None else 2) for batch in found)
    assert equal(joined([CodeBatch(batch[0], batch[1] if len(batch) > 1 else None) for batch in found]), codes[:])
    shuffled = list(load(shuffle=True, collate_fn=codes.collate))
    assert all(isinstance(batch, CodeBatch) for batch in shuffled)
    assert not equal(joined(shuffled), codes[:])
    assert torch.equal(torch.cat([batch[0] for batch in load(shuffle=True)]), joined(shuffled).codes)


def test_what_else_torch_does_with_a_set(codes):
    subset = Subset(codes, [5, 3, 29])
    (batch,) = DataLoader(subset, batch_size=3)
    assert torch.equal(batch[0], codes[[5, 3, 29]].codes)
    rows = list(DataLoader(codes, batch_size=None))
    assert torch.equal(torch.stack([row[0] for row in rows]), codes[:].codes)
    assert sum(len(batch[0]) for batch in DataLoader(ConcatDataset([codes, codes]), batch_size=7)) == 60
    (pinned,) = DataLoader(subset, batch_size=3, collate_fn=codes.collate, pin_memory=True)
    assert equal(pinned, codes[[5, 3, 29]])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_copies_and_sets_of_many_shards_hold_no_files_open(codes, world, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    assert equal(codes[:], world[1])
    copy = pickle.loads(pickle.dumps(codes))
    monkeypatch.setattr("vqvae.tokens.dataset._MAX_OPEN", 2)
    for _ in range(2):
        assert equal(copy[:], world[1])
    assert len(os.listdir("/proc/self/fd")) == before


def test_batches_come_in_the_order_of_images(codes, world, source):
    for order in ({}, {"seed": 3, "start": 2, "rank": 1, "world_size": 2, "epochs": 2}):
        rows = [list(map(str, batch.codes)) for batch in codes.batches(8, **order)]
        images = [tokenizer("residual").encode(batch.images) for batch in batches(loaded(source), 8, **order)]
        assert rows == [list(map(str, each)) for each in images]
    assert equal(joined(list(codes.batches(8))), world[1])
    with refused("got batch_size=0"):
        codes.batches(0)


# Which tokenizer


def test_a_decoder_or_likelihood_changes_no_code_and_an_encoder_or_codebook_does(codes):
    assert codes.tokenizer["source"] == "runs/small"
    model = tokenizer("residual")
    again = dataclasses.replace(model.config, likelihood=Categorical.Config()).build()
    again.encoder.load_state_dict(model.encoder.state_dict())
    again.quantizer.load_state_dict(model.quantizer.state_dict())
    codes.check_tokenizer(again)
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)
        codes.check_tokenizer(model)
        for part in (model.encoder, model.quantizer):
            next(part.parameters()).add_(1)
            with refused(r"of another tokenizer \(runs/small, \w{12}\), this one is \w{12};"):
                codes.check_tokenizer(model)
            next(part.parameters()).sub_(1)


def test_the_fingerprints_of_codecs_stay_what_they_were():
    """As they have always been made: of everything that there was; what was added since counts where it is used."""
    model = tokenizer()
    prior = UniformPrior(num_codes=model.num_codes, grid=model.grid)
    digest = hashlib.sha256()
    plain = {name: value for name, value in model.config.to_plain().items() if name != "smooth"}
    for module, config in ((model, plain), (prior, prior.config.to_plain())):
        digest.update(json.dumps([type(module).__name__, config], sort_keys=True).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    assert of_codec(model, prior) == digest.digest()[:8]
    assert fingerprint.of_tokenizer(model) != fingerprint.of_tokenizer(tokenizer(seed=1))


# Other programs


def test_parquet_as_others_read_it(codes, tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    write_parquet(codes, tmp_path / "codes.parquet")
    table = parquet.read_table(tmp_path / "codes.parquet")
    assert str(table.schema.field("codes").type) == f"fixed_size_list<element: uint16>[{np.prod(codes.grid)}]"
    notes = {name.decode(): text.decode() for name, text in table.schema.metadata.items()}
    assert json.loads(notes["grid"]) == list(codes.grid)
    assert json.loads(notes["class_names"]) == (None if codes.num_classes is None else ["a", "b"])
    assert notes["tokenizer"] == codes.tokenizer["fingerprint"]
    flat = table["codes"].combine_chunks().flatten().to_numpy()
    assert np.array_equal(flat.reshape(-1, *codes.grid), codes[:].codes.numpy())
    if codes.num_classes is not None:
        assert table["label"].to_pylist() == codes[:].labels.tolist()
    assert table["key"].to_pylist() == [codes.key(row) for row in range(30)]


def test_a_key_is_read_alone_and_may_be_no_utf8(tmp_path):
    source = photos(tmp_path / "photos", num=6)
    strange, broken = (os.fsdecode(name) for name in (b"\xfe.png", b"\xff.png"))
    (source / "train" / "a" / "000.png").rename(source / "train" / "a" / strange)
    (source / "train" / "a" / broken).write_bytes(b"broken")
    images = loaded(source)
    tokenize(images, tmp_path / "codes")
    codes = CodeDataset(tmp_path / "codes")
    keys = [key.decode("utf-8", "surrogateescape") for key in codes.keys(0)]
    assert [codes.key(row) for row in range(6)] == keys
    assert keys == [images.key(at) for at in range(7) if images.key(at) != f"a/{broken}"]
    assert keys[2] == f"a/{strange}"
    assert codes.key(-1) == keys[-1]
    assert [key for key, _ in codes.unreadable] == [f"a/{broken}"]
