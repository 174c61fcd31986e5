"""What every prior must do with the controls of sampling: blocks, masks, seeds, precision."""

import copy

import pytest
import torch
from prior_worlds import (
    KINDS,
    LABELLED,
    make_any_order,
    make_transformer,
    offered,
    sampled,
    seeded,
    some_codes,
    some_labels,
)
from torch import Tensor

from priors import AnyOrderPrior, NextScalePrior, NGramPrior, Prior, Sampling
from priors.compiled_step import step_to_compile
from priors.sampling import random_chooser
from priors.trunk_model import TrunkPrior


@pytest.fixture(params=["uniform", "unigram", "transformer-3d", "ngram", *LABELLED])
def prior(request: pytest.FixtureRequest) -> Prior:
    """One prior of each family."""
    return KINDS[request.param]()


def suffix_masks(prior: Prior, num: int) -> Tensor:
    """Masks "b *grid" that draw the last positions, of every number in turn."""
    positions = torch.arange(prior.num_positions)
    lengths = torch.arange(num) % (prior.num_positions + 1)
    return (positions >= lengths[:, None]).reshape(num, *prior.grid)


# ---- blocks


def test_blocks_of_samples_are_sample(prior: Prior) -> None:
    labels = some_labels(prior, 8)
    blocks = list(prior.samples(8, labels, Sampling(batch_size=3), seeded(1)))
    assert [len(block) for block in blocks] == [3, 3, 2]
    assert torch.equal(torch.cat(blocks), prior.sample(8, labels, Sampling(batch_size=3), seeded(1)))
    (whole,) = prior.samples(8, labels, generator=seeded(1))
    assert torch.equal(whole, prior.sample(8, labels, Sampling(batch_size=8), seeded(1)))
    # Each block takes its own labels and masks.
    known = {"given": some_codes(prior, 8), "mask": suffix_masks(prior, 8)}
    greedy, again = (prior.sample(8, labels, Sampling(temperature=0.0, batch_size=n), **known) for n in (8, 3))
    assert torch.equal(greedy, again)


def test_no_grids_with_every_option(prior: Prior) -> None:
    none, labels = torch.zeros(0, *prior.grid, dtype=torch.int64), some_labels(prior, 0)
    options = [
        {"seeds": []},
        {"given": none, "mask": none.bool()},
        {"prefix": torch.zeros(0, 2, dtype=torch.int64)},
        {"temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.5, "batch_size": 2, "progress": True},
    ]
    options += [{"precision": "int8"}] if prior.has_arithmetic else []
    options += [{"guidance": 2.0}] if labels is not None else []
    options += [{"num_steps": 1}] if isinstance(prior, AnyOrderPrior) else []
    for option in options:
        drawn = sampled(prior, 0, labels, **option)
        assert drawn.shape == none.shape, option
        assert drawn.dtype == torch.int64
    assert offered(prior, none, labels).shape == (0, prior.num_positions, prior.num_codes)


def test_progress_is_quiet_away_from_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(KINDS["transformer"]().sample(4, sampling=Sampling(batch_size=3), progress=True)) == 4
    assert capfd.readouterr() == ("", "")


# ---- masks


def test_masks_are_kept_and_what_stands_under_them_is_not_read(prior: Prior) -> None:
    num = 2 * prior.num_positions + 2
    codes, masks, labels = some_codes(prior, num), suffix_masks(prior, num), some_labels(prior, num)
    everywhere = torch.ones(prior.grid, dtype=torch.bool)
    for mask in (masks, masks[1], masks[prior.num_positions], everywhere):
        each = mask.expand_as(codes)
        first = prior.sample(num, labels, given=codes.masked_fill(each, -1), mask=mask, generator=seeded(1))
        second = prior.sample(num, labels, given=codes.masked_fill(each, 10**9), mask=mask, generator=seeded(1))
        assert torch.equal(first[~each], codes[~each])
        assert torch.equal(first, second)
        assert first.min() >= 0
        assert first.max() < prior.num_codes
    assert torch.equal(first, prior.sample(num, labels, generator=seeded(1)))
    assert torch.equal(prior.sample(num, labels, given=codes, mask=~everywhere), codes)
    drawn, other = (prior.sample(num, labels, given=codes, mask=masks, generator=seeded(i)) for i in (2, 3))
    assert not torch.equal(drawn, other)


def test_conditionals_under_masks_are_those_after_the_kept_codes(prior: Prior) -> None:
    """Whatever the chooser says about a position that is kept, the walk goes on with the kept code."""
    prior = prior.double()
    num = prior.num_positions + 1
    codes, masks, labels = some_codes(prior, num), suffix_masks(prior, num), some_labels(prior, num)
    wrong = torch.where(masks, codes, (codes + 1) % prior.num_codes)
    expected = prior.log_conditionals(codes, labels).flatten(1, -2)
    got = offered(prior, wrong, labels, given=codes, mask=masks)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)
    # One mask for all of the first codes is a prefix, bit for bit.
    rest = codes.flatten(1)[:, 2:]
    got = offered(prior, rest, labels, given=codes, mask=masks[2])
    assert torch.equal(got, offered(prior, rest, labels, prefix=codes.flatten(1)[:, :2]))


