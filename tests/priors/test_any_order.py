"""What only the any-order prior does: exact conditionals in every order, under any mask, several codes a step."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from prior_worlds import every_grid, make_any_order, sampled, some_labels
from test_prior_contract import chi_square
from torch import Tensor

from priors import AnyOrderPrior, Sampling
from priors.any_order import cosine_sizes, spread_ranks
from priors.sampling import known_chooser

ORDERS = [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)]
# Where to draw, one mask for each grid; they leave 1, 3, 0 and 4 positions known.
MASKS = torch.tensor(
    [[[True, False], [True, True]], [[False, True], [False, False]], [[True, True], [True, True]], [[False] * 2] * 2]
)
# As many positions each, but others: one is known, or two are.
THREE = ~torch.eye(4, dtype=torch.bool).view(4, 2, 2)
TWO = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]], [[True, True], [False, False]]])


def tiny(num_classes: int | None = None) -> AnyOrderPrior:
    return make_any_order(num_codes=3, grid=(2, 2), num_classes=num_classes).double()


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
    fixed, drawn = positions_of(mask, spread)
    conditionals, remaining = [], list(drawn)
    for size in sizes:
        now, remaining = remaining[:size], remaining[size:]
        for position in now:
            before = [*fixed, position]
            order = torch.tensor([*before, *(i for i in range(prior.num_positions) if i not in before)])
            with torch.no_grad():
                conditionals.append(prior.log_conditionals(codes, labels, order).flatten(1, -2)[:, position])
        fixed = fixed + now
    assert remaining == []
    return (
        torch.stack(conditionals, 1)
        if conditionals
        else codes.new_zeros(len(codes), 0, prior.num_codes).to(prior.dtype)
    )


def follow_and_compare(
    prior: AnyOrderPrior, codes: Tensor, labels: Tensor | None, masks: Tensor, num_steps: int | None, tolerance: float
) -> None:
    """A walk that takes `codes` is offered the conditionals that what is kept and drawn before says."""
    spread, most = num_steps is not None, int(masks.flatten(1).sum(1).max())
    ordered, offered = in_order(codes, taken_order(masks, spread)), []

    def follow(log_probs: Tensor) -> Tensor:
        offered.append(log_probs)
        return ordered[:, prior.num_positions - most + len(offered) - 1]

    # What stands at positions to draw is not looked at.
    known = codes.masked_fill(masks, -1)
    assert torch.equal(prior.walk(len(codes), follow, labels, given=known, mask=masks, num_steps=num_steps), codes)
    assert len(offered) == most
    for mask in masks.unique(dim=0):
        rows = (masks == mask).flatten(1).all(1)
        num_drawn = int(mask.sum())
        sizes = cosine_sizes(most, num_steps) if num_steps is not None else (1,) * most
        sizes = sizes if num_drawn == most else (1,) * num_drawn
        expected = conditionals_under(prior, codes[rows], None if labels is None else labels[rows], mask, sizes, spread)
        got = torch.stack(offered, 1)[rows] if offered else expected
        # Conditionals of positions that are kept here and drawn in another grid are read by nobody.
        torch.testing.assert_close(got[:, most - num_drawn :], expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_a_distribution(order: tuple[int, ...]) -> None:
    for prior in (tiny(), tiny(num_classes=2)):
        world = every_grid(prior)
        for labels in (None, some_labels(prior, 1)):
            labels = None if labels is None else labels.expand(len(world))
            log_probs = prior.log_prob(world, labels, torch.tensor(order))
            assert log_probs.dtype == torch.float64
            assert abs(log_probs.exp().sum().item() - 1) < 1e-10


def test_orders_differ_and_raster_is_one_of_them() -> None:
    prior = tiny(num_classes=2)
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


@pytest.mark.parametrize("order", ORDERS)
def test_conditionals_in_an_order_stand_at_their_positions(order: tuple[int, ...]) -> None:
    prior = tiny(num_classes=2)
    world, told = every_grid(prior), torch.tensor(order)
    labels = some_labels(prior, len(world))
    conditionals = prior.log_conditionals(world, labels, told)
    assert conditionals.shape == (*world.shape, 3)
    assert (conditionals.exp().sum(-1) - 1).abs().max() < 1e-12
    picked = conditionals.gather(-1, world[..., None]).flatten(1).sum(1)
    torch.testing.assert_close(picked, prior.log_prob(world, labels, told), atol=1e-11, rtol=0)
    # A conditional reads the codes before its position in the order, all of them, and no others.
    for at, position in enumerate(order):
        other = world.clone()
        other.flatten(1)[:, position] = (world.flatten(1)[:, position] + 1) % 3
        moved = (prior.log_conditionals(other, labels, told) - conditionals).flatten(1, -2).abs().amax((0, 2))
        assert (moved[list(order[: at + 1])] == 0).all()
        assert (moved[list(order[at + 1 :])] > 1e-3).all()


@pytest.mark.parametrize("num_classes", [None, 2])
def test_a_walk_in_an_order_scores_like_log_prob_in_it(num_classes: int | None) -> None:
    prior = tiny(num_classes)
    world = every_grid(prior)
    labels = some_labels(prior, len(world))
    order = taken_order(torch.ones(len(world), 2, 2, dtype=torch.bool), True)
    assert order[0].tolist() != [0, 1, 2, 3]
    chooser = known_chooser(in_order(world, order))
    assert torch.equal(prior.walk(len(world), chooser, labels, num_steps=4), world)
    torch.testing.assert_close(chooser.log_prob, prior.log_prob(world, labels, order), atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("masks", "num_steps"),
    [
        *((masks, None) for masks in (MASKS, MASKS[:2], MASKS[:1], MASKS[1:2], MASKS[2:3], THREE, TWO)),
        *((MASKS[2:3], num_steps) for num_steps in (1, 2, 3, 4)),
        *((THREE, num_steps) for num_steps in (1, 2, 3)),
        *((THREE[:1], num_steps) for num_steps in (1, 2)),
        *((TWO, num_steps) for num_steps in (1, 2)),
        (MASKS[1:2], 1),
        (MASKS, 4),  # one code a step, as far apart as possible
        (MASKS[:2], 3),
    ],
)
def test_a_walk_offers_the_exact_conditionals_under_any_masks(masks: Tensor, num_steps: int | None) -> None:
    prior = tiny(num_classes=2)
    world = every_grid(prior)
    masks = masks.repeat(len(world), 1, 1)[: len(world)]
    follow_and_compare(prior, world, some_labels(prior, len(world)), masks, num_steps, 1e-11)


@pytest.mark.parametrize("num_steps", [None, 1, 4])
def test_steps_of_many_codes_after_steps_of_many_codes(num_steps: int | None) -> None:
    """A longer walk in float32, with an order for each grid: chains and probes of several positions, repeatedly."""
    prior = make_any_order(num_codes=4, grid=(3, 5))
    torch.manual_seed(2)
    codes = torch.randint(4, (6, 3, 5))
    masks = (torch.rand(6, 15).argsort(1) < 11).view(6, 3, 5)
    assert len(masks.unique(dim=0)) == 6
    assert max(cosine_sizes(11, 4)) > 2
    follow_and_compare(prior, codes, None, masks, num_steps, 1e-4)


def test_steps_of_several_codes_take_masks_of_one_size() -> None:
    """What one grid keeps would come in the same step as what another draws, which so would not know of it."""
    prior = make_any_order(num_codes=3, grid=(2, 2))
    codes = torch.zeros(4, 2, 2, dtype=torch.int64)
    for num_steps in (1, 2, 3):
        message = f"num_steps={num_steps} and masks of different sizes, expected one size"
        with pytest.raises(ValueError, match=message):
            prior.walk(4, known_chooser(codes), given=codes, mask=MASKS, num_steps=num_steps)
        for options in ({}, {"seeds": range(4)}, {"batch_size": 1}):
            with pytest.raises(ValueError, match=message):
                sampled(prior, 4, given=codes, mask=MASKS, num_steps=num_steps, **options)
    for masks, num_steps in ((MASKS, 4), (THREE, 2), (THREE[:1].expand(4, 2, 2), 2), (MASKS, None)):
        drawn = prior.sample(4, sampling=Sampling(num_steps=num_steps), given=codes, mask=masks)
        assert torch.equal(drawn[~masks], codes[~masks])


@pytest.mark.parametrize("num_steps", [None, 2])
def test_inpainted_grids_are_as_frequent_as_they_are_probable(num_steps: int | None) -> None:
    """Two grids, with other positions known in each; each is completed as the model's own conditional says."""
    prior = make_any_order(num_codes=3, grid=(2, 2), num_classes=2)
    num, world = 8_000, every_grid(prior)
    known = torch.tensor([[[2, 0], [1, 2]], [[1, 1], [0, 2]]])
    masks = MASKS[[0, 1]] if num_steps is None else THREE[[1, 2]]
    labels = torch.ones(2 * num, dtype=torch.int64)
    given, mask = known.repeat_interleave(num, 0), masks.repeat_interleave(num, 0)
    generator = torch.Generator().manual_seed(3)
    samples = prior.sample(2 * num, labels, Sampling(num_steps=num_steps), generator, given=given, mask=mask)
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


