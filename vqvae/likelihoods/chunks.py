"""Work on a batch in cache-sized groups of images, and log-probabilities with their gradient made that way.

`score_in_chunks` is how the trained-on families compute `log_prob`. Each image's log-probability depends on its own
features alone, so the gradient can be written down together with the value, a group of images at a time; the backward
pass is then one product.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Score = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`score(images, features, gradient)` returns log-probabilities "n" in nats of a group of images.

`features` come contiguous and in the computing dtype. Where `gradient` is a tensor (of the shape of
`features`, contiguous, uninitialised) it must be filled with d log-probability / d features.
"""


def computing_dtype(features: Tensor) -> torch.dtype:
    """float64 for float64 features, else float32: half precision never reaches a likelihood."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def images_per_group(features: Tensor, elements_per_image: int) -> int:
    """How many images to work on at once, where an image needs tensors of so many elements.

    On a CPU, intermediates of half a MiB a thread: larger ones leave its cache, smaller ones pay
    more for the calls than for the work. Elsewhere the whole batch.
    """
    if features.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, len(features))
    return max(1, torch.get_num_threads() * 131_072 // max(1, elements_per_image))


def rows_per_group(rows: Tensor, elements_per_row: int) -> int:
    """How many rows to work on at once, where a row needs tensors of so many elements.

    As in `images_per_group`; not on a CPU, intermediates of 2^24 elements, 64 or 128 MiB.
    """
    elements = torch.get_num_threads() * 131_072 if rows.device.type == "cpu" else 2**24
    return max(1, elements // max(1, elements_per_row))


def score_in_chunks(score: Score, images: Tensor, features: Tensor, elements_per_image: int) -> Float[Tensor, " b"]:
    """Log-probabilities "b" by `score`, a group of images at a time, with its own gradient.

    Args:
        elements_per_image: the size of the largest intermediate tensor for one image, from which
            the group's size is chosen.
    """
    return _ScoreInChunks.apply(score, images, features, elements_per_image)


class _ScoreInChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Score, images: Tensor, features: Tensor, elements_per_image: int) -> Tensor:
        wanted = ctx.needs_input_grad[2]
        values, ctx.gradients = _score_groups(score, images, features, elements_per_image, wanted)
        ctx.save_for_backward(images, features)
        ctx.score, ctx.elements_per_image = score, elements_per_image
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:  # pyrefly: ignore[bad-override]
        # The first call gives the gradient's memory away, which saves another of that size; only
        # a second one through a retained graph computes it anew.
        images, features = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _score_groups(ctx.score, images, features, ctx.elements_per_image, True)
        return None, None, gradients.mul_(grad[:, None, None, None]).to(features.dtype), None


def _score_groups(
    score: Score, images: Tensor, features: Tensor, elements_per_image: int, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities "b" and, where wanted, their gradients, in the features' memory format."""
    dtype = computing_dtype(features)
    batch = features.shape[0]
    group = images_per_group(features, elements_per_image)
    values = torch.empty(batch, dtype=dtype, device=features.device)
    gradients = torch.empty_like(features, dtype=dtype) if wanted else None
    for start in range(0, batch, group):
        rows = slice(start, start + group)
        chunk = features[rows].to(dtype, memory_format=torch.contiguous_format)
        if gradients is None:
            values[rows] = score(images[rows], chunk, None)
        elif gradients.is_contiguous():
            values[rows] = score(images[rows], chunk, gradients[rows])
        else:
            gradient = torch.empty_like(chunk)
            values[rows] = score(images[rows], chunk, gradient)
            gradients[rows] = gradient
    return values, gradients
