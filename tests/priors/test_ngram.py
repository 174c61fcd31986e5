"""What the n-gram prior counts, and how it smooths."""

import math
from pathlib import Path

import pytest
import torch
from prior_worlds import every_grid, make_ngram, seeded

import safefolder
from priors import NGramPrior, Prior, UniformPrior


def test_one_axis_by_hand() -> None:
    """Two grids of three codes: 0 0 1 and 0 0 0."""
    prior = NGramPrior(num_codes=2, grid=(3,)).double().fit(torch.tensor([[0, 0, 1], [0, 0, 0]]))
    p = [5.5 / 7, 1.5 / 7]
    # Positions count 0: 2, 2, 1 and 1: -, -, 1, so that n_1 = n_2 = 2 and D = 1/3. Codes count 0: 2 after none, 3 after
    # 0, and 1: once after 0, so that n_1 = n_2 = 1 and D = 1/3 again.
    third = 1 / 3
    first = [(2 - third + (third + 20) * p[0]) / 22, (third + 20) * p[1] / 22]
    last = [(1 - third + (2 * third + 20) * p[code]) / 22 for code in (0, 1)]
    at_0 = [(2 - third + (third + 20) * first[0]) / 22, (third + 20) * first[1] / 22]
    after_0 = [(n - third + (2 * third + 20) * q) / 24 for n, q in zip((3, 1), last, strict=True)]
    conditionals = prior.log_conditionals(torch.tensor([[0, 0, 1], [0, 1, 0]])).exp()
    torch.testing.assert_close(conditionals[0, 0].tolist(), at_0)
    torch.testing.assert_close(conditionals[0, 2].tolist(), after_0)
    torch.testing.assert_close(conditionals[1, 2].tolist(), last)  # nothing was seen after a 1


def test_two_axes_by_hand() -> None:
    """One grid, 0 1 over 1 1: every count of a table by hand, without discounts that are not 1."""
    prior = NGramPrior(num_codes=2, grid=(2, 2)).double().fit(torch.tensor([[[0, 1], [1, 1]]]))
    p = [1.5 / 5, 3.5 / 5]
    # Last position: the position saw one 1; 1 on the left, one 1; 1 above, one 1; both, one 1. Of the counts of the
    # left neighbour's table n_1 = 2 (1 after 0, 1 after 1) and n_2 = 0 besides 0 and 1 after none: n_1 = 4, D = 1.
    # A count of 1 less 1 is nothing: all of it goes to what is broader, so every table gives P(k).
    expected = [[math.log(p[0]), math.log(p[1])]] * 4
    conditionals = prior.log_conditionals(torch.tensor([[[0, 1], [1, 1]]])).flatten(1, 2)[0]
    torch.testing.assert_close(conditionals.tolist(), expected)
    # Seen five times, no count is 1 or 2, and none is discounted.
    prior.fit(torch.tensor([[[0, 1], [1, 1]]]).repeat(4, 1, 1))
    p = [5.5 / 21, 15.5 / 21]
    narrow = [20 * p[0] / 25, (5 + 20 * p[1]) / 25]
    pool = [q ** (1 - 3 * 3**-0.4) * n ** (3 * 3**-0.4) for q, n in zip(p, narrow, strict=True)]
    pool = [value / sum(pool) for value in pool]
    expected = [20 * pool[0] / 25, (5 + 20 * pool[1]) / 25]
    last = prior.log_conditionals(torch.tensor([[[0, 1], [1, 0]]]))[0, 1, 1].exp()
    torch.testing.assert_close(last.tolist(), expected)


def test_codes_of_other_neighbours_change_nothing() -> None:
    prior = make_ngram(num_codes=3, grid=(3, 3)).double()
    codes = torch.randint(3, (1, 3, 3), generator=seeded())
    base = prior.log_conditionals(codes)[0, 1, 1]
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0)):
        other = codes.clone()
        other[0, row, column] = (other[0, row, column] + 1) % 3
        read = (row, column) in ((0, 1), (1, 0))
        assert torch.equal(prior.log_conditionals(other)[0, 1, 1], base) != read


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_counts_add_up_over_batches(grid: tuple[int, ...]) -> None:
    codes = torch.randint(6, (60, *grid), generator=seeded()) ** 2 // 5
    at_once, in_parts = (NGramPrior(num_codes=6, grid=grid) for _ in range(2))
    at_once.fit(codes)
    for part in (codes[:1], codes[1:1], codes[1:20], codes[20:]):
        assert in_parts.fit(part) is in_parts
    for name, tensor in at_once.state_dict().items():
        assert tensor.dtype == torch.int64
        assert torch.equal(in_parts.state_dict()[name], tensor), name
    for table in at_once.counted:
        assert (table.keys.diff() > 0).all()
        assert table.counts.sum() == codes.numel()
    assert torch.equal(at_once.counts, torch.bincount(codes.flatten(), minlength=6))