def test_one_step_draws_each_position_from_its_own_conditional() -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2))
    samples = prior.sample(8_000, sampling=Sampling(num_steps=1), generator=torch.Generator().manual_seed(3))
    world = every_grid(prior)
    with torch.no_grad():
        firsts = [
            prior.log_conditionals(world[:1], order=torch.tensor([i, *(j for j in range(4) if j != i)])).flatten(1, -2)[
                0, i
            ]
            for i in range(4)
        ]
    scores = torch.stack([firsts[i][world.flatten(1)[:, i]] for i in range(4)], 1).sum(1)
    statistic, bound = chi_square(prior, samples, scores.double().exp())
    assert statistic < bound


def test_prefixes_masks_and_whole_grids() -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2))
    codes = torch.randint(3, (5, 2, 2), generator=torch.Generator().manual_seed(0))
    # A mask that leaves the first positions known is a prefix.
    mask = torch.tensor([[False, False], [True, True]])
    one = prior.sample(5, given=codes, mask=mask, generator=torch.Generator().manual_seed(1))
    other = prior.sample(5, prefix=codes.flatten(1)[:, :2], generator=torch.Generator().manual_seed(1))
    assert torch.equal(one, other)
    # With nothing to draw nothing is drawn, in a step or without.
    for num_steps in (None, 1):
        assert torch.equal(
            prior.sample(5, sampling=Sampling(num_steps=num_steps), given=codes, mask=torch.zeros_like(mask)), codes
        )
    for num_steps in (None, 3):
        assert prior.walk(0, known_chooser(codes[:0]), num_steps=num_steps).shape == (0, 2, 2)


