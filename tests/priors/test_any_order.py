"""What only the any-order prior does: exact conditionals in every order, under any mask, several codes a step."""

import copy
import itertools
import math

import pytest
import torch
from prior_worlds import every_grid, make_any_order, offered, sampled, seeded, some_codes, some_labels
from test_prior_contract import chi_square
from torch import Tensor

from priors import AnyOrderPrior, Sampling
from priors.any_order import cosine_sizes, spread_ranks

ORDERS = [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)]
# Where to draw, one mask for each grid; they leave 1, 3, 0 and 4 positions known.
MASKS = torch.tensor(
    [[[True, False], [True, True]], [[False, True], [False, False]], [[True, True], [True, True]], [[False] * 2] * 2]
)
# As many positions each, but others: one is known.
THREE = ~torch.eye(4, dtype=torch.bool).view(4, 2, 2)


def tiny(num_classes: int | None = 2) -> AnyOrderPrior:
    return make_any_order(num_codes=3, grid=(2, 2), num_classes=num_classes)


def positions_of(mask: Tensor, spread: bool) -> tuple[list[int], list[int]]:
    """The positions that a mask "*grid" keeps, and those that it draws, as they are taken."""
    drawn = mask.flatten().tolist()
    ranks = spread_ranks(mask.shape).tolist() if spread else range(len(drawn))
    positions = range(len(drawn))
    return [i for i in positions if not drawn[i]], sorted((i for i in positions if drawn[i]), key=lambda i: ranks[i])


def taken_order(masks: Tensor, spread: bool) -> Tensor:
    """All positions "b n" as they are taken under masks "b *grid"."""
    return torch.tensor([[*kept, *drawn] for kept, drawn in (positions_of(mask, spread) for mask in masks)])


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """Values "b *grid" as "b n" in an order."""
    return values.flatten(1).gather(1, order)


def conditionals_under(
    prior: AnyOrderPrior, codes: Tensor, labels: Tensor | None, mask: Tensor, sizes: tuple[int, ...], spread: bool
) -> Tensor:
    """Conditionals "b m k" of the m positions that one mask "*grid" draws, so many a step, from full passes alone.

    Each is that of an order in which its position comes right after all that the mask keeps and the steps before drew.
    """
    fixed, remaining = positions_of(mask, spread)
    conditionals = [torch.zeros(len(codes), 0, prior.num_codes, dtype=prior.dtype)]
    for size in sizes:
        now, remaining = remaining[:size], remaining[size:]
        for position in now:
            before = [*fixed, position]
            order = torch.tensor([*before, *(i for i in range(prior.num_positions) if i not in before)])
            with torch.no_grad():
                conditionals.append(prior.log_conditionals(codes, labels, order).flatten(1, -2)[:, [position]])
        fixed = fixed + now
    assert remaining == []
    return torch.cat(conditionals, 1)