def test_uniform_before_any_fit() -> None:
    prior = NGramPrior(num_codes=7, grid=(3, 3)).double()
    codes = torch.randint(7, (4, 3, 3))
    expected = UniformPrior(num_codes=7, grid=(3, 3)).double()(codes)
    torch.testing.assert_close(prior(codes), expected, atol=1e-12, rtol=0)


def test_no_code_is_impossible_after_much_of_another() -> None:
    prior = NGramPrior(num_codes=300, grid=(4, 4)).fit(torch.zeros(5000, 4, 4, dtype=torch.int64))
    conditionals = prior.log_conditionals(torch.zeros(1, 4, 4, dtype=torch.int64))
    assert conditionals.isfinite().all()
    assert (conditionals.exp().sum(-1) - 1).abs().max() < 1e-5


def test_blocks_of_rows_score_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_ngram(num_codes=3, grid=(2, 2)).double()
    codes = every_grid(prior)
    expected = prior(codes)
    monkeypatch.setattr("priors.ngram._ENTRIES", 3 * 7)
    torch.testing.assert_close(prior(codes), expected, atol=1e-12, rtol=0)


def test_many_codes_take_little_room(tmp_path: Path) -> None:
    """A dense table of pairs would take 2 GiB here."""
    prior = NGramPrior(num_codes=16384, grid=(4, 4))
    codes = torch.randint(16384, (8, 4, 4), generator=seeded())
    prior.fit(codes).save_pretrained(tmp_path / "prior")
    assert all(len(table.keys) <= codes.numel() for table in prior.counted)
    again = NGramPrior.from_pretrained(tmp_path / "prior")
    assert torch.equal(again(codes), prior(codes))
    again.fit(codes)
    assert torch.equal(again.counts, 2 * prior.counts)


@pytest.mark.parametrize("grid", [(4,), (2, 2)])
def test_counts_that_nobody_counted_are_refused(grid: tuple[int, ...], tmp_path: Path) -> None:
    """Of a file that was written by something else, or changed."""
    prior = make_ngram(num_codes=3, grid=grid)
    prior.save_pretrained(tmp_path / "good")
    config, tensors = safefolder.load(tmp_path / "good")
    contexts = [prior.num_positions, *[4] * (len(prior.counted) - 2), 4 ** len(grid)]
    for table, num_contexts in enumerate(contexts):
        keys, counts = tensors[f"counted.{table}.keys"], tensors[f"counted.{table}.counts"]
        bad = [
            {"keys": keys[torch.tensor([1, 0, *range(2, len(keys))])]},
            {"keys": torch.cat((keys[:1], keys[:1], keys[2:]))},
            {"keys": torch.cat((torch.tensor([-1]), keys[1:]))},
            {"keys": torch.cat((keys[:-1], torch.tensor([num_contexts * 3])))},
            {"counts": torch.cat((counts[:-1], torch.tensor([0])))},
        ]
        for wrong in bad:
            safefolder.save(
                tmp_path / "bad", config, {**tensors, **{f"counted.{table}.{name}": wrong[name] for name in wrong}}
            )
            with pytest.raises(ValueError, match=r"bad: got a table of counts that nobody counted"):
                Prior.from_pretrained(tmp_path / "bad")
        # The last that there may be is none too many.
        last = {**tensors, f"counted.{table}.keys": torch.cat((keys[:-1], torch.tensor([num_contexts * 3 - 1])))}
        safefolder.save(tmp_path / "last", config, last)
        assert Prior.from_pretrained(tmp_path / "last").sample(2).shape == (2, *grid)
    safefolder.save(tmp_path / "bad", config, {**tensors, "counts": torch.tensor([5, -1, 5])})
    with pytest.raises(ValueError, match="bad: got negative counts of codes"):
        Prior.from_pretrained(tmp_path / "bad")
    NGramPrior(num_codes=3, grid=grid).save_pretrained(tmp_path / "empty")
    assert Prior.from_pretrained(tmp_path / "empty").sample(2).shape == (2, *grid)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("wrong", [3, "short", -1, "x", 10**15, None])
def test_a_number_of_entries_that_does_not_fit_is_one_clear_line(wrong: object, tmp_path: Path) -> None:
    make_ngram(num_codes=3, grid=(2, 2)).save_pretrained(tmp_path / "good")
    config, tensors = safefolder.load(tmp_path / "good")
    stored = config.pop("num_stored")
    if wrong is not None:
        config["num_stored"] = stored[1:] if wrong == "short" else wrong if wrong == 3 else [wrong, *stored[1:]]
    safefolder.save(tmp_path / "bad", config, tensors)
    with pytest.raises(ValueError, match="bad") as error:
        Prior.from_pretrained(tmp_path / "bad")
    assert "\n" not in str(error.value)