def test_guidance_and_blocks_in_steps() -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2), num_classes=2)
    codes = every_grid(prior)[:40]
    masks, labels = THREE.repeat(10, 1, 1), some_labels(prior, 40)

    def draw(**options: float) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return sampled(prior, 40, labels, given=codes, mask=masks, num_steps=2, generator=generator, **options)

    assert torch.equal(draw(), draw(guidance=1.0))
    assert not torch.equal(draw(), draw(guidance=4.0))
    for drawn in (draw(guidance=4.0), draw(batch_size=7), draw(precision="bfloat16")):
        assert torch.equal(drawn[~masks], codes[~masks])
    # Guidance mixes the conditionals of the step with the label and without it.
    prior, conditionals, mask = prior.double(), [], THREE[2]

    def follow(log_probs: Tensor) -> Tensor:
        conditionals.append(log_probs)
        return codes.flatten(1)[:, positions_of(mask, True)[1][len(conditionals) - 1]]

    prior.walk(40, follow, labels, guidance=(1.0, 2.0, 0.0, 3.0), given=codes, mask=mask, num_steps=2)
    given, free = (conditionals_under(prior, codes, told, mask, (1, 2), True) for told in (labels, None))
    strength = torch.tensor([2.0, 0.0, 3.0]).double()[:, None]  # the first position is known
    expected = (free + strength * (given - free)).log_softmax(-1)
    torch.testing.assert_close(torch.stack(conditionals, 1), expected, atol=1e-11, rtol=0)


def test_a_seeded_grid_is_the_same_alone() -> None:
    prior = make_any_order(num_codes=3, grid=(3, 5))
    codes = torch.randint(3, (20, 3, 5), generator=torch.Generator().manual_seed(0))
    masks = (torch.rand(20, 15, generator=torch.Generator().manual_seed(1)).argsort(1) < 9).view(20, 3, 5)
    for mask in (masks, masks[0].expand(20, 3, 5)):
        for num_steps in (None, 3):
            sampling = Sampling(num_steps=num_steps)
            drawn = prior.sample(20, None, sampling, seeds=range(20), given=codes, mask=mask)
            alone = prior.sample(1, None, sampling, seeds=[17], given=codes[17:18], mask=mask[17])
            assert torch.equal(drawn[17:18], alone)
            assert not torch.equal(drawn[16], drawn[17])


def test_saved_and_loaded_it_has_its_config(tmp_path: Path) -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2), num_classes=2, raster_share=0.75, code_noise=0.1)
    prior.save_pretrained(tmp_path / "prior")
    again = AnyOrderPrior.from_pretrained(tmp_path / "prior")
    assert again.config == prior.config
    order = torch.tensor(ORDERS[2])
    assert torch.equal(again.log_prob(every_grid(prior), order=order), prior.log_prob(every_grid(prior), order=order))


