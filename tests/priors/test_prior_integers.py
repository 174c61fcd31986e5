"""Priors take codes and labels of any integer type, as tensors, arrays and lists."""

import numpy as np
import pytest
import torch
from prior_worlds import CONTINUOUS, KINDS, every_grid, make_any_order, make_transformer, sampled, some_labels

from priors import NGramPrior, Sampling, UnigramPrior
from priors.sampling import known_chooser

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


def forms(codes: torch.Tensor, name: str) -> list:
    array = codes.numpy().astype(name)
    mapped = array.copy()
    mapped.flags.writeable = False
    return [torch.from_numpy(array), mapped, array.astype(array.dtype.newbyteorder())]


@pytest.mark.parametrize("kind", KINDS)
def test_case_25_codes_and_labels_of_a_small_type(kind: str) -> None:
    prior = KINDS[kind]()
    codes = every_grid(prior)[:9]
    labels = some_labels(prior, 9)
    want = prior.log_prob(codes, labels)
    assert torch.equal(prior.log_prob(codes.byte(), None if labels is None else labels.byte()), want)
    assert torch.equal(prior.log_prob(codes.numpy().astype(np.uint16), labels), want)


def test_case_25_codes_and_labels_of_any_type() -> None:
    prior = KINDS["transformer-labels"]()
    codes, labels = every_grid(prior)[:9], some_labels(prior, 9)
    want, conditionals = prior.log_prob(codes, labels), prior.log_conditionals(codes, labels)
    for name in TYPES:
        for form, label in zip(forms(codes, name), forms(labels, name), strict=True):
            assert torch.equal(prior.log_prob(form, label), want)
            assert torch.equal(prior.log_conditionals(form, label), conditionals)
    assert torch.equal(prior.log_prob(codes.tolist(), labels.tolist()), want)


