"""What every prior must do with the controls of sampling: blocks, masks, seeds, filters, guidance, precision."""

import pytest
import torch
from prior_worlds import KINDS, blocks_of, every_grid, make_any_order, make_transformer, sampled, some_labels
from torch import Tensor

from priors import (
    AnyOrderPrior,
    DepthTransformerPrior,
    LlamaPrior,
    NextScalePrior,
    NGramPrior,
    Prior,
    Sampling,
    TransformerPrior,
)
from priors.sampling import random_chooser

LABELLED = [kind for kind in KINDS if kind.endswith("labels")]
# Where a kind is there twice, with labels or on other axes, its controls are the same: one of them is enough.
CONTROLLED = [kind for kind in KINDS if kind not in ("transformer-1d", "depth", "next-scale", "ngram-1d", "ngram-3d")]


@pytest.fixture(params=CONTROLLED)
def prior(request: pytest.FixtureRequest) -> Prior:
    return KINDS[request.param]()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_codes(prior: Prior, num: int) -> Tensor:
    return torch.randint(prior.num_codes, (num, *prior.grid), generator=seeded(0))


def suffix_masks(prior: Prior, num: int) -> Tensor:
    """Masks "b *grid" that draw the last positions, of every number in turn."""
    positions = torch.arange(prior.num_positions)
    lengths = torch.arange(num) % (prior.num_positions + 1)
    return (positions >= lengths[:, None]).reshape(num, *prior.grid)


# ---- blocks


def test_blocks_of_samples_are_sample(prior: Prior) -> None:
    labels = some_labels(prior, 8)
    blocks = list(prior.samples(8, labels, Sampling(batch_size=3), generator=seeded(1)))
    assert [len(block) for block in blocks] == [3, 3, 2]
    assert torch.equal(torch.cat(blocks), prior.sample(8, labels, Sampling(batch_size=3), generator=seeded(1)))
    (whole,) = prior.samples(8, labels, generator=seeded(1))
    assert torch.equal(whole, prior.sample(8, labels, Sampling(batch_size=8), generator=seeded(1)))


def test_blocks_take_their_own_labels_and_masks(prior: Prior) -> None:
    codes, masks = some_codes(prior, 7), suffix_masks(prior, 7)
    labels = some_labels(prior, 7)
    greedy = prior.sample(7, labels, Sampling(temperature=0.0), given=codes, mask=masks)
    again = prior.sample(7, labels, Sampling(temperature=0.0, batch_size=2), given=codes, mask=masks)
    assert torch.equal(greedy, again)


def test_no_grids_with_every_option(prior: Prior) -> None:
    none = torch.zeros(0, *prior.grid, dtype=torch.int64)
    labels = some_labels(prior, 0)
    options = [
        {"seeds": []},
        {"given": none, "mask": none.bool()},
        {"given": none, "mask": torch.ones(prior.grid, dtype=torch.bool)},
        {"prefix": torch.zeros(0, 2, dtype=torch.int64)},
        {"temperature": 0.5, "top_k": 2, "top_p": 0.5, "min_p": 0.5, "generator": seeded(0)},
        {"batch_size": 2, "progress": True},
    ]
    options += [{"precision": "bfloat16"}, {"precision": "int8"}] if prior.has_arithmetic else []
    options += [{"guidance": 2.0}, {"guidance": [2.0] * prior.num_positions}] if labels is not None else []
    options += [{"num_steps": 1}] if isinstance(prior, AnyOrderPrior) else []
    for option in options:
        drawn = sampled(prior, 0, labels, **option)
        assert drawn.shape == none.shape, option
        assert drawn.dtype == torch.int64
        assert list(blocks_of(prior, 0, labels, **option)) == []


def test_a_walk_over_no_grids(prior: Prior) -> None:
    rows = []

    def choose(log_probs: Tensor) -> Tensor:
        rows.append(log_probs.shape)
        return torch.zeros(0, dtype=torch.int64)

    assert prior.walk(0, choose, some_labels(prior, 0)).shape == (0, *prior.grid)
    assert rows == [(0, prior.num_codes)] * prior.num_positions


# ---- masks


def test_masks_are_kept_and_what_stands_under_them_is_not_read(prior: Prior) -> None:
    num = 2 * prior.num_positions + 2
    codes, masks, labels = some_codes(prior, num), suffix_masks(prior, num), some_labels(prior, num)
    for mask in (masks, masks[1], masks[prior.num_positions]):
        each = mask.expand_as(codes)
        first = prior.sample(num, labels, given=codes.masked_fill(each, -1), mask=mask, generator=seeded(1))
        second = prior.sample(num, labels, given=codes.masked_fill(each, 10**9), mask=mask, generator=seeded(1))
        assert torch.equal(first[~each], codes[~each])
        assert torch.equal(first, second)
        assert first.min() >= 0
        assert first.max() < prior.num_codes
    other = prior.sample(num, labels, given=codes, mask=masks, generator=seeded(2))
    assert not torch.equal(other, prior.sample(num, labels, given=codes, mask=masks, generator=seeded(3)))