def test_training_draws_orders_and_reaches_every_weight() -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2)).train()
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
    for weight in prior.parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
    assert (prior.origin.grad.abs().sum(1) > 0).all()
    assert (prior.trunk.target.grad.abs().sum(1) > 0).all()
    # What is told counts in training too, and conditionals stay in raster order.
    plain = copy.deepcopy(prior).eval()
    order = torch.tensor(ORDERS[1])
    assert torch.equal(prior.log_prob(codes[:1], order=order), plain.log_prob(codes[:1], order=order))
    assert torch.equal(prior.log_conditionals(codes[:1]), plain.log_conditionals(codes[:1]))


def test_orders_of_training_follow_raster_share() -> None:
    codes = torch.zeros(4000, 6, dtype=torch.int64)
    for share in (0.0, 0.5):
        prior = AnyOrderPrior(num_codes=2, grid=(6,), width=8, depth=1, num_heads=2, raster_share=share)
        torch.manual_seed(0)
        orders = prior._draw_orders(codes)
        assert torch.equal(orders.sort(1).values, torch.arange(6).expand(4000, -1))
        raster = (orders == torch.arange(6)).all(1).double().mean().item()
        assert abs(raster - (share + (1 - share) / 720)) < 0.03


def test_it_learns_to_inpaint() -> None:
    """The right half repeats the left, which is drawn evenly: either is certain from the other, in any order."""
    torch.manual_seed(0)
    config = AnyOrderPrior.Config(num_codes=4, grid=(2, 4), width=32, depth=2, num_heads=2, raster_share=0.25)
    prior = config.build()
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
            filled = prior.sample(
                200, sampling=Sampling(num_steps=num_steps), given=codes.masked_fill(here, 0), mask=here
            )
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


@pytest.mark.parametrize("grid", [(7, 7), (16, 16), (5, 9), (30,), (4, 4, 4), (1, 1)])
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
        assert share_with_a_neighbour(torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))) > 0.12


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(4.0), r"order of torch.float32 \(4,\), expected integers of shape \(4,\) or \(2, 4\)"),
        (torch.arange(3), r"torch.int64 \(3,\), expected integers of shape \(4,\) or \(2, 4\)"),
        (torch.arange(4).expand(3, 4), r"torch.int64 \(3, 4\), expected"),
        (torch.tensor([0, 1, 2, 2]), "no permutation, expected each of 0 to 3 once"),
        (torch.tensor([1, 2, 3, 4]), "no permutation"),
        (torch.tensor([[0, 1, 2, 3], [0, 0, 2, 3]]), "no permutation"),
    ],
)
def test_bad_orders(order: Tensor, message: str) -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2))
    for score in (prior.log_prob, prior.log_conditionals, prior):
        with pytest.raises(ValueError, match=message):
            score(torch.zeros(2, 2, 2, dtype=torch.int64), order=order)


@pytest.mark.usefixtures("untyped")
def test_bad_steps_and_masks() -> None:
    prior = make_any_order(num_codes=3, grid=(2, 2))
    codes = torch.zeros(2, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="num_steps=5, expected an integer from 1 to 4, with 4 positions"):
        prior.sample(2, sampling=Sampling(num_steps=5))
    with pytest.raises(ValueError, match="num_steps=4, expected an integer from 1 to 3, with 3 positions"):
        prior.sample(2, sampling=Sampling(num_steps=4), given=codes, mask=MASKS[:2])
    with pytest.raises(ValueError, match="num_steps=2, expected an integer from 1 to 1, with 0 positions"):
        prior.sample(2, sampling=Sampling(num_steps=2), given=codes, mask=MASKS[3])
    for mask, message in (
        (torch.ones(2, 2), r"mask of torch.float32 \(2, 2\)"),
        (torch.ones(3, 2, 2, dtype=torch.bool), r"mask of torch.bool \(3, 2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.sample(2, given=codes, mask=mask)
    with pytest.raises(ValueError, match="given codes and a mask together"):
        prior.sample(2, mask=MASKS[:2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes=0"),
        ({"grid": ()}, r"grid=\(\)"),
        ({"width": 25}, "width=25 with num_heads=2"),
        ({"raster_share": 1.0}, r"raster_share=1\.0, expected a number in \[0, 1\)"),
        ({"raster_share": -0.1}, r"raster_share=-0\.1"),
        ({"code_noise": 1.0}, r"code_noise=1\.0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"label_dropout": 2.0}, r"label_dropout=2\.0"),
    ],
)
def test_bad_configs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnyOrderPrior.Config(**{"num_codes": 3, "grid": (2, 2), "width": 24, "num_heads": 2, **options})