def follow_and_compare(
    prior: AnyOrderPrior, codes: Tensor, labels: Tensor | None, masks: Tensor, num_steps: int | None, tolerance: float
) -> None:
    """A walk that takes `codes` is offered the conditionals that what is kept and drawn before says."""
    spread, most = num_steps is not None, int(masks.flatten(1).sum(1).max())
    ordered = in_order(codes, taken_order(masks, spread))[:, prior.num_positions - most :]
    # What stands at positions to draw is not looked at.
    known = {"given": codes.masked_fill(masks, -1), "mask": masks}
    got = offered(prior, ordered, labels, num_steps=num_steps, **known)
    assert got.shape[1] == most
    for mask in masks.unique(dim=0):
        rows = (masks == mask).flatten(1).all(1)
        num_drawn = int(mask.sum())
        sizes = cosine_sizes(most, num_steps) if num_steps is not None else (1,) * most
        sizes = sizes if num_drawn == most else (1,) * num_drawn
        expected = conditionals_under(prior, codes[rows], None if labels is None else labels[rows], mask, sizes, spread)
        # Conditionals of positions that are kept here and drawn in another grid are read by nobody.
        torch.testing.assert_close(got[rows, most - num_drawn :], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_distribution_whose_conditionals_stand_at_their_positions(order: tuple[int, ...]) -> None:
    prior, told = tiny().double(), torch.tensor(order)
    world = every_grid(prior)
    for labels in (None, some_labels(prior, len(world)) * 0, some_labels(prior, len(world))):
        log_probs = prior.log_prob(world, labels, told)
        assert log_probs.dtype == torch.float64
        if labels is None or not labels.any():
            assert abs(log_probs.exp().sum().item() - 1) < 1e-10
        conditionals = prior.log_conditionals(world, labels, told)
        assert conditionals.shape == (*world.shape, 3)
        assert (conditionals.exp().sum(-1) - 1).abs().max() < 1e-12
        picked = conditionals.gather(-1, world[..., None]).flatten(1).sum(1)
        torch.testing.assert_close(picked, log_probs, atol=1e-11, rtol=0)
    # A conditional reads the codes before its position in the order, all of them, and no others.
    for at, position in enumerate(order):
        other = world.clone()
        other.flatten(1)[:, position] = (world.flatten(1)[:, position] + 1) % 3
        moved = (prior.log_conditionals(other, labels, told) - conditionals).flatten(1, -2).abs().amax((0, 2))
        assert (moved[list(order[: at + 1])] == 0).all()
        assert (moved[list(order[at + 1 :])] > 1e-3).all()


def test_orders_differ_and_raster_is_one_of_them() -> None:
    prior = tiny().double()
    world = every_grid(prior)
    labels = some_labels(prior, len(world))
    scores = [prior.log_prob(world, labels, torch.tensor(order)) for order in ORDERS]
    torch.testing.assert_close(scores[0], prior.log_prob(world, labels), atol=1e-11, rtol=0)
    for one, other in itertools.combinations(scores, 2):
        assert (one - other).abs().max() > 0.1
    assert torch.equal(prior(world, labels, torch.tensor(ORDERS[2])), scores[2])
    # Each grid may have its own.
    own = torch.tensor(ORDERS).repeat(len(world), 1)[: len(world)]
    expected = torch.stack(scores, 1).gather(1, torch.arange(len(world))[:, None] % 4)[:, 0]
    torch.testing.assert_close(prior.log_prob(world, labels, own), expected, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("masks", "num_steps"),
    [
        *((masks, None) for masks in (MASKS, MASKS[:1], MASKS[1:2], MASKS[2:3], THREE)),
        *((MASKS[2:3], num_steps) for num_steps in (1, 2, 3, 4)),
        *((THREE, num_steps) for num_steps in (1, 2, 3)),
        (THREE[:1], 2),
        (MASKS, 4),  # one code a step, as far apart as possible
    ],
)
def test_a_walk_offers_the_exact_conditionals_under_any_masks(masks: Tensor, num_steps: int | None) -> None:
    prior = tiny().double()
    world = every_grid(prior)
    masks = masks.repeat(len(world), 1, 1)[: len(world)]
    follow_and_compare(prior, world, some_labels(prior, len(world)), masks, num_steps, 1e-11)


@pytest.mark.parametrize("num_steps", [None, 1, 4])
def test_steps_of_many_codes_after_steps_of_many_codes(num_steps: int | None) -> None:
    """A longer walk in float32, with an order for each grid: chains and probes of several positions, repeatedly."""
    prior = make_any_order(num_codes=4, grid=(3, 5))
    codes = some_codes(prior, 6)
    masks = (torch.rand(6, 15, generator=seeded(2)).argsort(1) < 11).view(6, 3, 5)
    assert len(masks.unique(dim=0)) == 6
    assert max(cosine_sizes(11, 4)) > 2
    follow_and_compare(prior, codes, None, masks, num_steps, 1e-4)


def test_steps_of_several_codes_take_masks_of_one_size() -> None:
    """What one grid keeps would come in the same step as what another draws, which so would not know of it."""
    prior = tiny(None)
    codes = torch.zeros(4, 2, 2, dtype=torch.int64)
    for options in ({"num_steps": 1}, {"num_steps": 3, "seeds": range(4)}, {"num_steps": 2, "batch_size": 1}):
        message = f"num_steps={options['num_steps']} and masks of different sizes, expected one size"
        with pytest.raises(ValueError, match=message):
            sampled(prior, 4, given=codes, mask=MASKS, **options)
    nothing = torch.zeros(2, 2, dtype=torch.bool)  # where nothing is to be drawn, one step of it is no mistake
    for masks, num_steps in ((MASKS, 4), (THREE, 2), (THREE[0], 2), (MASKS, None), (nothing, 1)):
        drawn = prior.sample(4, sampling=Sampling(num_steps=num_steps), given=codes, mask=masks)
        kept = ~masks.expand_as(codes)
        assert torch.equal(drawn[kept], codes[kept])


@pytest.mark.parametrize("num_steps", [None, 2])
def test_inpainted_grids_are_as_frequent_as_they_are_probable(num_steps: int | None) -> None:
    """Two grids, with other positions known in each; each is completed as the model's own conditional says."""
    prior = tiny()
    num, world = 8_000, every_grid(prior)
    known = torch.tensor([[[2, 0], [1, 2]], [[1, 1], [0, 2]]])
    masks = MASKS[[0, 1]] if num_steps is None else THREE[[1, 2]]
    labels = torch.ones(2 * num, dtype=torch.int64)
    given, mask = known.repeat_interleave(num, 0), masks.repeat_interleave(num, 0)
    samples = prior.sample(2 * num, labels, Sampling(num_steps=num_steps), seeded(3), given=given, mask=mask)
    samples = samples.view(2, num, 2, 2)
    for mask, kept, drawn in zip(masks, known, samples, strict=True):
        assert (drawn[:, ~mask] == kept[~mask]).all()
        fits = ((world == kept) | mask).flatten(1).all(1)
        sizes = (1,) * int(mask.sum()) if num_steps is None else (1, 2)
        spread = num_steps is not None
        conditionals = conditionals_under(prior, world, labels[: len(world)], mask, sizes, spread)
        at = world.flatten(1)[:, positions_of(mask, spread)[1]]
        expected = conditionals.gather(-1, at[..., None])[..., 0].sum(1).double().masked_fill(~fits, -math.inf)
        assert abs(expected.exp().sum().item() - 1) < 1e-5
        statistic, bound = chi_square(prior, drawn, expected.softmax(0))
        assert statistic < bound
        # The test can fail: the same counts refute a distribution that is slightly tilted.
        statistic, bound = chi_square(prior, drawn, (expected * 0.8).softmax(0))
        assert statistic > bound


def test_guidance_mixes_the_conditionals_of_a_step() -> None:
    prior, mask = tiny().double(), THREE[2]
    codes = every_grid(prior)[:40]
    labels, order = some_labels(prior, 40), positions_of(mask, True)[1]
    known = {"given": codes, "mask": mask, "num_steps": 2}
    got = offered(prior, codes.flatten(1)[:, order], labels, guidance=(1.0, 2.0, 0.0, 3.0), **known)
    given, free = (conditionals_under(prior, codes, told, mask, (1, 2), True) for told in (labels, None))
    strength = torch.tensor([2.0, 0.0, 3.0]).double()[:, None]  # the first position is known
    expected = (free + strength * (given - free)).log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=0)


