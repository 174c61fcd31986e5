"""A `LlamaPrior` as a folder that Hugging Face's transformers and vLLM read, and such folders as priors.

Tokens are the K codes, 0 .. K-1; K, which begins a grid without a label; and K+1+label, which begins one of a class.
config.json says what `LlamaForCausalLM` reads and, in keys that it keeps and ignores, the grid: `code_grid`,
`num_codes` and `num_classes`. There is no tokenizer, and no end: a grid is as many tokens as it has positions.

Weights go over as they are, with three exceptions:

- pairs of a head that a rotation rotary are neighbours here and half a head apart there: rows change their order;
- scales of norms, ones in what is written, are read into the columns of the maps behind the norm;
- tokens that begin a grid have logits there. Theirs is the mean of the codes' logits, so that each is at most as likely
  as a code on average (Jensen's inequality) should a server not be told to leave them out; between codes nothing
  changes.

A norm that adds another epsilon e than 1e-6 is one of 1e-6 over a residual stream sqrt(1e-6 / e) times as large, and is
read as that. Key heads that several query heads share are repeated.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from einops import rearrange, repeat
from torch import Tensor

import safefolder
from priors.grid import GridModel
from priors.llama import LlamaPrior
from priors.llama_card import EPSILON, generation_of, llama_config, readme_of
from priors.trunk import gated_width
from safefolder.files import replacing_folder
from safefolder.tensors import (
    MOST_CONFIG_BYTES,
    few,
    in_short,
    index_of,
    is_file,
    read_json,
    read_tensors,
    shown,
    unwrapped,
    wrapped_by,
)

CONFIG, WEIGHTS = "config.json", "model.safetensors"
# What is written; a README.md among it, so that an edited one is replaced.
_FILES = (CONFIG, "generation_config.json", WEIGHTS, "README.md")
# What is read, for a download.
PATTERNS = (CONFIG, WEIGHTS, index_of(WEIGHTS), "model-?????-of-?????.safetensors")
# Weights tell nothing of the grid.
MOST_AXES = 8
# Below it a norm's epsilon would be a residual stream of more than float32 holds.
LEAST_EPSILON = 1e-12
MOST_ROPE_BASE = 1e30

# What of a config must be so, as a Llama without it is another model; the first is what it is if nothing is said.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}


def save_llama(prior: GridModel, folder: str | Path) -> None:
    """Write a prior as a folder of `LlamaForCausalLM`; one that is there is replaced, if it holds these files only.

    It holds config.json, generation_config.json, model.safetensors and a README.md with how to sample from it. What
    training alone uses (dropout and the like) is not kept: `save_pretrained` keeps it.
    Raises ValueError for a prior that is no Llama, and where the folder cannot be written or has something else in it.
    """
    if not isinstance(prior, LlamaPrior):
        raise ValueError(
            f"got a {type(prior).__name__}, expected a LlamaPrior, as others compute other things with their weights; "
            "train a prior that is one: vqvae train --stage prior --prior-kind Llama"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _to_llama(prior).items()}
    with replacing_folder(folder, _FILES, _is_theirs) as scratch:
        for name, content in (("config", llama_config(prior)), ("generation_config", generation_of(prior))):
            (scratch / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        (scratch / "README.md").write_text(readme_of(prior), encoding="utf-8")
        # transformers asks which library's tensors they are.
        safetensors.torch.save_file(tensors, scratch / WEIGHTS, metadata={"format": "pt"})


def is_llama(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a Llama: whether `load_llama` is what reads it, or says why it cannot."""
    architectures = config.get("architectures")
    return config.get("model_type") == "llama" or (
        isinstance(architectures, list) and "LlamaForCausalLM" in architectures
    )


def _is_theirs(folder: Path) -> bool:
    try:
        return is_llama(read_json(folder / CONFIG, most_bytes=MOST_CONFIG_BYTES))
    except ValueError:
        return False


