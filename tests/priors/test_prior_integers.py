"""Priors take codes, labels, seeds and options of any integer type, as tensors, arrays and lists."""

import numpy as np
import pytest
import torch
from prior_worlds import CONTINUOUS, KINDS, every_grid, seeded, some_labels

from priors import NGramPrior, Sampling, UnigramPrior
from priors.sampling import known_chooser

TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")


def forms(codes: torch.Tensor, name: str) -> list:
    array = codes.numpy().astype(name)
    mapped = array.copy()
    mapped.flags.writeable = False
    return [torch.from_numpy(array), mapped, array.astype(array.dtype.newbyteorder()), array.tolist()]


@pytest.mark.parametrize("name", TYPES)
def test_case_25_codes_labels_and_counts_of_any_type(name: str) -> None:
    prior = KINDS["any-order-labels"]()
    codes, labels = every_grid(prior)[:9], some_labels(prior, 9)
    mask = torch.arange(4).view(2, 2) > 1
    options = {"given": codes, "mask": mask}, {"prefix": codes.flatten(1)[:, :2]}

    def draw(labels: object, **known: object) -> torch.Tensor:
        return prior.sample(9, labels, generator=seeded(3), **known)

    want, conditionals = prior.log_prob(codes, labels), prior.log_conditionals(codes, labels)
    drawn, begun = (draw(labels, **known) for known in options)
    counted = [kind(num_codes=3, grid=(2, 2)).fit(codes).state_dict() for kind in (UnigramPrior, NGramPrior)]
    first_two = forms(codes.flatten(1)[:, :2], name)
    for form, label, prefix in zip(forms(codes, name), forms(labels, name), first_two, strict=True):
        assert torch.equal(prior.log_prob(form, label), want)
        assert torch.equal(prior.log_conditionals(form, label), conditionals)
        assert torch.equal(draw(label, given=form, mask=mask.numpy()), drawn)
        assert torch.equal(draw(label, prefix=prefix), begun)
        chooser = known_chooser(form)
        prior.walk(9, chooser, label)
        torch.testing.assert_close(chooser.log_prob, want, atol=1e-5, rtol=1e-5)
        for kind, counts in zip((UnigramPrior, NGramPrior), counted, strict=True):
            got = kind(num_codes=3, grid=(2, 2)).fit(form).state_dict()
            torch.testing.assert_close(got, counts, rtol=0, atol=0)


@pytest.mark.usefixtures("untyped")
def test_case_25_ranges_are_said_as_they_are() -> None:
    prior = UnigramPrior(num_codes=100, grid=(3,))
    for codes, message in (
        (torch.tensor([[0, 255, 1]], dtype=torch.uint8), "got codes from 0 to 255, expected 0 to 99"),
        (np.array([[0, 60_000, 1]], np.uint16), "got codes from 0 to 60000, expected 0 to 99"),
        (np.array([[0, 2**63, 1]], np.uint64), f"got codes up to {2**63}, expected integers of 63 bits"),
        ([[0, 2**70, 1]], f"got codes up to {2**70}, expected integers of 63 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.log_prob(codes)
        with pytest.raises(ValueError, match=message.replace("codes", "prefix")):
            prior.sample(1, prefix=codes)


def test_case_28_labels_as_people_have_them() -> None:
    prior = KINDS["transformer-labels"]()
    codes, ones = every_grid(prior)[:4], [1] * 4
    for label in (1, np.int64(1), np.uint8(1), torch.tensor(1), np.array(1), tuple(ones)):
        assert torch.equal(prior.log_prob(codes, label), prior.log_prob(codes, ones))
        assert torch.equal(prior.sample(4, label, seeds=range(4)), prior.sample(4, ones, seeds=range(4)))
    assert prior.sample(2, sampling=Sampling(guidance=2.0), labels=range(2)).shape == (2, *prior.grid)
    density, latents = CONTINUOUS["mixture-labels"](dim=1, grid=(2,)), torch.randn(3, 2, 1)
    want = density.log_prob(latents, torch.tensor([1, 1, 1]))
    for labels in (1, [1, 1, 1], np.ones(3, np.int8)):
        assert torch.equal(density.log_prob(latents.numpy(), labels), want)
    torch.testing.assert_close(density.log_prob(latents.double().numpy().tolist(), 1), want)


@pytest.mark.usefixtures("untyped")
def test_counts_and_options_of_numpy() -> None:
    prior = KINDS["any-order-labels"]()
    numbers = Sampling(top_k=np.int32(2), num_steps=np.int16(2), batch_size=np.int64(2))
    assert prior.sample(np.int64(3), sampling=numbers).shape == (3, 2, 2)
    for kind in (UnigramPrior, NGramPrior):
        sizes = kind(num_codes=np.uint16(60_000), grid=np.array([3, 3]))
        assert (sizes.num_codes, sizes.grid) == (60_000, (3, 3))
        assert sizes.config.to_plain()["grid"] == [3, 3]
    seeds = [4, 5]
    guided = prior.sample(2, [0, 1], Sampling(guidance=2.0), seeds=seeds)
    for form in (np.array(seeds, np.uint32), torch.tensor(seeds), range(4, 6), (4, np.int64(5))):
        assert torch.equal(prior.sample(2, [0, 1], Sampling(guidance=np.float32(2.0)), seeds=form), guided)
    codes, order = every_grid(prior)[:5], torch.tensor([3, 1, 0, 2])
    assert prior.log_conditionals(codes[:0], order=order).shape == (0, 2, 2, 3)
    for form in (order.numpy().astype(np.uint8), [3, 1, 0, 2], order.byte()):
        assert torch.equal(prior.log_prob(codes, order=form), prior.log_prob(codes, order=order))