def test_a_mask_of_all_is_none_and_a_mask_of_nothing_is_the_grid(prior: Prior) -> None:
    codes, labels = some_codes(prior, 5), some_labels(prior, 5)
    everywhere = torch.ones(prior.grid, dtype=torch.bool)
    drawn = prior.sample(5, labels, given=codes, mask=everywhere, generator=seeded(1))
    assert torch.equal(drawn, prior.sample(5, labels, generator=seeded(1)))
    assert torch.equal(prior.sample(5, labels, given=codes, mask=~everywhere), codes)


@pytest.mark.parametrize("num_known", [1, 3])
def test_conditionals_after_a_mask_are_those_after_the_prefix(prior: Prior, num_known: int) -> None:
    codes, labels = some_codes(prior, 5), some_labels(prior, 5)
    mask = (torch.arange(prior.num_positions) >= num_known).reshape(prior.grid)
    offered: list[list[Tensor]] = []

    def record(log_probs: Tensor) -> Tensor:
        offered[-1].append(log_probs)
        return log_probs.argmax(1)

    for known in ({"given": codes, "mask": mask}, {"prefix": codes.flatten(1)[:, :num_known]}):
        offered.append([])
        prior.walk(5, record, labels, **known)
    assert len(offered[0]) == prior.num_positions - num_known
    for masked, after_prefix in zip(*offered, strict=True):
        assert torch.equal(masked, after_prefix)