def test_training_draws_orders_and_reaches_every_position() -> None:
    prior = tiny(None).train()
    codes = torch.tensor([[[0, 1], [2, 0]]]).expand(2000, -1, -1)
    torch.manual_seed(0)
    scores = prior.log_prob(codes)
    torch.manual_seed(0)
    assert torch.equal(prior.log_prob(codes), scores)
    # Each of the 24 orders has its score, a quarter of the grids and a 24th of the others that of raster order.
    every = torch.tensor(list(itertools.permutations(range(4))))
    expected = prior.log_prob(codes[:24], order=every)
    distance = (scores[:, None] - expected).abs()
    assert distance.amin(1).max() < 1e-4
    counts = torch.bincount(distance.argmin(1), minlength=24)
    assert (counts[1:] > 30).all()
    assert (counts[1:] < 100).all()
    assert 480 < counts[0] < 650
    scores.mean().backward()
    assert (prior.origin.grad.abs().sum(1) > 0).all()
    assert (prior.trunk.target.grad.abs().sum(1) > 0).all()
    # What is told counts in training too, and conditionals stay in raster order.
    plain = copy.deepcopy(prior).eval()
    order = torch.tensor(ORDERS[1])
    assert torch.equal(prior.log_prob(codes[:1], order=order), plain.log_prob(codes[:1], order=order))
    assert torch.equal(prior.log_conditionals(codes[:1]), plain.log_conditionals(codes[:1]))


