"""A tokenized set where torch expects a data set: the default collate, workers, subsets; and what decodes its codes."""

import copy

import numpy as np
import pytest
import torch
from token_worlds import QUANTIZERS, equal, joined, photos, tokenize, tokenizer
from torch.utils.data import DataLoader, Subset

from vqvae.data import ImageTensors, load_images
from vqvae.tokens import CodeBatch, CodeDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # one of torch itself, which tells of few cores
]


@pytest.fixture(scope="module", params=["labels", "no labels"])
def codes(request, tmp_path_factory) -> CodeDataset:
    folder = tmp_path_factory.mktemp("codes")
    images = load_images(photos(folder / "photos", num=30), size=8)
    if request.param == "no labels":
        images = ImageTensors(images.__getitems__(range(30)).images)
    tokenize(tokenizer("residual"), images, folder / "codes", batch_size=4, shard_size=9)
    return CodeDataset(folder / "codes")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_case_27_a_loader_of_torch_needs_nothing_else(codes, num_workers, shuffle):
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(codes, batch_size=4, num_workers=num_workers, shuffle=shuffle, generator=generator)
    found = list(loader)
    assert len(found) == 8
    assert all(len(batch) == (1 if codes.num_classes is None else 2) for batch in found)
    labels = None if codes.num_classes is None else torch.cat([batch[1] for batch in found])
    made = CodeBatch(torch.cat([batch[0] for batch in found]), labels)
    if shuffle:
        again = DataLoader(codes, 4, shuffle=True, collate_fn=codes.collate, generator=torch.Generator().manual_seed(0))
        assert equal(made, joined(list(again)))
        assert not equal(made, codes[:])
    else:
        assert equal(made, codes[:])


def test_case_27_its_own_collate_and_getitems_still_give_whole_batches(codes):
    found = list(DataLoader(codes, batch_size=4, collate_fn=codes.collate))
    assert all(isinstance(batch, CodeBatch) for batch in found)
    assert equal(joined(found), codes[:])
    assert isinstance(codes.__getitems__([3, 1]), CodeBatch)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_what_else_torch_does_with_a_set(codes):
    subset = Subset(codes, [5, 3, 29])
    (batch,) = DataLoader(subset, batch_size=3)
    assert torch.equal(batch[0], codes[[5, 3, 29]].codes)
    rows = list(DataLoader(codes, batch_size=None))
    assert torch.equal(torch.stack([row[0] for row in rows]), codes[:].codes)
    together = torch.utils.data.ConcatDataset([codes, codes])
    assert sum(len(batch[0]) for batch in DataLoader(together, batch_size=7)) == 60
    (pinned,) = DataLoader(subset, batch_size=3, collate_fn=codes.collate, pin_memory=True)
    assert equal(pinned, codes[[5, 3, 29]])


def test_rows_slices_and_lists_of_indices(codes):
    everything = codes[:]
    assert isinstance(everything, CodeBatch)
    for source in (codes, everything):
        row = source[-1]
        assert isinstance(row, tuple)
        assert torch.equal(row[0], everything.codes[29])
        assert row[1:] == (() if codes.num_classes is None else (1,))
        assert len(list(source[:3])) == 3
        for index in (
            [2, 0],
            (2, 0),
            np.array([2, 0]),
            torch.tensor([2, 0]),
            range(2, -1, -2),
            [-28, -30],
            slice(2, None, -2),
        ):
            chosen = source[index]
            assert isinstance(chosen, CodeBatch)
            assert equal(
                chosen, CodeBatch(everything.codes[[2, 0]], None if codes.num_classes is None else torch.tensor([0, 0]))
            )
        assert len(source[[]]) == len(source[torch.tensor([])]) == len(source[30:]) == 0
        for index in (np.int64(4), np.array(4), torch.tensor(4)):
            assert torch.equal(source[index][0], everything.codes[4])
        for outside in (30, -31, [30], [-31]):
            with pytest.raises(IndexError):
                source[outside]
        for wrong in ([0.5], [True, False], torch.ones(30).bool(), [[1, 2]], "ab", None, 0.5):
            with pytest.raises((ValueError, TypeError), match=r"choose rows by|'float'|integer"):
                source[wrong]
    assert equal(copy.copy(everything), everything.to("cpu"))
    assert len(everything) == len(codes) == 30
    with pytest.raises(AttributeError):
        everything.codes = everything.codes


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_case_25_codes_that_come_out_of_a_set_are_those_that_models_decode(kind, tmp_path):
    model = tokenizer(kind)
    images = load_images(photos(tmp_path / "photos", num=12), size=8)
    tokenize(model, images, tmp_path / "codes", batch_size=4, shard_size=9)
    codes = CodeDataset(tmp_path / "codes")
    expected = model.encode(images.__getitems__(range(12)).images)
    ways = {
        "slice": codes[:].codes,
        "rows": torch.stack([codes[row][0] for row in range(12)]),
        "batches": torch.cat([batch.codes for batch in codes.batches(5)]),
        "loader": torch.cat([batch[0] for batch in DataLoader(codes, 5)]),
        "as on the disk": torch.from_numpy(
            np.concatenate([codes.shard(shard)[0] for shard in (0, 1)]).astype(np.int64)
        ),
    }
    for way, found in ways.items():
        assert found.dtype == torch.int64, way
        assert torch.equal(found, expected), way
        assert torch.equal(model.decode(found), model.decode(expected)), way
        assert torch.equal(model.quantizer.decode(found), model.quantizer.decode(expected)), way
