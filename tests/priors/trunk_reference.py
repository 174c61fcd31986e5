"""The trunk of `priors.trunk` in NumPy, by loops over positions, heads and keys."""

import math

import numpy as np

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