def test_it_learns_to_inpaint() -> None:
    """The right half repeats the left, which is drawn evenly: either is certain from the other, in any order."""
    torch.manual_seed(0)
    prior = AnyOrderPrior(num_codes=4, grid=(2, 4), width=32, depth=2, num_heads=2)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3)
    for _ in range(300):
        left = torch.randint(4, (64, 2, 2))
        optimizer.zero_grad()
        (-prior(torch.cat((left, left), 2)).mean()).backward()
        optimizer.step()
    prior.eval()
    codes = torch.randint(4, (200, 2, 2)).repeat(1, 1, 2)
    best = 4 * math.log(4)
    for order in (torch.arange(8), torch.arange(7, -1, -1), torch.tensor([6, 0, 3, 5, 2, 1, 7, 4])):
        with torch.no_grad():
            assert -prior.log_prob(codes, order=order).mean() < best + 0.1
    mask = torch.zeros(2, 4, dtype=torch.bool)
    for half in (slice(0, 2), slice(2, 4)):
        here = mask.clone()
        here[:, half] = True
        for num_steps in (None, 1, 3):
            filled = sampled(prior, 200, given=codes.masked_fill(here, 0), mask=here, num_steps=num_steps)
            assert (filled == codes).double().mean() > 0.98
    # Drawn all at once, what depends on each other is drawn apart.
    apart = prior.sample(200, sampling=Sampling(num_steps=1))
    assert (apart[..., :2] == apart[..., 2:]).double().mean() < 0.5


def test_sizes_of_steps_follow_a_cosine() -> None:
    assert cosine_sizes(49, 8) == (1, 3, 4, 6, 8, 8, 9, 10)
    assert cosine_sizes(10, 8) == (1, 1, 1, 1, 1, 1, 2, 2)
    assert cosine_sizes(0, 1) == ()
    for num_positions in range(1, 40):
        for num_steps in range(1, num_positions + 1):
            sizes = cosine_sizes(num_positions, num_steps)
            assert len(sizes) == num_steps
            assert sum(sizes) == num_positions
            assert min(sizes) >= 1
            assert list(sizes) == sorted(sizes)


@pytest.mark.parametrize("grid", [(7, 7), (16, 16), (5, 9), (30,), (1, 1)])
def test_positions_drawn_together_stand_apart(grid: tuple[int, ...]) -> None:
    positions = torch.tensor(list(itertools.product(*map(range, grid)))).double()

    def share_with_a_neighbour(ranks: Tensor) -> float:
        assert sorted(ranks.tolist()) == list(range(len(positions)))
        steps = positions[ranks.argsort()].split(list(cosine_sizes(len(positions), min(12, len(positions)))))
        nearest = [(torch.cdist(step, step) + 100 * torch.eye(len(step))).amin(1) for step in steps]
        return (torch.cat(nearest) < 1.01).double().mean().item()

    # By chance a fifth of the positions and more have a neighbour in their step.
    assert share_with_a_neighbour(spread_ranks(grid)) < 0.05
    if len(positions) > 1:
        assert share_with_a_neighbour(torch.randperm(len(positions), generator=seeded())) > 0.12


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(4.0), r"order of torch.float32 \(4,\), expected integers of shape \(4,\) or \(2, 4\)"),
        (torch.arange(4).expand(3, 4), r"torch.int64 \(3, 4\), expected"),
        (torch.tensor([1, 2, 3, 4]), "no permutation, expected each of 0 to 3 once"),
        (torch.tensor([[0, 1, 2, 3], [0, 0, 2, 3]]), "no permutation"),
    ],
)
def test_bad_orders(order: Tensor, message: str) -> None:
    for score in (tiny().log_prob, tiny().log_conditionals):
        with pytest.raises(ValueError, match=message):
            score(torch.zeros(2, 2, 2, dtype=torch.int64), order=order)


@pytest.mark.usefixtures("untyped")
def test_bad_steps() -> None:
    prior, codes = tiny(), torch.zeros(2, 2, 2, dtype=torch.int64)
    for num_steps, mask, most in ((5, MASKS[2], 4), (4, MASKS[:2], 3), (2, MASKS[3], 0)):
        expected = f"num_steps={num_steps}, expected an integer from 1 to {max(most, 1)}, with {most} positions"
        with pytest.raises(ValueError, match=expected):
            prior.sample(2, sampling=Sampling(num_steps=num_steps), given=codes, mask=mask)