def load_llama(
    folder: str | Path,
    grid: Sequence[int] | None = None,
    num_codes: int | None = None,
    num_classes: int | None = None,
) -> LlamaPrior:
    """Read a prior from a folder of `LlamaForCausalLM` that holds safetensors, in one file or several.

    It comes in evaluation mode, on the CPU, in float32 or, where the weights are, in float64. Its log-probabilities are
    those of the codes alone, i.e. of the model with all other tokens left out.

    Args:
        grid, num_codes, num_classes: for a folder whose config.json does not say them. Its tokens must be the codes,
            one that begins a grid without a label, and one for each class; what comes after those is left out.
    Raises ValueError where there is no such model, or one that a LlamaPrior cannot be.
    """
    folder = Path(folder)
    if not is_file(folder / CONFIG):
        raise ValueError(
            f"{folder} has no {CONFIG}: expected a folder of transformers' save_pretrained"
            if folder.is_dir()
            else f"no model folder at {folder}"
        )
    config = read_json(folder / CONFIG, most_bytes=MOST_CONFIG_BYTES)
    given = {"code_grid": grid, "num_codes": num_codes, "num_classes": num_classes}
    try:
        _check_design(config)
        shape = _vocabulary(config, given)
        width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
        mlp_width = _size(config, "intermediate_size")
        sizes = LlamaPrior.Config(
            **shape,
            width=width,
            depth=_size(config, "num_hidden_layers"),
            num_heads=heads,
            mlp_width=None if mlp_width == gated_width(width) else mlp_width,
            rope_base=_rope_base(config),
        )
        key_heads = _size(config, "num_key_value_heads", heads)
        if heads % key_heads:
            raise ValueError(
                f"got num_attention_heads={shown(heads)} for num_key_value_heads={shown(key_heads)}, expected a "
                "multiple"
            )
        if (head_dim := config.get("head_dim")) not in (None, width // heads):
            raise ValueError(
                f"got head_dim={shown(head_dim)}, expected hidden_size / num_attention_heads, {shown(width // heads)}"
            )
        epsilon = config.get("rms_norm_eps", EPSILON)
        if not isinstance(epsilon, int | float) or not LEAST_EPSILON <= epsilon < 1:
            raise ValueError(f"got rms_norm_eps={shown(epsilon)}, expected a number in [{LEAST_EPSILON}, 1)")
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{folder / CONFIG}: {in_short(error)}") from error
    tensors = _read_tensors(folder)
    vocabulary = _size(config, "vocab_size")
    try:
        _check_tensors(tensors, sizes, key_heads, vocabulary, bool(config.get("tie_word_embeddings")))
    except (ValueError, RuntimeError, ArithmeticError, TypeError, MemoryError) as error:
        raise ValueError(f"{folder}: the weights do not fit config.json: {in_short(error)}") from error
    # A fresh start is drawn and thrown away: the caller's random numbers stay as they were.
    with torch.random.fork_rng(devices=[]):
        prior = sizes.build()
    own = _from_llama(tensors, sizes, key_heads, math.sqrt(EPSILON / epsilon))
    prior.to(next(iter(own.values())).dtype)
    safefolder.folder.load_weights(prior, own, folder)
    return prior.eval()


# ---- weights


def _to_llama(prior: LlamaPrior) -> dict[str, Tensor]:
    """Weights in Hugging Face's names."""
    heads, width = prior.config.num_heads, prior.config.width
    start, code, logits = prior.start.embedding.weight, prior.code.weight, prior.logits.weight
    # A wider type for the mean than the weights may have.
    others = logits.double().mean(0).to(logits.dtype).expand(len(start), -1)
    ones = torch.ones(width, dtype=code.dtype)
    made = {
        "model.embed_tokens.weight": torch.cat((code, start[-1:], start[:-1])),
        "model.norm.weight": ones,
        "lm_head.weight": torch.cat((logits, others)),
    }
    for i, block in enumerate(prior.trunk.trunk.blocks):
        queries, keys, values = block.attention.qkv.weight.chunk(3)
        gate, up = block.mlp.gate_and_value.weight.chunk(2)
        made |= {
            f"model.layers.{i}.self_attn.q_proj.weight": _halves(queries, heads),
            f"model.layers.{i}.self_attn.k_proj.weight": _halves(keys, heads),
            f"model.layers.{i}.self_attn.v_proj.weight": values,
            f"model.layers.{i}.self_attn.o_proj.weight": block.attention.out.weight,
            f"model.layers.{i}.mlp.gate_proj.weight": gate,
            f"model.layers.{i}.mlp.up_proj.weight": up,
            f"model.layers.{i}.mlp.down_proj.weight": block.mlp.out.weight,
            f"model.layers.{i}.input_layernorm.weight": ones.clone(),
            f"model.layers.{i}.post_attention_layernorm.weight": ones.clone(),
        }
    return made


def _from_llama(
    tensors: Mapping[str, Tensor], sizes: LlamaPrior.Config, key_heads: int, stream: float
) -> dict[str, Tensor]:
    """Weights in our names, of a residual stream that is `stream` times as large."""
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors.values()) else torch.float32
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    codes, classes = sizes.num_codes, sizes.num_classes or 0
    embedding = wide["model.embed_tokens.weight"]
    made = {
        "code.weight": embedding[:codes] * stream,
        "start.embedding.weight": embedding[codes : codes + 1 + classes].roll(-1, 0) * stream,
        "logits.weight": wide.get("lm_head.weight", embedding)[:codes] * wide["model.norm.weight"],
    }
    for i in range(sizes.depth):
        there, here = f"model.layers.{i}", f"trunk.trunk.blocks.{i}"
        queries, keys, values = (wide[f"{there}.self_attn.{name}_proj.weight"] for name in "qkv")
        keys, values = (
            repeat(each, "(h d) w -> (h r d) w", h=key_heads, r=sizes.num_heads // key_heads) for each in (keys, values)
        )
        qkv = torch.cat((_neighbours(queries, sizes.num_heads), _neighbours(keys, sizes.num_heads), values))
        gates = torch.cat([wide[f"{there}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
        made |= {
            f"{here}.attention.qkv.weight": qkv * wide[f"{there}.input_layernorm.weight"],
            f"{here}.attention.out.weight": wide[f"{there}.self_attn.o_proj.weight"] * stream,
            f"{here}.mlp.gate_and_value.weight": gates * wide[f"{there}.post_attention_layernorm.weight"],
            f"{here}.mlp.out.weight": wide[f"{there}.mlp.down_proj.weight"] * stream,
        }
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def _halves(weight: Tensor, heads: int) -> Tensor:
    return rearrange(weight, "(h pairs two) w -> (h two pairs) w", h=heads, two=2)


def _neighbours(weight: Tensor, heads: int) -> Tensor:
    return rearrange(weight, "(h two pairs) w -> (h pairs two) w", h=heads, two=2)


# ---- what is read


def _check_design(config: Mapping[str, Any]) -> None:
    if "model_type" not in config and "class" in config:
        kind = config["class"] if isinstance(config["class"], str) else shown(config["class"])
        raise ValueError(f"got a saved {few([kind])} of this library, which Prior.from_pretrained reads")
    if config.get("model_type") != "llama":
        raise ValueError(f"got a model of type {shown(config.get('model_type'))}, expected 'llama'")
    if (architectures := config.get("architectures")) not in (None, ["LlamaForCausalLM"]):
        raise ValueError(f"got architectures {shown(architectures)}, expected LlamaForCausalLM")
    for name, expected in _ONLY.items():
        if (value := config.get(name, expected[0])) not in expected:
            raise ValueError(f"got {name}={shown(value)}, expected {expected[0]!r}: a LlamaPrior has nothing else")


def _rope_base(config: Mapping[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"got rope_parameters={shown(rope)}, expected names and values")
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ValueError(f"got rotary positions of type {shown(kind)}, expected 'default'")
    if (share := rope.get("partial_rotary_factor", 1)) != 1:
        raise ValueError(f"got partial_rotary_factor={shown(share)}, expected 1")
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if isinstance(base, int | float) and base > MOST_ROPE_BASE:
        raise ValueError(f"got rope_theta={shown(base)}, expected at most {MOST_ROPE_BASE}")
    return base


def _vocabulary(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a LlamaPrior.Config: what config.json says, and where it says nothing what was given."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        value = list(value) if isinstance(value, tuple) else value
        known = config.get(name)
        if value is not None and known is not None and value != known:
            raise ValueError(f"it says {name}={shown(known)}, got {shown(value)}; leave it out")
        found[name.removeprefix("code_")] = known if known is not None else value
    axes = found["grid"]
    if isinstance(axes, list) and len(axes) > MOST_AXES:
        raise ValueError(f"got grid={shown(axes)}, expected at most {MOST_AXES} axes")
    if missing := [name for name in ("grid", "num_codes") if found[name] is None]:
        raise ValueError(
            f"it does not say {' and '.join(missing)}, expected as arguments: load_llama(folder, grid=...)"
        )
    if isinstance(found["num_codes"], int) and isinstance(found["num_classes"] or 0, int):
        needed = found["num_codes"] + 1 + (found["num_classes"] or 0)
        if _size(config, "vocab_size") < needed:
            raise ValueError(
                f"got vocab_size={config['vocab_size']}, expected {shown(needed)} or more: {shown(found['num_codes'])} "
                f"codes, one that begins a grid without a label, and {shown(found['num_classes'] or 0)} classes"
            )
    return found


def _size(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"got {name}={shown(value)}, expected an integer >= 1")
    return value


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if not any(is_file(folder / name) for name in (WEIGHTS, index_of(WEIGHTS))):
        raise ValueError(f"{folder} has no {WEIGHTS} and no index of one, expected weights as safetensors")
    tensors = read_tensors(folder, WEIGHTS)
    # Old versions kept angles, which follow from the base.
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _check_tensors(
    tensors: dict[str, Tensor], sizes: LlamaPrior.Config, key_heads: int, vocabulary: int, tied: bool
) -> None:
    """ValueError unless they are those of a Llama of these sizes, of which none is built before with memory."""
    if reason := wrapped_by({unwrapped(name) for name in tensors}, tensors):
        raise ValueError(reason)
    layers = {m[1] for name in tensors if (m := re.match(r"model\.layers\.(\d+)\.", name))}
    if sizes.depth > len(layers):
        lacking = next(number for number in range(len(layers) + 1) if str(number) not in layers)
        raise ValueError(f"missing model.layers.{lacking} of {shown(sizes.depth)}")
    with torch.device("meta"):
        prior = replace(sizes, depth=1).build()
        first = {name: tuple(tensor.shape) for name, tensor in _to_llama(prior).items()}
    expected = {
        name.replace(".layers.0.", f".layers.{i}."): shape
        for name, shape in first.items()
        for i in range(sizes.depth if ".layers.0." in name else 1)
    }
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected[name] = (vocabulary, sizes.width)
    for name in expected:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            expected[name] = (key_heads * prior.trunk.trunk.head_width, sizes.width)
    if tied and "lm_head.weight" not in tensors:
        del expected["lm_head.weight"]
    elif tied and not torch.equal(tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight", torch.empty(0))):
        raise ValueError("got tie_word_embeddings=true with an lm_head.weight that differs from the embeddings")
    for problem, names in (
        ("missing", expected.keys() - tensors.keys()),
        ("unknown", tensors.keys() - expected.keys()),
    ):
        if names:
            raise ValueError(f"{problem} {few(sorted(names))}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} is {shown(tuple(tensors[name].shape))}, expected {shown(shape)}")
        if not tensors[name].dtype.is_floating_point:
            raise ValueError(f"{name} is of {tensors[name].dtype}, expected floating point")
