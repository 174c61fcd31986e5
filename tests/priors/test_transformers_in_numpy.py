"""Transformers over codes against their equations in NumPy, by loops over positions, heads and keys."""

import itertools
import math

import numpy as np
import pytest
from prior_worlds import make_depth, make_next_scale, make_transformer, some_codes

from priors import DepthTransformerPrior, NextScalePrior, Prior, TransformerPrior

Position = tuple[float, ...]
Weights = dict[str, np.ndarray]


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - x.max() - math.log(np.exp(x - x.max()).sum())


def rms_norm(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt((x**2).mean() + 1e-6)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


def rotated(head: np.ndarray, position: Position, lengths: tuple[int, ...]) -> np.ndarray:
    """One head's vector with each pair of neighbours rotated by the position's angles."""
    pairs, rotated, at = len(head) // 2, np.empty_like(head), 0
    for axis, size in enumerate(lengths):
        share = pairs // len(lengths) + (1 if axis < pairs % len(lengths) else 0)
        for j in range(share):
            number = complex(head[2 * at], head[2 * at + 1])
            number *= np.exp(1j * position[axis] / max(100, size) ** (j / share))
            rotated[2 * at], rotated[2 * at + 1] = number.real, number.imag
            at += 1
    assert at == pairs
    return rotated


def reference_trunk(
    weights: Weights,
    name: str,
    x: list[np.ndarray],
    queries: list[Position],
    keys: list[Position],
    lengths: tuple[int, ...],
    num_heads: int,
    seen: list[list[int]],
) -> list[np.ndarray]:
    """Features of the inputs `x`, from the weights whose names begin with `name`.

    Args:
        queries, keys: where the query and the key of each input stand.
        seen: for each input, those that it sees.
    """
    width, layer = len(x[0]) // num_heads, 0
    while f"{name}.blocks.{layer}.attention.qkv.weight" in weights:
        block = f"{name}.blocks.{layer}"
        qkv = [np.split(weights[f"{block}.attention.qkv.weight"] @ rms_norm(token), 3) for token in x]
        mixed = []
        for i in range(len(x)):
            heads = []
            for h in range(num_heads):
                part = slice(h * width, (h + 1) * width)
                query = rotated(layer_norm(qkv[i][0][part]), queries[i], lengths)
                scores = [query @ rotated(layer_norm(qkv[j][1][part]), keys[j], lengths) for j in seen[i]]
                shares = np.exp(log_softmax(np.array(scores) / math.sqrt(width)))
                heads.append(sum(share * qkv[j][2][part] for share, j in zip(shares, seen[i], strict=True)))
            mixed.append(weights[f"{block}.attention.out.weight"] @ np.concatenate(heads))
        x = [token + change for token, change in zip(x, mixed, strict=True)]
        for i, token in enumerate(x):
            gate, value = np.split(weights[f"{block}.mlp.gate_and_value.weight"] @ rms_norm(token), 2)
            x[i] = token + weights[f"{block}.mlp.out.weight"] @ (gate / (1 + np.exp(-gate)) * value)
        layer += 1
    return [rms_norm(token) for token in x]


def of_transformer(prior: TransformerPrior, codes: list[int], label: int | None) -> np.ndarray:
    """ln P(. | before) at each position of one grid, "n k"."""
    weights = {name: t.detach().numpy() for name, t in prior.state_dict().items()}
    positions = list(np.ndindex(*prior.grid))
    held = [tuple(-1 for _ in prior.grid), *positions[:-1]]  # the position whose code each input token holds
    label = len(weights["start.embedding.weight"]) - 1 if label is None else label
    tokens = [weights["start.embedding.weight"][label], *(weights["code.weight"][code] for code in codes[:-1])]
    x = [token + weights["trunk.target"][i] for i, token in enumerate(tokens)]
    seen = [list(range(i + 1)) for i in range(len(x))]
    heads = prior.config.num_heads
    features = reference_trunk(weights, "trunk.trunk", x, positions, held, prior.grid, heads, seen)
    return np.array([log_softmax(weights["logits.weight"] @ feature) for feature in features])


def of_depth(prior: DepthTransformerPrior, codes: list[int], label: int | None) -> np.ndarray:
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


def bicubic(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture "s s w" at size x size: Keys' kernel with a = -0.75 along each axis, borders repeated."""

    def kernel(x: float) -> float:
        x, a = abs(x), -0.75
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    side, out = len(picture), np.zeros((size, size, picture.shape[2]))
    for i, j in np.ndindex(size, size):
        y, x = ((at + 0.5) * side / size - 0.5 for at in (i, j))
        for k, m in itertools.product(range(-1, 3), repeat=2):
            row, column = math.floor(y) + k, math.floor(x) + m
            clamped = picture[min(max(row, 0), side - 1), min(max(column, 0), side - 1)]
            out[i, j] += kernel(y - row) * kernel(x - column) * clamped
    return out


def averaged(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture "s s w" at size x size: the mean of the positions that each touches."""
    side, out = len(picture), np.zeros((size, size, picture.shape[2]))
    for i, j in np.ndindex(size, size):
        rows, columns = (slice(at * side // size, -(-(at + 1) * side // size)) for at in (i, j))
        out[i, j] = picture[rows, columns].mean((0, 1))
    return out


def of_next_scale(prior: NextScalePrior, codes: list[int], label: int | None) -> np.ndarray:
    """ln P(. | coarser scales) at each position of one row of codes, "n k"."""
    weights = {name: t.detach().numpy() for name, t in prior.state_dict().items()}
    finest = prior.scales[-1]
    label = len(weights["start.embedding.weight"]) - 1 if label is None else label
    total = np.zeros((finest, finest, prior.config.width))
    x, positions, seen, begin = [], [], [], 0
    for level, scale in enumerate(prior.scales):
        end = begin + scale**2
        start = weights["start.embedding.weight"][label]
        inputs = averaged(total, scale).reshape(scale**2, -1) if level else [start] * scale**2
        for i, (row, column) in enumerate(np.ndindex(scale, scale)):
            x.append(inputs[i] + weights["target"][begin + i] + weights["scale"][level])
            positions.append(tuple((at + 0.5) * finest / scale - 0.5 for at in (row, column)))
            seen.append(list(range(end)))
        total += bicubic(weights["code.weight"][codes[begin:end]].reshape(scale, scale, -1), finest)
        begin = end
    heads = prior.config.num_heads
    features = reference_trunk(weights, "trunk", x, positions, positions, (finest, finest), heads, seen)
    return np.array([log_softmax(weights["logits.weight"] @ feature) for feature in features])


WORLDS = [
    *((of_transformer, make_transformer, {"grid": grid}) for grid in ((3, 4), (6,), (1, 1))),
    (of_transformer, make_transformer, {"grid": (2, 2, 3), "num_classes": 2}),
    *((of_depth, make_depth, {"grid": grid}) for grid in ((2, 3, 3), (3, 2), (1, 4), (2, 1, 2, 2))),
    *((of_depth, make_depth, {"grid": grid, "num_classes": 2}) for grid in ((2, 3, 2), (2, 2, 1))),
    *((of_next_scale, make_next_scale, {"scales": scales}) for scales in ((1, 2, 3), (2, 5))),
    *((of_next_scale, make_next_scale, {"scales": scales, "num_classes": 3}) for scales in ((3,), (1, 2, 4))),
]


@pytest.mark.parametrize(("reference", "make", "sizes"), WORLDS)
def test_conditionals_and_log_prob_are_the_reference(reference: object, make: object, sizes: dict) -> None:
    depth = 2 if make is make_transformer else 1
    prior: Prior = make(num_codes=5, depth=depth, **sizes).double()
    codes = some_codes(prior, 2)
    for label in [None] if prior.num_classes is None else [None, 0, prior.num_classes - 1]:
        conditionals, log_probs = prior.log_conditionals(codes, label).flatten(1, -2), prior.log_prob(codes, label)
        for row, flat in enumerate(codes.flatten(1).tolist()):
            expected = reference(prior, flat, label)
            assert np.abs(conditionals[row].detach().numpy() - expected).max() < 1e-10
            assert abs(log_probs[row].item() - expected[np.arange(len(flat)), flat].sum()) < 1e-10