def test_conditionals_under_masks_that_differ_are_those_of_the_kept_codes(prior: Prior) -> None:
    """Whatever the chooser says about a position that is kept, the walk goes on with the kept code."""
    prior = prior.double()
    num = prior.num_positions + 1
    codes, masks, labels = some_codes(prior, num), suffix_masks(prior, num), some_labels(prior, num)
    wrong = torch.where(masks, codes, (codes + 1) % prior.num_codes).flatten(1)
    offered = []

    def choose(log_probs: Tensor) -> Tensor:
        offered.append(log_probs)
        return wrong[:, len(offered) - 1]

    assert torch.equal(prior.walk(num, choose, labels, given=codes, mask=masks), codes)
    expected = prior.log_conditionals(codes, labels).flatten(1, -2)
    torch.testing.assert_close(torch.stack(offered, 1), expected, atol=1e-11, rtol=0)


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
def test_bad_masks() -> None:
    codes, mask = torch.zeros(2, 2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    for kind in ("uniform", "transformer", "any-order"):
        prior = KINDS[kind]()
        for options, message in (
            ({"given": codes}, "given codes and a mask together"),
            ({"mask": mask}, "given codes and a mask together"),
            ({"given": codes, "mask": mask, "prefix": codes.flatten(1)[:, :1]}, "together, or a prefix"),
            ({"given": codes, "mask": mask.long()}, r"mask of torch.int64 \(2, 2\), expected booleans"),
            ({"given": codes, "mask": mask[:1]}, r"\(1, 2\), expected booleans of shape \(2, 2\) or \(2, 2, 2\)"),
            ({"given": codes, "mask": mask.expand(3, 2, 2)}, r"\(3, 2, 2\), expected booleans"),
            ({"given": codes[:1], "mask": mask}, r"given codes of shape \(1, 2, 2\), expected \(2, 2, 2\)"),
            ({"given": codes.flatten(1), "mask": mask}, r"given codes of shape \(2, 4\), expected \(2, 2, 2\)"),
            ({"given": codes.float(), "mask": ~mask}, "given codes of torch.float32, expected integers"),
            ({"given": codes + 3, "mask": ~mask}, "given codes from 3 to 3, expected 0 to 2"),
            ({"given": codes - 1, "mask": ~mask}, "given codes from -1 to -1, expected 0 to 2"),
        ):
            with pytest.raises(ValueError, match=message):
                sampled(prior, 2, **options)


# ---- seeds


def precisions(prior: Prior) -> list[dict[str, str]]:
    return [{"precision": name} for name in ("float32", "bfloat16")] if prior.has_arithmetic else [{}]


def test_a_grid_with_its_seed_is_the_same_alone_and_among_others(prior: Prior) -> None:
    seeds = [7 * i + 3 for i in range(20)]
    labels = some_labels(prior, 20)
    for options in precisions(prior):

        def draw(*which: int, options: dict[str, str] = options) -> Tensor:
            chosen = None if labels is None else labels[list(which)]
            return prior.sample(len(which), chosen, Sampling(**options), seeds=[seeds[i] for i in which])

        drawn = draw(*range(20))
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        for which in ((19,), (5, 18, 2)):
            assert torch.equal(draw(*which), drawn[list(which)]), (which, options)
        assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
        assert len(drawn.flatten(1).unique(dim=0)) > 5


@pytest.mark.parametrize("kind", ["transformer-labels", "any-order-labels", "next-scale-labels", "pixelcnn-labels"])
def test_seeds_go_with_guidance(kind: str) -> None:
    prior = KINDS[kind]()
    labels, seeds = torch.arange(20) % 2, list(range(20))
    drawn = prior.sample(20, labels, Sampling(guidance=3.0), seeds=seeds)
    assert not torch.equal(drawn, prior.sample(20, labels, seeds=seeds))
    part = prior.sample(3, labels[4:7], Sampling(guidance=[3.0] * prior.num_positions), seeds=seeds[4:7])
    assert torch.equal(part, drawn[4:7])


def test_seeds_go_with_masks_that_differ(prior: Prior) -> None:
    codes, masks, labels = some_codes(prior, 20), suffix_masks(prior, 20), some_labels(prior, 20)
    for options in precisions(prior)[-1:]:
        drawn = prior.sample(20, labels, Sampling(**options), seeds=range(20), given=codes, mask=masks)
        assert torch.equal(drawn[~masks], codes[~masks])
        for i in (2, 17):
            label = None if labels is None else labels[i : i + 1]
            alone = prior.sample(1, label, Sampling(**options), seeds=[i], given=codes[i : i + 1], mask=masks[i])
            assert torch.equal(alone[0], drawn[i]), (i, options)


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
        patch.setattr("priors.draws.random_chooser", spy)
        drawn = sampled(prior, **options)
    assert len(conditionals) == prior.num_positions
    return drawn, torch.stack(conditionals, 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("holes", [False, True])
def test_conditionals_of_a_seeded_grid_do_not_show_other_masks(
    precision: str, holes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: what is known is stepped one by one, however much of it all grids of a block have in common."""
    num, grid = 16, (3, 4)
    codes = torch.randint(7, (num, *grid), generator=seeded(0))
    lengths = torch.tensor([3, 12, 7, 5] * 4)  # of what is known; every grid knows at least three positions
    masks = (torch.arange(12) >= lengths[:, None]).reshape(num, *grid)
    for make in (make_any_order,) if holes else (make_any_order, make_transformer):
        prior = make(num_codes=7, grid=grid, num_classes=2, width=32)
        if holes:  # beside masks in raster order, one of which draws everything
            masks[1::3] = torch.rand(num, *grid, generator=seeded(1))[1::3] < 0.5
            masks[2] = True
        labels = torch.arange(num) % 2
        options = {"precision": precision, "guidance": 1.5}
        drawn, conditionals = recorded(
            prior, monkeypatch, num=num, labels=labels, seeds=range(num), given=codes, mask=masks, **options
        )
        assert torch.equal(drawn[~masks], codes[~masks])
        for i in (0, 1, 2, 3, 4):
            own = {"labels": labels[i : i + 1], "seeds": [i], "given": codes[i : i + 1], "mask": masks[i]}
            alone, own_conditionals = recorded(prior, monkeypatch, num=1, **own, **options)
            assert torch.equal(alone[0], drawn[i]), (make, i)
            assert torch.equal(own_conditionals[0], conditionals[i]), (make, i)


def test_tables_of_counts_do_not_show_other_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that share a context or a block none shows in another's conditional, in float32."""
    codes = torch.randint(6, (60, 4, 4), generator=seeded(0)) ** 2 // 5
    prior = NGramPrior(num_codes=6, grid=(4, 4)).fit(codes)
    drawn, conditionals = recorded(prior, monkeypatch, num=16, seeds=range(16))
    assert conditionals.dtype == torch.float32
    for i in (0, 9):
        alone, own_conditionals = recorded(prior, monkeypatch, num=1, seeds=[i])
        assert torch.equal(alone[0], drawn[i])
        assert torch.equal(own_conditionals[0], conditionals[i])
    scores = prior(codes)
    assert torch.equal(torch.cat([prior(codes[i : i + 1]) for i in range(10)]), scores[:10])


def test_other_seeds_give_other_grids(prior: Prior) -> None:
    labels = some_labels(prior, 20)
    first = prior.sample(20, labels, seeds=range(20))
    assert not torch.equal(first, prior.sample(20, labels, seeds=range(100, 120)))
    same = prior.sample(4, None if labels is None else labels[:1].expand(4), seeds=[2**32 - 1] * 4)
    assert (same == same[:1]).all()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([1], "1 seeds for 2 grids, expected one each"),
        ([1, 2, 3], "3 seeds for 2 grids"),
        ([1, -1], "a seed of -1, expected an integer from 0"),
        ([1, 2**32], f"a seed of {2**32}"),
        ([1, 1.5], r"a seed of 1\.5"),
        ([1, True], "a seed of True"),
        ([1, "2"], "a seed of '2'"),
        (7, "seeds=7, expected a sequence of integers"),
    ],
)
def test_bad_seeds(seeds: object, message: str) -> None:
    for kind in ("uniform", "transformer"):
        with pytest.raises(ValueError, match=message):
            KINDS[kind]().sample(2, seeds=seeds)
    with pytest.raises(ValueError, match="seeds and a generator, expected one of the two"):
        KINDS[kind]().sample(2, seeds=[1, 2], generator=seeded(0))


def test_seeds_have_blocks_of_their_own() -> None:
    for kind in ("uniform", "transformer"):
        with pytest.raises(ValueError, match="batch_size=2 beside seeds, which are sampled 16 at a time"):
            KINDS[kind]().samples(2, sampling=Sampling(batch_size=2), seeds=[1, 2])


# ---- what shapes a draw


def test_min_p_is_neutral_at_0_and_greedy_at_1(prior: Prior) -> None:
    labels = some_labels(prior, 64)
    plain = prior.sample(64, labels, generator=seeded(2))
    assert torch.equal(plain, prior.sample(64, labels, Sampling(min_p=0.0), generator=seeded(2)))
    if KINDS["uniform"]().__class__ is not prior.__class__:  # among equals all are the likeliest
        greedy = prior.sample(64, labels, Sampling(temperature=0.0))
        assert torch.equal(greedy, prior.sample(64, labels, Sampling(min_p=1.0)))
        assert not torch.equal(greedy, plain)


@pytest.mark.parametrize("kind", LABELLED)
def test_guidance_of_each_position(kind: str) -> None:
    prior = KINDS[kind]()
    labels, n = torch.arange(64) % 2, prior.num_positions

    def draw(guidance: object) -> Tensor:
        return prior.sample(64, labels, Sampling(guidance=guidance), generator=seeded(2))

    plain = draw(None)
    for none in (1.0, [1.0] * n, (1.0,) * n):
        assert torch.equal(draw(none), plain)
    assert torch.equal(draw([3.0] * n), draw(3.0))
    rising = [1.0] * (n - 1) + [6.0]
    drawn = draw(rising)
    assert not torch.equal(drawn, plain)
    # The last position alone is guided: what comes before it is as without.
    assert torch.equal(drawn.flatten(1)[:, :-1], plain.flatten(1)[:, :-1])


@pytest.mark.usefixtures("untyped")
def test_bad_guidance_of_positions() -> None:
    prior, labels = KINDS["transformer-labels"](), torch.tensor([0, 1])
    for guidance, message in (
        ([2.0] * 3, "guidance of 3 numbers, expected one for each of 4 positions"),
        ([], "guidance of 0 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.sample(2, labels, Sampling(guidance=guidance))
    for guidance in (0, 0.0, 2, 1e6, [0, 1, 2, 1e6]):
        assert prior.sample(2, labels, Sampling(guidance=guidance)).shape == (2, 2, 2)
    with pytest.raises(ValueError, match="without labels, expected labels to guide to"):
        prior.sample(2, sampling=Sampling(guidance=[2.0] * 4))
    for kind in ("uniform", "unigram", "ngram", "transformer"):
        with pytest.raises(ValueError, match="made without num_classes"):
            KINDS[kind]().sample(2, sampling=Sampling(guidance=[2.0] * 4))


@pytest.mark.usefixtures("untyped")
def test_guidance_of_1_needs_nothing_to_guide_to(prior: Prior) -> None:
    labels = some_labels(prior, 8)
    plain = prior.sample(8, labels, generator=seeded(2))
    without = prior.sample(8, generator=seeded(2))
    for none in (1, 1.0):
        assert torch.equal(prior.sample(8, labels, Sampling(guidance=none), generator=seeded(2)), plain)
        assert torch.equal(prior.sample(8, sampling=Sampling(guidance=none), generator=seeded(2)), without)


@pytest.mark.usefixtures("untyped")
def test_bad_labels_of_samples() -> None:
    for kind in LABELLED:
        prior = KINDS[kind]()
        for labels, message in (
            (torch.tensor([0, 2]), "labels from 0 to 2, expected 0 to 1"),
            (torch.tensor([-1, 0]), "labels from -1 to 0, expected 0 to 1"),
            (torch.tensor([0]), r"\(1,\), expected integers of shape \(2,\)"),
            (torch.tensor([0.0, 1.0]), "labels of torch.float32"),
        ):
            with pytest.raises(ValueError, match=message):
                prior.samples(2, labels)  # said at once, before a grid is asked for


def test_steps_are_refused_by_priors_that_have_their_own(prior: Prior) -> None:
    if isinstance(prior, AnyOrderPrior):
        assert prior.sample(2, sampling=Sampling(num_steps=2)).shape == (2, *prior.grid)
    else:
        with pytest.raises(ValueError, match=rf"num_steps=2, expected None: {type(prior).__name__} has steps"):
            prior.sample(2, sampling=Sampling(num_steps=2))


# ---- precision and progress


def test_every_precision_draws_codes(prior: Prior) -> None:
    assert prior.has_arithmetic == isinstance(
        prior, TransformerPrior | LlamaPrior | AnyOrderPrior | DepthTransformerPrior | NextScalePrior
    )
    prefix, labels = torch.zeros(5, 1, dtype=torch.int64), some_labels(prior, 5)
    for dtype, known in ((torch.float32, prefix[:, :0]), (torch.float64, prefix)):
        prior = prior.to(dtype)
        for precision in ("auto", "float32", "bfloat16", "int8") if prior.has_arithmetic else ("auto",):
            drawn = prior.sample(5, labels, Sampling(precision=precision), prefix=known)
            assert drawn.shape == (5, *prior.grid)
            assert drawn.dtype == torch.int64
            assert drawn.min() >= 0
            assert drawn.max() < prior.num_codes


def test_priors_that_draw_with_their_weights_as_they_are(prior: Prior) -> None:
    if prior.has_arithmetic:
        return
    for precision, compiled in (("float32", False), ("bfloat16", False), ("int8", True), ("auto", True)):
        message = (
            f"got precision='{precision}' and compiled={compiled}, expected 'auto' and False: {type(prior).__name__} "
            "samples with its weights as they are"
        )
        with pytest.raises(ValueError, match=f"^{message}$"):
            prior.samples(2, some_labels(prior, 2), Sampling(precision=precision, compiled=compiled))


def test_steps_of_several_codes_are_not_compiled() -> None:
    nearly, scales = KINDS["any-order"](), KINDS["next-scale"]()
    with pytest.raises(ValueError, match="compiled=True for steps of up to 4 codes, expected False, or one a step"):
        nearly.samples(2, sampling=Sampling(num_steps=1, compiled=True))
    with pytest.raises(ValueError, match="compiled=True for steps of up to 4 codes"):
        scales.samples(2, sampling=Sampling(compiled=True))
    # Where every step is of one code it is nobody's business how that was asked for.
    nearly.samples(2, sampling=Sampling(num_steps=4, compiled=True))
    NextScalePrior(num_codes=3, scales=(1,), width=8, depth=1, num_heads=2).samples(2, sampling=Sampling(compiled=True))


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_rounded_walks_draw_nearly_as_is_probable(precision: str) -> None:
    prior, num = make_transformer(num_codes=3, grid=(2, 2)), 8000
    drawn = prior.sample(num, sampling=Sampling(precision=precision), generator=seeded(3)).flatten(1)
    counts = torch.bincount(drawn @ torch.tensor([27, 9, 3, 1]), minlength=81).double()
    with torch.no_grad():
        expected = prior.log_prob(every_grid(prior)).double().exp()
    # Half the sum of differences: of exact draws about 0.03, of uniform ones over 0.3.
    assert (counts / num - expected).abs().sum() / 2 < 0.06
    assert (expected - 1 / 81).abs().sum() / 2 > 0.3


@pytest.mark.parametrize("kind", ["transformer", "any-order", "pixelcnn"])
def test_weights_that_are_not_numbers_draw_nothing(kind: str) -> None:
    prior = KINDS[kind]()
    with torch.no_grad():
        prior.logits.weight[1] = float("nan")
    for options in ({}, {"seeds": [1, 2]}, {"top_k": 2}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="not finite: see whether the prior's training diverged"):
            sampled(prior, 2, **options)


def test_progress_is_quiet_away_from_a_terminal(prior: Prior, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(prior.sample(4, sampling=Sampling(batch_size=3), progress=True)) == 4
    assert capfd.readouterr() == ("", "")
