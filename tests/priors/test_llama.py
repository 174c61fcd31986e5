"""LlamaPrior against transformers' LlamaForCausalLM: the same weights are the same model, in both directions."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from prior_worlds import CONTINUOUS, KINDS, make_llama, make_transformer, seeded
from safetensors.torch import load_file, save_file
from torch import Tensor

from priors import LlamaPrior, Sampling
from priors.llama_folder import load_llama, save_llama

NUM_CODES, GRID, POSITIONS, CLASSES = 11, (3, 4), 12, 3


def prior_of(**sizes: Any) -> LlamaPrior:
    return make_llama(**{"num_codes": NUM_CODES, "grid": GRID, "num_classes": CLASSES, "rope_base": 50.0, **sizes})


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewrite(folder: Path, **changed: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**read(folder), **changed}))


def theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The folder by transformers, as anyone would load it."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert not any(info.values()), info
    return model.eval()


def some_codes() -> Tensor:
    return torch.randint(NUM_CODES, (5, *GRID), generator=seeded())


def tokens_of(codes: Tensor, labels: Tensor | None) -> Tensor:
    """What a Llama reads to score codes: where they begin, and all but the last."""
    start = torch.full((len(codes),), NUM_CODES) if labels is None else NUM_CODES + 1 + labels
    return torch.cat((start[:, None], codes.flatten(1)[:, :-1]), 1)


@torch.no_grad()
def their_conditionals(model: Any, codes: Tensor, labels: Tensor | None) -> Tensor:
    logits = model(input_ids=tokens_of(codes, labels)).logits
    return logits[..., :NUM_CODES].log_softmax(-1).view(*codes.shape, NUM_CODES)


# ---- what transformers makes of ours


@pytest.mark.parametrize(
    ("num_classes", "labelled", "dtype"),
    [(None, False, torch.float32), (CLASSES, False, torch.float32), (CLASSES, True, torch.float64)],
)
@torch.no_grad()
def test_logits_are_those_of_transformers(
    num_classes: int | None, labelled: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    sizes = {"mlp_width": 40, "width": 48, "num_heads": 6, "depth": 3} if labelled else {}
    prior = prior_of(num_classes=num_classes, **sizes).to(dtype)
    save_llama(prior, tmp_path / "llama")
    model, codes = theirs(tmp_path / "llama", dtype), some_codes()
    labels = torch.arange(5) % CLASSES if labelled else None
    logits = model(input_ids=tokens_of(codes, labels)).logits
    assert logits.shape == (5, POSITIONS, NUM_CODES + 1 + (num_classes or 0))
    assert logits.std() > 0.5  # far from those of fresh weights
    # A token that begins a grid is nowhere likelier than a code on average.
    mean = logits[..., :NUM_CODES].mean(-1, keepdim=True)
    torch.testing.assert_close(logits[..., NUM_CODES:], mean.expand_as(logits[..., NUM_CODES:]), atol=1e-4, rtol=0)
    tolerance = 1e-5 if dtype == torch.float64 else 1e-4  # their angles are in float32
    conditionals = their_conditionals(model, codes, labels)
    torch.testing.assert_close(conditionals, prior.log_conditionals(codes, labels), atol=tolerance, rtol=0)


def test_greedy_grids_are_theirs(tmp_path: Path) -> None:
    prior = prior_of()
    save_llama(prior, tmp_path / "llama")
    model = theirs(tmp_path / "llama")
    labels = torch.tensor([0, 1, 2, 1])
    greedy = Sampling(temperature=0.0, precision="float32")
    for start, own in (
        (NUM_CODES + 1 + labels, prior.sample(4, labels, greedy)),
        (torch.full((2,), NUM_CODES), prior.sample(2, None, greedy)),
    ):
        start = start[:, None]
        drawn = model.generate(start, attention_mask=torch.ones_like(start), do_sample=False)
        assert drawn.shape == (len(start), 1 + POSITIONS)
        assert torch.equal(drawn[:, 1:].view(-1, *GRID), own)
        # No token of a prompt is taken for padding.
        assert torch.equal(model.generate(start, do_sample=False), drawn)
    assert len(torch.unique(own)) > 1


def test_generation_draws_codes_alone_as_often_as_the_prior(tmp_path: Path) -> None:
    prior = prior_of(num_codes=3, grid=(2,), num_classes=2)
    save_llama(prior, tmp_path / "llama")
    model = theirs(tmp_path / "llama")
    start, num = torch.full((4000, 1), 3 + 1 + 1), 4000
    # Without being left out they would be drawn: a third of what there is begins a grid.
    shares = model(input_ids=start[:1]).logits[0, -1].detach().softmax(-1)
    assert shares[3:].sum() > 0.1
    torch.manual_seed(0)
    drawn = model.generate(start, attention_mask=torch.ones_like(start))[:, 1:]
    assert drawn.shape == (num, 2)
    assert drawn.max() < 3
    world = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    expected = prior.log_prob(world, torch.ones(9, dtype=torch.int64)).exp().detach()
    found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9) / num
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / num).sqrt() + 1e-3).all()
    assert expected.max() > 0.2


@pytest.mark.slow
def test_the_readme_says_what_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    here = tmp_path / "llama"
    save_llama(prior_of(), here)
    text = (here / "README.md").read_text()
    ours, vllm = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = f"{ours}\nassert codes.shape == (4, 3, 4) and codes.max() < {NUM_CODES}, codes"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=here, env=environment, check=True, capture_output=True)
    compile(vllm, "vllm", "exec")
    assert f"list(range({NUM_CODES}))" in vllm


def test_the_folder_says_what_readers_of_any_age_read(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    save_llama(prior_of(), tmp_path / "llama")
    files = {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in (tmp_path / "llama").iterdir()} == files
    assert "12 to 14: 11 + 1 + label" in (tmp_path / "llama" / "README.md").read_text()
    config = read(tmp_path / "llama")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50.0
    assert config["dtype"] == config["torch_dtype"] == "float32"
    # One that knows only the newer, or only the older names.
    for kept in ("rope_parameters", "rope_theta"):
        known = {name: value for name, value in config.items() if not name.startswith("rope") or name == kept}
        read_back = transformers.LlamaConfig(**known)
        assert read_back.rope_parameters["rope_theta"] == 50.0
    read_back = transformers.AutoConfig.from_pretrained(tmp_path / "llama")
    assert (read_back.bos_token_id, read_back.eos_token_id, read_back.vocab_size) == (11, None, 15)
    assert (read_back.code_grid, read_back.num_codes, read_back.num_classes) == ([3, 4], 11, 3)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "llama")
    generation.validate(strict=True)
    assert generation.suppress_tokens == [11, 12, 13, 14]
    assert (generation.max_new_tokens, generation.eos_token_id) == (POSITIONS, None)


# ---- what we make of theirs


@pytest.mark.parametrize(
    ("changes", "shards"),
    [
        ({}, True),
        ({"num_key_value_heads": 2}, False),
        ({"num_key_value_heads": 1, "rms_norm_eps": 1e-2}, True),
        ({"tie_word_embeddings": True, "rms_norm_eps": 1e-2}, False),
        ({"intermediate_size": 64, "vocab_size": 32}, False),
    ],
)
def test_folders_by_transformers_are_priors(changes: dict[str, Any], shards: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 15, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2} | changes
    sizes = {"intermediate_size": 40, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}} | sizes
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Scales of norms are of either sign; nothing is near what it starts at.
            weight.copy_(torch.randn_like(weight) * (1.0 if "norm" in name else 0.3))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == shards
    torch.manual_seed(5)
    prior = load_llama(tmp_path / "theirs", grid=GRID, num_codes=NUM_CODES, num_classes=CLASSES)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert not prior.training
    codes = some_codes()
    for labels in (None, torch.arange(5) % CLASSES):
        expected = their_conditionals(model, codes, labels)
        assert expected.std() > 0.5
        torch.testing.assert_close(prior.log_conditionals(codes, labels).detach(), expected, atol=2e-4, rtol=0)
    # And they go back as what they are.
    save_llama(prior, tmp_path / "again")
    again = their_conditionals(theirs(tmp_path / "again"), codes, None)
    torch.testing.assert_close(again, their_conditionals(model, codes, None), atol=2e-4, rtol=0)


def test_ours_changed_by_transformers_comes_back(tmp_path: Path) -> None:
    save_llama(prior_of(), tmp_path / "llama")
    model, codes, labels = theirs(tmp_path / "llama"), some_codes(), torch.arange(5) % CLASSES
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-1, 2, 24))
    model.save_pretrained(tmp_path / "changed")
    changed = load_llama(tmp_path / "changed")  # the grid is still said
    assert (changed.grid, changed.num_codes, changed.num_classes) == (GRID, NUM_CODES, CLASSES)
    conditionals = changed.log_conditionals(codes, labels).detach()
    torch.testing.assert_close(conditionals, their_conditionals(model, codes, labels), atol=1e-4, rtol=0)


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    save_llama(prior_of().bfloat16(), tmp_path / "llama")
    assert load_file(tmp_path / "llama" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    prior = load_llama(tmp_path / "llama")
    assert prior.logits.weight.dtype == torch.float32
    conditionals = their_conditionals(theirs(tmp_path / "llama"), some_codes(), None)
    torch.testing.assert_close(prior.log_conditionals(some_codes()).detach(), conditionals, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "num_classes"), [(torch.float32, None), (torch.float64, CLASSES)])
def test_saved_loaded_and_saved_again_is_bit_equal(dtype: torch.dtype, num_classes: int | None, tmp_path: Path) -> None:
    prior = prior_of(num_classes=num_classes, mlp_width=None if num_classes else 40).to(dtype)
    save_llama(prior, tmp_path / "first")
    again = load_llama(str(tmp_path / "first"))
    assert again.config == prior.config
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in prior.state_dict().items())
    save_llama(again, tmp_path / "second")
    save_llama(again, tmp_path / "second")  # over one that is there
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


# ---- what is refused


@pytest.mark.parametrize("kind", ["transformer", "mixture"])
def test_other_kinds_are_refused_with_what_to_do(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]() if kind in KINDS else CONTINUOUS[kind](dim=2, grid=(2,))
    with pytest.raises(ValueError, match=rf"got a {type(model).__name__}, .* --stage prior --prior-kind Llama"):
        save_llama(model, tmp_path / "llama")
    assert not (tmp_path / "llama").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "got a model of type 'mistral', expected 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "expected LlamaForCausalLM"),
        ({"attention_bias": True}, "got attention_bias=True, expected False"),
        ({"hidden_act": "gelu"}, "got hidden_act='gelu', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "got quantization_config="),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "of type 'llama3', expected 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "of type 'linear'"),
        ({"rope_parameters": {"rope_theta": -1}}, "got rope_base=-1"),
        ({"rope_parameters": [1]}, "got rope_parameters="),
        ({"partial_rotary_factor": 0.5}, "got partial_rotary_factor=0.5"),
        ({"head_dim": 8}, "got head_dim=8, expected hidden_size / num_attention_heads, 12"),
        ({"num_key_value_heads": 3}, "got num_attention_heads=2 for num_key_value_heads=3"),
        ({"rms_norm_eps": 0}, "got rms_norm_eps=0"),
        ({"hidden_size": "24"}, "got hidden_size='24', expected an integer"),
        ({"hidden_size": None}, "got hidden_size=None"),
        ({"num_codes": 14}, "got vocab_size=15, expected 18 or more: 14 codes"),
        ({"code_grid": None}, "it does not say grid, expected as arguments"),
        ({"code_grid": [3, -4]}, "got a grid size=-4"),
        ({"num_codes": "many"}, "got num_codes='many'"),
        ({"num_hidden_layers": 3}, "missing model.layers.2"),
        ({"num_hidden_layers": 1}, "unknown model.layers.1"),
        ({"intermediate_size": 10**30}, "the weights do not fit config.json"),
        ({"vocab_size": 16}, r"model.embed_tokens.weight is \(15, 24\), expected \(16, 24\)"),
        ({"num_key_value_heads": 1}, r"k_proj.weight is \(24, 24\), expected \(12, 24\)"),
        ({"tie_word_embeddings": True}, "lm_head.weight that differs"),
        ({"hidden_size": 2 * 10**12, "num_attention_heads": 10**12, "head_dim": 2}, "do not fit config.json"),
        ({"num_classes": -1}, "got num_classes=-1"),
        ({"code_grid": [9] * 10**5}, "expected at most 8 axes"),
        ({"code_grid": [10**9, 10**9]}, "expected at most 4,194,304"),
        ({"code_grid": "34"}, "got grid='34'"),
        ({"rope_parameters": {"rope_theta": 10**90}}, "got rope_theta=.* 299 bits, expected at most"),
        ({"rms_norm_eps": 1e-300}, "got rms_norm_eps=1e-300"),
        ({"model_type": "x" * 10**5}, "got a model of type 'xxx"),
        ({"attention_bias": {"a": [[[[]]]]}}, "got attention_bias="),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_case_22_configs_of_other_models_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_llama(prior_of(), tmp_path / "llama")
    rewrite(tmp_path / "llama", **changes)
    refuses(tmp_path / "llama", message)


def refuses(folder: Path, message: str, **given: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_llama(folder, **given)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert len(str(error.value).replace(str(folder), "")) < 500


def test_foreign_and_broken_folders_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    refuses(folder, "no model folder at")
    make_transformer(num_codes=3, grid=(2, 2)).save_pretrained(folder)
    refuses(folder, "got a saved TransformerPrior of this library, which Prior.from_pretrained reads")
    shutil.rmtree(folder)
    save_llama(prior_of(), folder)
    weights = folder / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-8])
    refuses(folder, "is corrupt or no safetensors file")
    weights.unlink()
    refuses(folder, "has no model.safetensors")
    weights.write_bytes(good)
    tensors = load_file(weights)
    name = "model.layers.1.self_attn.o_proj.weight"
    save_file({**tensors, name: tensors[name].long()}, weights)
    refuses(folder, "is of torch.int64, expected floating point")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, weights)
    load_llama(folder)  # which old versions kept
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": torch.ones(24)}, weights)
    refuses(folder, "unknown model.layers.0.self_attn.q_proj.bias")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}, weights)
    refuses(folder, "their names hold '_orig_mod', which torch.compile.* puts there: save the model itself")
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        refuses(folder, "config.json")
    (folder / "config.json").unlink()
    refuses(folder, "has no config.json")


def test_other_files_are_not_removed(tmp_path: Path) -> None:
    """Nor is a prior that we saved, whose files have the same names."""
    prior = prior_of()
    prior.save_pretrained(tmp_path / "prior")
    save_llama(prior, tmp_path / "llama")
    (tmp_path / "llama" / "thesis.tex").write_text("mine")
    for name, message in (
        ("prior", "something else under the same names"),
        ("llama", "things, thesis.tex"),
    ):
        before = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ValueError, match=message):
            save_llama(prior_of(num_classes=None), tmp_path / name)
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


def test_what_is_given_must_be_what_is_said(tmp_path: Path) -> None:
    save_llama(prior_of(), tmp_path / "llama")
    assert load_llama(tmp_path / "llama", GRID, NUM_CODES, CLASSES).grid == GRID
    refuses(tmp_path / "llama", r"it says code_grid=\[3, 4\], got \[4, 3\]; leave it out", grid=(4, 3))
    refuses(tmp_path / "llama", "it says num_codes=11, got 10", num_codes=10)
    refuses(tmp_path / "llama", "it says num_classes=3, got 2", num_classes=2)
