"""What a prior's classes are called, kept beside its options as far as a config can hold it."""

import pytest
import torch

from priors import TransformerPrior
from priors.grid import GridModel


def prior(num_classes):
    torch.manual_seed(0)
    return TransformerPrior(num_codes=8, grid=(2, 2), width=16, depth=1, num_heads=2, num_classes=num_classes)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (("cat", "dog"), ("cat", "dog")),
        (("Übermut", "犬"), ("Übermut", "犬")),
        (("cat\udcff", "dog"), ("cat�", "dog")),  # a folder whose name is no UTF-8
        (tuple(f"class number {number} of a long list" for number in range(20_000)), None),
    ],
)
def test_names_never_keep_a_prior_from_being_read(tmp_path, names, kept):
    model = prior(len(names))
    model.class_names = names
    model.save_pretrained(tmp_path)
    assert GridModel.from_pretrained(tmp_path).class_names == kept
