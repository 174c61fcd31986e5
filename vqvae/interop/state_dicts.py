"""Which of the weights in a checkpoint are the tokenizer's, and what their names are.

    {"state_dict": {"first_stage_model.encoder.conv_in.weight": ..., "model.diffusion_model. ...": ...}, "epoch": 3}

Trainers put weights under a key of theirs, and names get in front what the tokenizer was a part of (`vqvae.`,
`first_stage_model.`) or wrapped in (`module.`, `_orig_mod.`, anywhere in a name). All formats that are read here have
the weights `ENDS`; what stands before these is the prefix of the tokenizer's names, and whatever has another is not of
the tokenizer. Of averaged weights beside others the averaged are taken; of several tokenizers otherwise none.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safefolder.messages import shown
from safefolder.tensors import WRAPPERS, few, read_safetensors, unwrapped
from vqvae.interop.pickles import read_pickle

ENDS = ("encoder.conv_in.weight", "encoder.conv_in.bias", "decoder.conv_out.weight", "decoder.conv_out.bias")
# How deep weights may lie: a trainer's key, and one for averages or the like.
MOST_KEYS = 2
# Where weights are expected, so that nothing need be said of it.
USUAL = ("", "state_dict", "model")
# Weights of this library, in a file of torch's.
OURS = ("encoder.layers.0.patch.weight", "quantizer.num_updates", "trunk.trunk.blocks.0.attention.qkv.weight")
# Memory that weights may take for each byte of their file: some share a storage.
MOST_SHARED = 2

Tell = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Weights in a checkpoint that are of one tokenizer.

    Attributes:
        state: the whole dict that they are in, under names without the parts that wrappers put there.
        keys: those under which it lies, with points between.
        prefix: of the tokenizer's names in it.
        wrappers: the parts of names that were taken out.
    """

    state: Mapping[Any, Any]
    keys: str
    prefix: str
    wrappers: tuple[str, ...]

    def __str__(self) -> str:
        at = f" under {shown(self.keys)}" if self.keys else ""
        return f"{shown(self.prefix + 'encoder...')}{at}"

    @property
    def is_average(self) -> bool:
        return any("ema" in word.split("_") for word in f"{self.keys}.{self.prefix}".split("."))


def read_checkpoint(path: Path) -> Any:
    """What a checkpoint holds: a pickled file, or one of safetensors. Raises ValueError as their readers."""
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)


def find_weights(held: Any, source: Path, kind: str, tell: Tell | None = None) -> dict[str, Tensor]:
    """The tokenizer's weights in what a checkpoint held, under its own names for them.

    Args:
        source: the file, for errors, and for its size, to which that of the weights is held.
        kind: what has such weights.
        tell: called with a sentence where something was taken off their names, or other weights are left out.

    Raises:
        ValueError: there are none, or several and no telling which, or what is no weight is among them.
    """
    states = [(keys, state, *_without_wrappers(state, source)) for keys, state in _states(held)]
    parts = [
        Part(state=plain, keys=keys, prefix=prefix, wrappers=wrappers)
        for keys, _, plain, wrappers in states
        for prefix in _prefixes(plain)
    ]
    if any(name.endswith(OURS) for _, _, plain, _ in states for name in plain if isinstance(name, str)):
        raise ValueError(
            f"{source} holds weights of a model of this library, which torch.save wrote: there is nothing to import. "
            "Where a run wrote it, its folders codebook and prior are read by VQVAE.from_pretrained and "
            "Prior.from_pretrained; else put them into the model by load_state_dict, and save that by save_pretrained"
        )
    if not parts:
        # What there is tells by its errors what is missing.
        parts = [Part(state=plain, keys=keys, prefix="", wrappers=wrappers) for keys, _, plain, wrappers in states[:1]]
    if not parts:
        raise ValueError(f"{source} has no weights by name, expected {kind}")
    part = _chosen(parts, source)
    weights = {str(name).removeprefix(part.prefix) if part.prefix else name: part.state[name] for name in _of(part)}
    check_weights_of(weights, source, kind)
    _tell(tell, source, part, parts)
    return weights


def check_weights_of(weights: Mapping[Any, Any], source: Path, kind: str) -> None:
    """Raise ValueError for what is no plain tensor under a name, or claims more numbers than the file has of it."""
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()):
        raise ValueError(f"{source} has no weights by name, or something else among them, expected {kind}")
    total = 0
    for name, tensor in weights.items():
        num_bytes = tensor.numel() * tensor.element_size()
        total += num_bytes
        if tensor.layout != torch.strided or num_bytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{source} holds less of {few([name])} than its shape {tuple(tensor.shape)} says")
    if total > MOST_SHARED * (size := source.stat().st_size):
        raise ValueError(f"{source} has weights of {total:,} bytes in a file of {size:,}: they are the same numbers")


