"""Speculative sampling: the scorers it stands on, its distribution on worlds that can be enumerated, and its bounds."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from prior_worlds import (
    KINDS,
    every_grid,
    make_ngram,
    make_pixelcnn,
    make_transformer,
    seeded,
    some_codes,
    some_labels,
)
from torch import Tensor

from priors import DraftHead, NGramPrior, NormalPrior, Prior, Sampling, TransformerPrior, UniformPrior
from priors.draft_head import NUM_GUESSES, HeadDraft, neighbours
from priors.precision import Arithmetic
from priors.sampling import probabilities
from priors.scorers import guided
from priors.speculation import draw
from priors.walks import WalkStart

WORLD = {"num_codes": 3, "grid": (2, 2)}


def positions(begins: Sequence[int], num: int, prior: Prior) -> Tensor:
    return (torch.tensor(begins)[:, None] + torch.arange(num)).clamp(max=prior.num_positions - 1)


def head_for(prior: Any, seed: int = 3) -> DraftHead:
    """A head whose guesses are far from even, and from right."""
    torch.manual_seed(seed)
    head = DraftHead.of(prior)
    with torch.no_grad():
        head.out.weight.normal_(std=0.5)
    return head.to(prior.dtype).eval()


@torch.no_grad()
def test_scorers_score_any_stretch_again(prior: Prior) -> None:
    """Rows at different positions, codes that change behind what is final, stretches that stick out at the end."""
    prior = prior.double()
    last, labels = prior.num_positions - 1, some_labels(prior, 3)
    scorer = prior._start_scorer(WalkStart(3, labels, Arithmetic(torch.float64)), 3)
    codes = torch.cat((some_codes(prior, 3).flatten(1), torch.zeros(3, 3, dtype=torch.int64)), 1)
    strides = [[0, 0, 0], [1, 1, 1], [1, 2, 1], [2, 3, 1], [2, 3, 3], [3, 3, 3], [6, 4, 3], [7, 7, 5], [7, 7, 7]]
    for begins in strides if last == 7 else strides[:6]:
        for again in range(2):
            fresh = some_codes(prior, 3, seed=again).flatten(1)
            behind = torch.arange(last + 1) >= torch.tensor(begins)[:, None]
            codes[:, : last + 1] = torch.where(behind, fresh, codes[:, : last + 1])
            at = positions(begins, 3, prior)
            expected = prior.log_conditionals(codes[:, : last + 1].reshape(-1, *prior.grid), labels).flatten(1, -2)
            inside = torch.tensor(begins)[:, None] + torch.arange(3) <= last
            got = scorer(codes, begins, at).log_softmax(-1)
            expected = expected.gather(1, at[..., None].expand(-1, -1, prior.num_codes))
            torch.testing.assert_close(got[inside], expected[inside], atol=1e-9, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_scorers_in_other_arithmetic(dtype: torch.dtype, packed: bool) -> None:
    """Large enough that whole caches in bfloat16 are multiplied."""
    prior = make_transformer(num_codes=64, grid=(8, 16), width=64, num_classes=2).eval()
    codes, labels = some_codes(prior, 80).flatten(1), some_labels(prior, 80)
    begins = [3 + i % 40 for i in range(80)]
    scorer = prior._start_scorer(WalkStart(80, labels, Arithmetic(dtype, packed=packed)), 2)
    at = positions(begins, 2, prior)
    got = scorer(codes, begins, at).log_softmax(-1).exp()
    expected = prior.log_conditionals(codes.reshape(-1, 8, 16), labels).flatten(1, -2).exp()
    expected = expected.gather(1, at[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(got, expected, atol=2e-4 if dtype == torch.float32 else 0.06, rtol=0)


def test_guided_scorers_give_the_guided_conditionals() -> None:
    prior = KINDS["transformer-labels"]().double()
    codes, labels = some_codes(prior, 4).flatten(1), some_labels(prior, 4)
    assert labels is not None
    free = torch.full_like(labels, 2)
    start = WalkStart(8, torch.cat((labels, free)), Arithmetic(torch.float64))
    strengths = torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    at = positions([0] * 4, 4, prior)
    with torch.no_grad():
        got = guided(prior._start_scorer(start, 4), strengths)(codes, [0] * 4, at).log_softmax(-1)
    shape = (4, 2, 2)
    with_label = prior.log_conditionals(codes.reshape(shape), labels).flatten(1, 2)
    without = prior.log_conditionals(codes.reshape(shape)).flatten(1, 2)
    expected = (without + strengths[:, None] * (with_label - without)).log_softmax(-1)
    torch.testing.assert_close(got, expected)


def drafts_for(prior: Any) -> dict[str, Any]:
    found = {
        "uniform": UniformPrior(**WORLD),
        "ngram": make_ngram(**WORLD),
        "other": make_transformer(**WORLD, width=16, depth=1),
        "any-order": KINDS["any-order"](),
    }
    return found | ({"head": head_for(prior)} if isinstance(prior, TransformerPrior) else {})


@pytest.mark.parametrize("draft", ["uniform", "ngram", "other", "any-order", "head"])
@pytest.mark.parametrize("num_proposals", [1, 3])
def test_the_distribution_is_that_of_the_prior(draft: str, num_proposals: int) -> None:
    prior = KINDS["transformer"]()
    sampling = Sampling(draft=drafts_for(prior)[draft], num_proposals=num_proposals)
    holds(prior, None, sampling)


@pytest.mark.parametrize("kind", ["ngram", "pixelcnn", "llama"])
def test_any_prior_in_raster_order_can_be_sampled_by_a_draft(kind: str) -> None:
    holds(KINDS[kind](), None, Sampling(draft=make_ngram(**WORLD), num_proposals=2))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 2},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"guidance": 2.0},
        {"guidance": [1.0, 2.0, 0.5, 3.0], "temperature": 1.3},
    ],
)
@pytest.mark.parametrize("draft", ["ngram", "head"])
def test_filters_and_guidance_are_those_of_a_walk(options: dict[str, Any], draft: str) -> None:
    prior = KINDS["transformer-labels"]()
    proposing = head_for(prior) if draft == "head" else make_ngram(**WORLD)
    holds(prior, 1, Sampling(draft=proposing, num_proposals=2, **options))


def holds(prior: Any, label: int | None, sampling: Sampling, num: int = 6000) -> None:
    """A chi-square test of the grids sampled against their probabilities, which all grids together have."""
    prior = prior.double()
    world = every_grid(prior)
    log_probs = prior.log_conditionals(world, None if label is None else torch.full((len(world),), label))
    if sampling.guidance is not None:
        strengths = torch.tensor(sampling.guidance, dtype=torch.float64).expand(prior.num_positions)
        free = prior.log_conditionals(world)
        log_probs = free + strengths.reshape(*prior.grid, 1) * (log_probs - free)
    chances = probabilities(sampling, log_probs).gather(-1, world[..., None]).flatten(1).prod(1)
    assert abs(chances.sum().item() - 1) < 1e-9
    draft: Any = sampling.draft
    draft.double()
    got = prior.sample(num, label, sampling, seeded(5)).flatten(1)
    index = (got * 3 ** torch.arange(got.shape[1] - 1, -1, -1)).sum(1)
    counts = index.bincount(minlength=len(world)).double()
    assert counts[chances == 0].sum() == 0
    common = chances * num >= 5
    rest = [
        [each[~common].sum().item()] if chances[~common].sum() * num > 1 else [] for each in (counts, chances * num)
    ]
    observed, expected = (
        [*each[common].tolist(), *more] for each, more in zip((counts, chances * num), rest, strict=True)
    )
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in zip(observed, expected, strict=True))
    half = torch.tensor([(len(observed) - 1) / 2, statistic / 2], dtype=torch.float64)
    assert torch.special.gammaincc(half[0], half[1]).item() > 1e-3


def test_a_draft_that_is_the_prior_is_always_taken() -> None:
    """So that four codes take the first pass, which proposes none, and one more."""
    prior = KINDS["transformer"]().double()
    calls = []
    start = prior._start_scorer

    def counting(*args: Any) -> Any:
        scorer = start(*args)
        return lambda *stretch: (calls.append(stretch[2].shape[1]), scorer(*stretch))[1]

    twin = KINDS["transformer"]().double()
    prior._start_scorer = counting
    prior.sample(50, sampling=Sampling(draft=twin, num_proposals=3), generator=seeded())
    assert calls == [1, 3]


@pytest.mark.parametrize("draft", ["ngram", "head", "other", "pixelcnn"])
def test_what_is_given_stays(draft: str) -> None:
    """Of other lengths in each grid, so that they begin at different positions, and some are whole before others."""
    sizes = {"num_codes": 3, "grid": (3, 4)}
    prior = make_transformer(**sizes)
    others = {"ngram": make_ngram, "other": make_transformer, "pixelcnn": make_pixelcnn}
    proposing: Any = head_for(prior) if draft == "head" else others[draft](**sizes)
    given = some_codes(prior, 12)
    mask = (torch.arange(12) >= torch.arange(12)[:, None]).reshape(12, 3, 4)
    sampling = Sampling(draft=proposing, num_proposals=4)
    got = prior.sample(12, sampling=sampling, generator=seeded(), given=given, mask=mask)
    assert torch.equal(got[~mask], given[~mask])
    again = prior.sample(12, sampling=sampling, generator=seeded(), given=given, mask=mask)
    assert torch.equal(got, again)
    whole = prior.sample(12, sampling=sampling, prefix=given.flatten(1))
    assert torch.equal(whole, given)
    assert len(prior.sample(0, sampling=sampling)) == 0


def test_draw_takes_the_first_code_past_the_number() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 1.0, 0.0]]).expand(5, 5)
    uniform = torch.tensor([0.0, 0.6, 0.67, 0.999, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, uniform).tolist() == [1, 1, 3, 3, 3]
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([[0.5, math.nan]]), uniform[:1])


@torch.no_grad()
def test_a_head_proposes_what_it_guesses() -> None:
    """At work beside a scorer as over whole grids, along a chain and after codes that were refused."""
    prior = make_transformer(num_codes=5, grid=(3, 3), num_classes=2).double()
    head, codes, labels = head_for(prior), some_codes(prior, 2).flatten(1), some_labels(prior, 2)
    features = prior.trunk(prior.start(2, labels), prior.code(codes[:, :-1]))
    guesses = [guess for guess, _ in head.guesses(prior, features, codes)]
    assert len(guesses) == NUM_GUESSES
    start = WalkStart(2, labels, Arithmetic(torch.float64))
    scorer = prior._start_scorer(start, 5)
    draft = head.start_draft(prior, scorer, start)
    assert isinstance(draft, HeadDraft)
    scorer(codes, [0, 0], positions([0, 0], 4, prior))
    for first in ([1, 1], [4, 2], [2, 2]):
        for number in range(4):
            begins = [begin + number for begin in first]
            got = draft(codes, begins, torch.tensor(begins), number).log_softmax(-1)
            expected = torch.stack([guesses[number][row, begin - 1] for row, begin in enumerate(first)])
            torch.testing.assert_close(got, expected)


def test_neighbours_are_codes_before() -> None:
    assert neighbours((2, 3)).tolist() == [[6, 6, 6], [0, 6, 6], [1, 6, 6], [2, 0, 1], [3, 1, 2], [4, 2, 3]]
    assert neighbours((3,)).tolist() == [[3], [0], [1]]
    assert neighbours((2, 1)).tolist() == [[2, 2, 2], [0, 0, 2]]
    for grid in ((4, 5), (2, 3, 4), (7, 1, 2)):
        found = neighbours(grid)
        here = torch.arange(math.prod(grid))[:, None]
        assert bool(((found < here) | (found == math.prod(grid))).all())


def test_a_head_is_saved_and_loaded(tmp_path: Any) -> None:
    prior = make_transformer(**WORLD)
    head = head_for(prior)
    head.accepted.copy_(torch.tensor([0.9, 0.5, 0.25, 0.125]))
    head.save_pretrained(tmp_path / "draft")
    again = DraftHead.from_pretrained(tmp_path / "draft")
    assert again.config == head.config
    assert again.state_dict().keys() == head.state_dict().keys()
    assert all(torch.equal(mine, again.state_dict()[name]) for name, mine in head.state_dict().items())
    head.accepted[0] = 1.5
    head.save_pretrained(tmp_path / "wrong")
    with pytest.raises(ValueError, match="expected probabilities"):
        DraftHead.from_pretrained(tmp_path / "wrong")


@pytest.mark.parametrize(
    ("kind", "sampling", "more", "message"),
    [
        ("transformer", {"num_proposals": 2}, {}, "without a draft"),
        ("transformer", {"draft": make_ngram(num_codes=2, grid=(2, 2))}, {}, "a draft of 2 codes"),
        ("transformer", {"draft": make_pixelcnn(**WORLD, num_classes=2)}, {}, "with 2 classes"),
        ("transformer", {"draft": make_ngram(**WORLD)}, {"seeds": [1, 2]}, "seeds for each grid"),
        ("transformer", {"draft": make_ngram(**WORLD), "compiled": True}, {}, "compiled=True"),
        ("transformer", {"draft": head_for(make_transformer(**WORLD, width=12, num_heads=1))}, {}, "width 12"),
        ("any-order", {"draft": make_ngram(**WORLD), "num_steps": 2}, {}, "code by code in raster order"),
        ("next-scale", {"draft": make_ngram(num_codes=3, grid=(5,))}, {}, "code by code in raster order"),
        ("ngram", {"draft": head_for(make_transformer(**WORLD))}, {}, "for this NGramPrior"),
    ],
)
def test_what_cannot_be_had(kind: str, sampling: dict[str, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KINDS[kind]().sample(2, sampling=Sampling(**sampling), **more)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_numbers_of_proposals(value: Any) -> None:
    with pytest.raises(ValueError, match="num_proposals"):
        Sampling(num_proposals=value)


def test_a_draft_is_a_model() -> None:
    with pytest.raises(ValueError, match="draft"):
        Sampling(draft="ngram")  # type: ignore[arg-type]
    sampling = Sampling(draft=NormalPrior(dim=1, grid=(2, 2)))
    with pytest.raises(ValueError, match="expected a prior over codes or a DraftHead"):
        KINDS["transformer"]().sample(2, sampling=sampling)


def test_a_prior_that_diverged_says_so() -> None:
    prior = make_transformer(**WORLD)
    with torch.no_grad():
        prior.logits.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        prior.sample(2, sampling=Sampling(draft=NGramPrior(**WORLD), num_proposals=2))