@pytest.mark.parametrize("kind", ["unigram", "any-order-labels"])
def test_case_25_known_codes_of_any_type(kind: str) -> None:
    prior = KINDS[kind]()
    codes, labels = every_grid(prior)[:9], some_labels(prior, 9)
    mask = torch.zeros(prior.grid, dtype=torch.bool)
    mask.view(-1)[prior.num_positions // 2 :] = True
    unknown = codes.masked_fill(mask, -1)

    def sample(**options) -> torch.Tensor:
        return prior.sample(9, labels, generator=torch.Generator().manual_seed(3), **options)

    drawn = sample(given=codes, mask=mask)
    begun = sample(prefix=codes.flatten(1)[:, :2])
    assert torch.equal(sample(given=unknown, mask=mask.numpy()), drawn)
    for name in ("uint8", "uint16", "uint64"):
        tensor, mapped, swapped = forms(codes, name)
        assert torch.equal(sample(given=tensor, mask=mask.tolist()), drawn)
        assert torch.equal(sample(prefix=mapped.reshape(9, -1)[:, :2]), begun)
        chooser = known_chooser(swapped)
        prior.walk(9, chooser, labels)
        torch.testing.assert_close(chooser.log_prob, prior.log_prob(codes, labels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [UnigramPrior, NGramPrior])
def test_case_25_counts_of_codes_of_any_type(kind: type) -> None:
    codes = torch.randint(7, (20, 3, 3), generator=torch.Generator().manual_seed(0))
    want = kind(num_codes=7, grid=(3, 3)).fit(codes)
    for name in TYPES:
        for form in forms(codes, name):
            got = kind(num_codes=7, grid=(3, 3)).fit(form)
            torch.testing.assert_close(got.state_dict(), want.state_dict(), rtol=0, atol=0)


@pytest.mark.usefixtures("untyped")
def test_case_25_ranges_are_said_as_they_are() -> None:
    prior = make_transformer(num_codes=100, grid=(3,), num_classes=2)
    for codes, message in (
        (torch.tensor([[0, 255, 1]], dtype=torch.uint8), "got codes from 0 to 255, expected 0 to 99"),
        (np.array([[0, 60_000, 1]], np.uint16), "got codes from 0 to 60000, expected 0 to 99"),
        (torch.tensor([[0, -1, 1]], dtype=torch.int8), "got codes from -1 to 1, expected 0 to 99"),
        (np.array([[0, 2**63, 1]], np.uint64), f"got codes up to {2**63}, expected integers of 63 bits"),
        ([[0, 2**70, 1]], f"got codes up to {2**70}, expected integers of 63 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.log_prob(codes)
        with pytest.raises(ValueError, match=message.replace("codes", "prefix")):
            prior.sample(1, prefix=codes)
    with pytest.raises(ValueError, match="got labels from 255 to 255, expected 0 to 1"):
        prior.sample(1, np.array([255], np.uint8))


def test_case_28_labels_as_people_have_them() -> None:
    for kind in (name for name in KINDS if name.endswith("labels")):
        prior = KINDS[kind]()
        assert prior.sample(2, labels=[1, 0]).shape == (2, *prior.grid)
        assert prior.sample(2, labels=1).shape == (2, *prior.grid)
    prior = KINDS["transformer-labels"]()
    codes = every_grid(prior)[:4]
    want = prior.log_prob(codes, torch.tensor([1, 0, 1, 1]))
    drawn = prior.sample(4, torch.tensor([1, 0, 1, 1]), seeds=range(4))
    for labels in ([1, 0, 1, 1], (1, 0, 1, 1), np.array([1, 0, 1, 1]), torch.tensor([1, 0, 1, 1]).byte()):
        assert torch.equal(prior.log_prob(codes, labels), want)
        assert torch.equal(prior.sample(4, labels=labels, seeds=[0, 1, 2, 3]), drawn)
    for label in (1, np.int64(1), np.uint8(1), torch.tensor(1), np.array(1)):
        assert torch.equal(prior.log_prob(codes, label), prior.log_prob(codes, [1] * 4))
    assert torch.equal(prior.sample(4, 1, seeds=range(4)), prior.sample(4, [1] * 4, seeds=range(4)))
    assert prior.sample(2, sampling=Sampling(guidance=2.0), labels=range(2)).shape == (2, *prior.grid)
    density = CONTINUOUS["mixture-labels"](dim=1, grid=(2,))
    latents = torch.randn(3, 2, 1)
    want = density.log_prob(latents, torch.tensor([1, 1, 1]))
    for labels in (1, [1, 1, 1], np.ones(3, np.int8)):
        assert torch.equal(density.log_prob(latents, labels), want)
        assert torch.equal(density.log_prob(latents.numpy(), labels), want)
        assert density.sample(3, labels).shape == (3, 2, 1)
    torch.testing.assert_close(density.log_prob(latents.double().numpy().tolist(), 1), want)


@pytest.mark.usefixtures("untyped")
def test_case_28_labels_that_are_not_meant_are_a_sentence() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2)
    for labels, message in (
        ([0, 1, 0], r"got labels of torch.int64 \(3,\), expected integers of shape \(2,\), or one for all"),
        ([0, 2], "got labels from 0 to 2, expected 0 to 1"),
        (2, "got labels from 2 to 2, expected 0 to 1"),
        (-1, "got labels from -1 to -1, expected 0 to 1"),
        (True, "got labels of torch.bool"),
        (1.0, "got labels of float, expected integers"),
        ("cat", "got labels of str, expected integers"),
        (["cat", "dog"], "got labels of <U3, expected integers"),
        ([0.0, 1.0], r"got labels of torch.float64 \(2,\), expected integers of shape \(2,\), or one for all"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.sample(2, labels)


@pytest.mark.usefixtures("untyped")
def test_counts_and_options_of_numpy() -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2), num_classes=2)
    assert prior.sample(
        np.int64(3), sampling=Sampling(top_k=np.int32(2), num_steps=np.int16(2), batch_size=np.int64(2))
    ).shape == (
        3,
        2,
        2,
    )
    for kind in (UnigramPrior, NGramPrior):
        sizes = kind(num_codes=np.uint16(60_000), grid=np.array([3, 3]))
        assert (sizes.num_codes, sizes.grid) == (60_000, (3, 3))
        assert sizes.config.to_plain()["grid"] == [3, 3]
    seeds = [4, 5]
    drawn = prior.sample(2, seeds=seeds)
    for form in (np.array(seeds, np.uint32), torch.tensor(seeds), range(4, 6), (4, np.int64(5))):
        assert torch.equal(prior.sample(2, seeds=form), drawn)
    labels = torch.tensor([0, 1])
    guided = prior.sample(2, labels, Sampling(guidance=2.0), seeds=seeds)
    assert torch.equal(prior.sample(2, labels, Sampling(guidance=np.float32(2.0)), seeds=seeds), guided)
    codes, order = every_grid(prior)[:5], torch.tensor([3, 1, 0, 2])
    assert prior.log_conditionals(codes[:0], order=order).shape == (0, 2, 2, 3)
    want = prior.log_prob(codes, order=order)
    for form in (order.numpy().astype(np.uint8), [3, 1, 0, 2], order.byte()):
        assert torch.equal(prior.log_prob(codes, order=form), want)
    for options, message in (({"num": True}, "got num=True, expected an integer >= 0"),):
        with pytest.raises(ValueError, match=message):
            sampled(prior, **{"num": 2, "labels": labels, **options})