def plain_names(weights: Mapping[str, Tensor], source: Path, tell: Tell | None = None) -> dict[str, Tensor]:
    """Weights that are known to be a tokenizer's, without a prefix that all have, and without wrappers' parts."""
    plain, wrappers = _without_wrappers(weights, source)
    prefixes = _prefixes(plain)
    prefix = prefixes[0] if len(prefixes) == 1 and all(name.startswith(prefixes[0]) for name in plain) else ""
    part = Part(state=plain, keys="", prefix=prefix, wrappers=wrappers)
    _tell(tell, source, part, [part])
    return {name.removeprefix(prefix): tensor for name, tensor in plain.items()}


def _states(held: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Dicts with tensors in them, and where they are; each once, those nearer to the top first."""
    level, seen = [(keys, held)], set()
    for _ in range(MOST_KEYS + 1):
        inside = []
        for names, value in level:
            if not isinstance(value, dict) or id(value) in seen:
                continue
            seen.add(id(value))
            if any(isinstance(each, Tensor) for each in value.values()):
                yield ".".join(names), value
            inside += [((*names, str(name)), each) for name, each in value.items() if isinstance(each, dict)]
        level = inside


def _without_wrappers(state: Mapping[Any, Any], source: Path) -> tuple[dict[Any, Any], tuple[str, ...]]:
    plain: dict[Any, Any] = {}
    found: set[str] = set()
    for name, value in state.items():
        new = name
        if isinstance(name, str) and (parts := WRAPPERS.keys() & set(name.split("."))):
            found |= parts
            new = unwrapped(name)
        if new in plain:
            raise ValueError(f"{source} has {few([str(new)])} twice: with and without {' or '.join(sorted(found))}")
        plain[new] = value
    return plain, tuple(sorted(found))


def _prefixes(names: Collection[Any]) -> list[str]:
    """What stands before the names that all formats have, each once."""
    found: dict[str, None] = {}
    for name in names:
        for end in ENDS:
            if isinstance(name, str) and (name == end or name.endswith(f".{end}")):
                found[name.removesuffix(end)] = None
    return list(found)


def _of(part: Part) -> list[Any]:
    """The names that are the tokenizer's: without a prefix all, but for those that another tokenizer's prefix has."""
    if part.prefix:
        return [name for name in part.state if isinstance(name, str) and name.startswith(part.prefix)]
    others = tuple(prefix for prefix in _prefixes(part.state) if prefix)
    return [name for name in part.state if not (isinstance(name, str) and name.startswith(others))]


def _chosen(parts: list[Part], source: Path) -> Part:
    """The one that is meant. Raises ValueError where that cannot be told."""
    left = parts
    for is_meant in (
        lambda part: any(name.startswith(f"{part.prefix}quantize.") for name in part.state if isinstance(name, str)),
        lambda part: "cond_stage_model" not in part.prefix.split("."),
        lambda part: part.is_average,
    ):
        left = [part for part in left if is_meant(part)] or left
    if len(left) > 1:
        raise ValueError(
            f"{source} holds {len(left)} tokenizers, {few([str(part) for part in left], ' and ')}: load it, and save "
            'the weights of the one that you want alone: torch.save({"state_dict": weights}, path)'
        )
    return left[0]


def _tell(tell: Tell | None, source: Path, part: Part, parts: list[Part]) -> None:
    """What was done to find the weights, where that is not plain."""
    said = []
    others = [str(each) for each in parts if each is not part]
    if part.keys not in USUAL or others:
        said.append(f"its weights are taken from {part}" + (f", not from {few(others)}" if others else ""))
    if off := [f"{each}." for each in part.wrappers] + ([part.prefix] if part.prefix else []):
        were = "was" if len(off) == 1 else "were"
        said.append(f"{few([shown(each) for each in off], ' and ')} {were} taken off their names")
    used = set(_of(part))
    if part.prefix and (beside := [name for name in part.state if name not in used]):
        starts = sorted({f"{str(name).split('.', 1)[0]}." for name in beside})
        said.append(f"{len(beside)} others are left out ({few(starts)})")
    if tell is not None and said:
        tell(f"{source}: {'; '.join(said)}")