def test_a_mask_with_known_codes_behind_it(prior: Prior) -> None:
    codes, labels = some_codes(prior, 4), some_labels(prior, 4)
    mask = (torch.arange(prior.num_positions) == 1).reshape(prior.grid)
    one_of_four = torch.stack([mask, *[torch.ones_like(mask)] * 3])
    for holes in (mask, one_of_four):
        if isinstance(prior, AnyOrderPrior):
            drawn = prior.sample(4, labels, given=codes, mask=holes)
            kept = ~holes.expand_as(codes)
            assert torch.equal(drawn[kept], codes[kept])
        else:
            with pytest.raises(ValueError, match=r"known codes after unknown ones, .* take an AnyOrderPrior"):
                prior.sample(4, labels, given=codes, mask=holes)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["uniform", "any-order"])
def test_bad_masks(kind: str) -> None:
    codes, mask = torch.zeros(2, 2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    prior = KINDS[kind]()
    for options, message in (
        ({"given": codes}, "given codes and a mask together"),
        ({"mask": mask}, "given codes and a mask together"),
        ({"given": codes, "mask": mask, "prefix": codes.flatten(1)[:, :1]}, "together, or a prefix"),
        ({"given": codes, "mask": mask.long()}, r"mask of torch.int64 \(2, 2\), expected booleans"),
        ({"given": codes, "mask": mask.expand(3, 2, 2)}, r"\(3, 2, 2\), expected .* \(2, 2\) or \(2, 2, 2\)"),
        ({"given": codes.flatten(1), "mask": mask}, r"given codes of shape \(2, 4\), expected \(2, 2, 2\)"),
        ({"given": codes.float(), "mask": ~mask}, "given codes of torch.float32, expected integers"),
        ({"given": codes + 3, "mask": ~mask}, "given codes from 3 to 3, expected 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled(prior, 2, **options)


# ---- seeds


@pytest.mark.parametrize("masked", [False, True])
def test_a_grid_with_its_seed_is_the_same_alone_and_among_others(prior: Prior, masked: bool) -> None:
    seeds = [7 * i + 3 for i in range(20)]
    labels, codes, masks = some_labels(prior, 20), some_codes(prior, 20), suffix_masks(prior, 20)
    variants = [{"precision": name} for name in ("float32", "bfloat16")] if prior.has_arithmetic else [{}]
    variants += [] if labels is None else [{"guidance": 1.5}]
    variants += [{"num_steps": 2}] if isinstance(prior, AnyOrderPrior) and not masked else []
    for options in variants:

        def draw(which: list[int], options: dict = options) -> Tensor:
            chosen = None if labels is None else labels[which]
            known = {"given": codes[which], "mask": masks[which]} if masked else {}
            return sampled(prior, len(which), chosen, seeds=[seeds[i] for i in which], **known, **options)

        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        drawn = draw(list(range(20)))
        for which in ([19], [5, 18, 2]):
            assert torch.equal(draw(which), drawn[which]), (which, options)
        assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
        assert len(drawn.flatten(1).unique(dim=0)) > 4
        assert not masked or torch.equal(drawn[~masks], codes[~masks])
    same = prior.sample(4, None if labels is None else labels[:1].expand(4), seeds=[2**32 - 1] * 4)
    assert (same == same[:1]).all()


def recorded(prior: Prior, monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[Tensor, Tensor]:
    """Grids "b *grid" of `sample`, and the conditionals "b n k" that they were drawn from at the last positions."""
    conditionals: list[Tensor] = []

    def spy(*sampling: object, **source: object) -> object:
        choose = random_chooser(*sampling, **source)

        def record(log_probs: Tensor) -> Tensor:
            conditionals.append(log_probs.clone())
            return choose(log_probs)

        return record

    with monkeypatch.context() as patch:
        patch.setattr("priors.base.random_chooser", spy)
        drawn = sampled(prior, **options)
    assert len(conditionals) == prior.num_positions
    return drawn, torch.stack(conditionals, 1)


@pytest.mark.parametrize(("precision", "compiled"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
@pytest.mark.parametrize(
    ("make", "holes"), [(make_any_order, False), (make_any_order, True), (make_transformer, False)]
)
def test_conditionals_of_a_seeded_grid_do_not_show_other_masks(
    make: object, holes: bool, precision: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what is known is stepped one by one, however much of it all grids of a block have in common."""
    monkeypatch.setattr("priors.kv_cache.Compiled", lambda: step_to_compile)
    num, grid = 16, (3, 4)
    prior = make(num_codes=7, grid=grid, num_classes=2, width=32)
    lengths = torch.tensor([3, 12, 7, 5] * 4)  # of what is known; every grid knows at least three positions
    masks = (torch.arange(12) >= lengths[:, None]).reshape(num, *grid)
    if holes:  # beside masks in raster order, one of which draws everything
        masks[1::3] = torch.rand(num, *grid, generator=seeded(1))[1::3] < 0.5
        masks[2] = True
    codes, labels = some_codes(prior, num), torch.arange(num) % 2
    options = {"precision": precision, "guidance": 1.5, "compiled": compiled}
    everything = {"num": num, "labels": labels, "seeds": range(num), "given": codes, "mask": masks}
    drawn, conditionals = recorded(prior, monkeypatch, **everything, **options)
    assert torch.equal(drawn[~masks], codes[~masks])
    for i in (0, 1, 2, 4):
        own = {"labels": labels[i : i + 1], "seeds": [i], "given": codes[i : i + 1], "mask": masks[i]}
        alone, own_conditionals = recorded(prior, monkeypatch, num=1, **own, **options)
        assert torch.equal(alone[0], drawn[i]), i
        assert torch.equal(own_conditionals[0], conditionals[i]), i


def test_tables_of_counts_do_not_show_other_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that share a context or a block none shows in another's conditional, in float32."""
    codes = torch.randint(6, (60, 4, 4), generator=seeded()) ** 2 // 5
    prior = NGramPrior(num_codes=6, grid=(4, 4)).fit(codes)
    drawn, conditionals = recorded(prior, monkeypatch, num=16, seeds=range(16))
    assert conditionals.dtype == torch.float32
    for i in (0, 9):
        alone, own_conditionals = recorded(prior, monkeypatch, num=1, seeds=[i])
        assert torch.equal(alone[0], drawn[i])
        assert torch.equal(own_conditionals[0], conditionals[i])
    scores = prior(codes)
    assert torch.equal(torch.cat([prior(codes[i : i + 1]) for i in range(10)]), scores[:10])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "1 seeds for 2 grids, expected one each"),
        ({"seeds": [1, -1]}, "a seed of -1, expected an integer from 0"),
        ({"seeds": [1, 2**32]}, f"a seed of {2**32}"),
        ({"seeds": [1, 1.5]}, r"a seed of 1\.5"),
        ({"seeds": [1, True]}, "a seed of True"),
        ({"seeds": 7}, "seeds=7, expected a sequence of integers"),
        ({"seeds": [1, 2], "generator": seeded()}, "seeds and a generator, expected one of the two"),
        ({"seeds": [1, 2], "batch_size": 2}, "batch_size=2 beside seeds, which are sampled 16 at a time"),
    ],
)
def test_bad_seeds(options: dict, message: str) -> None:
    for kind in ("uniform", "transformer"):
        with pytest.raises(ValueError, match=message):
            sampled(KINDS[kind](), 2, **options)


# ---- steps and precision


def test_options_that_only_some_priors_have(prior: Prior) -> None:
    name, labels = type(prior).__name__, some_labels(prior, 2)
    if isinstance(prior, AnyOrderPrior):
        assert prior.sample(2, labels, Sampling(num_steps=2)).shape == (2, *prior.grid)
    else:
        with pytest.raises(ValueError, match=f"num_steps=2, expected None: {name} has steps"):
            prior.sample(2, labels, Sampling(num_steps=2))
    assert prior.has_arithmetic == isinstance(prior, TrunkPrior)
    for precision, compiled in (("float32", False), ("int8", True), ("auto", True)) if not prior.has_arithmetic else ():
        message = f"precision='{precision}' and compiled={compiled}, expected 'auto' and False: {name} samples with"
        with pytest.raises(ValueError, match=message):
            prior.samples(2, labels, Sampling(precision=precision, compiled=compiled))


def test_every_precision_draws_codes(prior: Prior) -> None:
    labels = some_labels(prior, 5)
    for each in (prior, copy.deepcopy(prior).double()):
        for precision in ("auto", "float32", "bfloat16", "int8") if prior.has_arithmetic else ("auto",):
            drawn = each.sample(5, labels, Sampling(precision=precision))
            assert drawn.shape == (5, *prior.grid)
            assert drawn.dtype == torch.int64
            assert drawn.min() >= 0
            assert drawn.max() < prior.num_codes


def test_steps_of_several_codes_are_not_compiled() -> None:
    nearly, scales, compiled = KINDS["any-order"](), KINDS["next-scale"](), Sampling(compiled=True)
    with pytest.raises(ValueError, match="compiled=True for steps of up to 4 codes, expected False, or one a step"):
        nearly.samples(2, sampling=Sampling(num_steps=1, compiled=True))
    with pytest.raises(ValueError, match="compiled=True for steps of up to 4 codes"):
        scales.samples(2, sampling=compiled)
    # Where every step is of one code it is nobody's business how that was asked for.
    nearly.samples(2, sampling=Sampling(num_steps=4, compiled=True))
    NextScalePrior(num_codes=3, scales=(1,), width=8, depth=1, num_heads=2).samples(2, sampling=compiled)
