"""The prior of two transformers against its equations in NumPy, and what only it does."""

import numpy as np
import pytest
import torch
from prior_worlds import make_depth, some_codes
from torch.nn import functional as F
from trunk_reference import log_softmax, reference_trunk

from priors import DepthTransformerPrior, Sampling
from priors.precision import Arithmetic

SHAPES = [((2, 3, 3), None), ((2, 3, 2), 2), ((3, 2), None), ((2, 2, 1), 2), ((1, 4), None), ((2, 1, 2, 2), None)]


def reference_conditionals(prior: DepthTransformerPrior, codes: list[int], label: int | None) -> np.ndarray:
    """ln P(. | before) at each code of one grid, "n k"."""
    weights = {name: t.detach().numpy() for name, t in prior.state_dict().items()}
    *grid, d = prior.grid
    split = [codes[begin : begin + d] for begin in range(0, len(codes), d)]
    embedded = [[weights[f"code.{j}.weight"][code] for j, code in enumerate(position)] for position in split]
    label = len(weights["start.embedding.weight"]) - 1 if label is None else label
    tokens = [weights["start.embedding.weight"][label], *(np.sum(vectors, 0) for vectors in embedded[:-1])]

    def features(name: str, tokens: list[np.ndarray], sizes: tuple[int, ...]) -> list[np.ndarray]:
        positions = list(np.ndindex(*sizes))
        held = [tuple(-1 for _ in sizes), *positions[:-1]]
        x = [token + weights[f"{name}.target"][i] for i, token in enumerate(tokens)]
        seen = [list(range(i + 1)) for i in range(len(x))]
        return reference_trunk(weights, f"{name}.trunk", x, positions, held, sizes, prior.config.num_heads, seen)

    conditionals = []
    for position, vectors in zip(features("trunk", tokens, tuple(grid)), embedded, strict=True):
        for j, feature in enumerate(features("code_trunk", [position, *np.cumsum(vectors, 0)[:-1]], (d,))):
            conditionals.append(log_softmax(weights[f"logits.{j}.weight"] @ feature))
    return np.array(conditionals)


@pytest.mark.parametrize(("grid", "num_classes"), SHAPES)
def test_conditionals_and_log_prob_are_the_reference_in_numpy(grid: tuple[int, ...], num_classes: int | None) -> None:
    prior = make_depth(num_codes=5, grid=grid, num_classes=num_classes, depth=1).double()
    codes = some_codes(prior, 2)
    for label in [None] if num_classes is None else [None, num_classes - 1]:
        labels = None if label is None else torch.full((2,), label)
        conditionals, log_probs = prior.log_conditionals(codes, labels).flatten(1, -2), prior.log_prob(codes, labels)
        for row, (conditional, log_prob) in enumerate(zip(conditionals.tolist(), log_probs.tolist(), strict=True)):
            flat = codes[row].flatten().tolist()
            expected = reference_conditionals(prior, flat, label)
            assert np.abs(np.array(conditional) - expected).max() < 1e-10
            assert abs(log_prob - expected[np.arange(len(flat)), flat].sum()) < 1e-10


def test_walk_bytes_are_those_of_its_caches() -> None:
    prior = make_depth(num_codes=4, grid=(3, 2, 4), depth=3, code_depth=1)
    # Keys and values, of 3 layers at 6 positions and of 1 layer at 4 codes.
    caches = 2 * (3 * 6 + 1 * 4) * 24 * 4
    # Of each input what a step needs beside them, as much as 16 vectors and the scores of two heads.
    of_a_position, of_a_code = (16 * 24 + 2 * 6) * 4, (16 * 24 + 2 * 4) * 4
    assert prior.walk_bytes(Arithmetic(torch.float32)) == caches + of_a_position + of_a_code
    assert prior.walk_bytes(Arithmetic(torch.float32), 5) == caches + 5 * of_a_position + of_a_code


def test_it_learns_how_codes_hang_together_in_a_position_and_between_positions() -> None:
    """The second code is the first plus one; the first code is the second of the position before."""
    torch.manual_seed(0)
    prior = DepthTransformerPrior(num_codes=4, grid=(4, 2), width=32, depth=1, code_depth=1, num_heads=2)
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    first = torch.arange(64) % 4
    codes = torch.stack([(first[:, None] + torch.arange(4)) % 4, (first[:, None] + torch.arange(4) + 1) % 4], -1)
    for _ in range(150):
        optimiser.zero_grad()
        (-prior(codes).mean()).backward()
        optimiser.step()
    prior.eval()
    conditionals = prior.log_conditionals(codes[:4]).gather(-1, codes[:4, ..., None])[..., 0].flatten(1)
    assert (conditionals[:, 0] - F.log_softmax(torch.zeros(4), 0)).abs().max() < 0.1
    assert conditionals[:, 1:].min() > -0.1
    drawn = prior.sample(8, sampling=Sampling(temperature=0.0), prefix=codes[:8].flatten(1)[:, :1])
    assert torch.equal(drawn, codes[:8])
