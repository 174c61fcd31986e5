"""What forwards gather for the next update: sums, and a sample of the vectors.

Neither is a weight, so neither is a buffer: no checkpoint holds them, and DistributedDataParallel, which overwrites the
buffers of all processes with the first one's before a forward, leaves them alone. Both give the same result however the
vectors of a step were split into batches and processes.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed

# The key of an empty row sorts after every vector's.
EMPTY = torch.iinfo(torch.int64).max


class Sums:
    """Named sums over the vectors of a step, in `dtype` or better; `sums["counts"]` is a tensor to add to."""

    def __init__(self, dtype: torch.dtype, **shapes: tuple[int, ...]):
        self._tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast as a module's tensors are."""
        for name, tensor in self._tensors.items():
            target = fn(tensor)
            self._tensors[name] = tensor.to(target.device, torch.promote_types(target.dtype, tensor.dtype))

    def reduce(self) -> None:
        """Add up those of all processes, in one reduction."""
        if several_processes():
            joint = torch.cat([tensor.reshape(-1) for tensor in self._tensors.values()])
            distributed.all_reduce(joint)
            sizes = [tensor.numel() for tensor in self._tensors.values()]
            for tensor, part in zip(self._tensors.values(), joint.split(sizes), strict=True):
                tensor.copy_(part.reshape(tensor.shape))

    def clear(self) -> None:
        for tensor in self._tensors.values():
            tensor.zero_()


class Pool:
    """A bounded sample of the vectors of a step: at most `size`, of width `dim`.

    Each vector has a key: a hash of its bits and of the step's number. The sample is the vectors of smallest keys, so
    samples merge: that of a union is among the samples of its parts (the bottom-k sketch of Cohen & Kaplan 2007,
    "Summarizing Data Using Bottom-k Sketches"). k-means and revival draw from it in the order of the keys, a fresh
    order at each step. Draws thus need no generator, and two processes that saw half a batch each draw what one process
    that saw all of it would.
    """

    def __init__(self, size: int, dim: int):
        self.vectors = torch.zeros(size, dim, dtype=torch.float32)
        self.keys = torch.full((size,), EMPTY)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move or cast as a module's tensors are; float32 at least."""
        target = fn(self.vectors[:1])
        self.vectors = self.vectors.to(target.device, torch.promote_types(target.dtype, torch.float32))
        self.keys = self.keys.to(target.device)

    def add(self, vectors: Float[Tensor, "n d"], valid: Tensor | None, salt: Int[Tensor, ""]) -> None:
        """Take in vectors; `salt` is the step's number."""
        keys = hash_rows(vectors, salt)
        if valid is not None:
            keys = torch.where(valid, keys, EMPTY)
        keys = torch.cat([self.keys, keys])
        order = keys.argsort(stable=True)[: len(self.keys)]
        self.vectors.copy_(torch.cat([self.vectors, vectors.to(self.vectors.dtype)])[order])
        self.keys.copy_(keys[order])

    def clear(self) -> None:
        self.keys.fill_(EMPTY)

    def joint(self) -> Float[Tensor, "n d"]:
        """The sample of all processes' vectors together, in the order of the keys."""
        return self._gathered(self.vectors, self.keys, len(self.keys))

    def draw(self, num: int) -> Float[Tensor, "num d"]:
        """`num` distinct vectors of all processes', repeated in turn where there are fewer; not for an empty pool."""
        first = self.keys != EMPTY
        first[1:] &= self.keys[1:] != self.keys[:-1]
        sample = self._gathered(self.vectors[first][:num], self.keys[first][:num], num, distinct=True)
        return sample[torch.arange(num, device=sample.device) % len(sample)]

    def _gathered(self, vectors: Tensor, keys: Tensor, num: int, distinct: bool = False) -> Tensor:
        """The `num` rows of smallest keys of all processes'; only gathers, so every process must call it."""
        if several_processes():
            missing = num - len(keys)
            vectors = torch.cat([vectors, vectors.new_zeros(missing, vectors.shape[1])])
            keys = torch.cat([keys, keys.new_full((missing,), EMPTY)])
            everyone = range(distributed.get_world_size())
            all_vectors, all_keys = (
                [torch.empty_like(vectors) for _ in everyone],
                [torch.empty_like(keys) for _ in everyone],
            )
            distributed.all_gather(all_vectors, vectors)
            distributed.all_gather(all_keys, keys)
            vectors, keys = torch.cat(all_vectors), torch.cat(all_keys)
            order = keys.argsort(stable=True)
            vectors, keys = vectors[order], keys[order]
            if distinct:
                first = torch.ones_like(keys, dtype=torch.bool)
                first[1:] = keys[1:] != keys[:-1]
                vectors, keys = vectors[first], keys[first]
        return vectors[keys != EMPTY][:num]


def pool_size(num_codes: int) -> int:
    """Vectors to keep for the k-means start of so many codes: eight a code, within reason."""
    return min(max(8 * num_codes, 1024), max(num_codes, 2**15))


def several_processes() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def hash_rows(vectors: Float[Tensor, "n d"], salt: Int[Tensor, ""]) -> Int[Tensor, " n"]:
    """A non-negative hash of each row's bits: a weighted sum, then the finaliser of SplitMix64 (Steele et al. 2014).

    Equal rows have equal hashes; unequal ones differ but for a chance of about n²/2^63.
    """
    bits = vectors.detach().float().contiguous().view(torch.int32)
    weights = torch.arange(1, 2 * vectors.shape[1], 2, device=vectors.device) * 0x2545F4914F6CDD1D
    keys = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for column, weight in enumerate(weights):  # a product of the whole would hold n x d 64-bit integers
        keys = keys + bits[:, column] * weight
    keys = keys + (salt + 1) * -0x61C8864680B583EB
    keys = (keys ^ (keys >> 30)) * -0x40A7B892E31B1A47
    keys = (keys ^ (keys >> 27)) * -0x6B2FB644ECCEEE15
    return (keys ^ (keys >> 31)) & (EMPTY >> 1)
