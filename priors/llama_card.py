"""What stands beside the weights of a `LlamaPrior` in a folder for other software: its config, how to sample, a README.

The tokens are those of `priors.llama_folder`.
"""

from typing import Any

from priors.llama import LlamaPrior

EPSILON = 1e-6  # of the norms of `priors.trunk`


def llama_config(prior: LlamaPrior) -> dict[str, Any]:
    """config.json of `LlamaForCausalLM`, and the grid."""
    sizes, trunk, specials = prior.config, prior.trunk.trunk, prior.start.embedding.num_embeddings
    dtype = str(prior.logits.weight.dtype).removeprefix("torch.")
    rope_base = float(sizes.rope_base)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.num_codes + specials,
        "hidden_size": sizes.width,
        "intermediate_size": trunk.mlp_width,
        "num_hidden_layers": sizes.depth,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_heads,
        "head_dim": trunk.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": EPSILON,
        # The second is what readers from before transformers 5 know.
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_base},
        "rope_theta": rope_base,
        "max_position_embeddings": prior.num_positions + 1,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": sizes.num_codes,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,
        "code_grid": list(prior.grid),
        "num_codes": prior.num_codes,
        "num_classes": prior.num_classes,
    }


def generation_of(prior: LlamaPrior) -> dict[str, Any]:
    """generation_config.json: samples from the prior as it is, as many codes as the grid has positions."""
    specials = prior.start.embedding.num_embeddings
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_new_tokens": prior.num_positions,
        "max_new_tokens": prior.num_positions,
        "suppress_tokens": list(range(prior.num_codes, prior.num_codes + specials)),
        "bos_token_id": prior.num_codes,
        "eos_token_id": None,
        # None, as every grid is as long: where a prompt holds the token for padding, transformers hides it.
        "pad_token_id": None,
    }


def readme_of(prior: LlamaPrior) -> str:
    """README.md: what the tokens are, and how other software samples."""
    codes, positions, classes = prior.num_codes, prior.num_positions, prior.num_classes
    grid = " x ".join(map(str, prior.grid))
    tokens = (
        f"- 0 to {codes - 1}: the codes.\n- {codes}: begins a grid{'' if classes is None else ' without a label'}.\n"
    )
    begin, comment = f"{codes}", ""
    if classes is not None:
        tokens += f"- {codes + 1} to {codes + classes}: {codes} + 1 + label, begins a grid of a class.\n"
        begin, comment = f"{codes} + 1 + label", f"label = 0  # 0 to {classes - 1}\n"
    return f"""# A prior over grids of codes, as a Llama

It gives grids of {grid} codes in raster order, the last axis fastest: {positions} tokens behind one that begins the
grid. Written by vqvae-priors (`LlamaPrior`), which decodes the codes to images. There is no tokenizer. Tokens are:

{tokens}
With transformers:

```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".")
{comment}start = torch.tensor([[{begin}]] * 4)
tokens = model.generate(start, attention_mask=torch.ones_like(start))
codes = tokens[:, 1:].reshape(4, {", ".join(map(str, prior.grid))})
```

generation_config.json samples from the model as it is, {positions} tokens a grid, and leaves out the tokens that begin
one.

With vLLM (untested):

```python
from vllm import LLM, SamplingParams

llm = LLM(model=".", skip_tokenizer_init=True)
{comment}params = SamplingParams(
    temperature=1.0, max_tokens={positions}, ignore_eos=True, detokenize=False, allowed_token_ids=list(range({codes}))
)
(output,) = llm.generate([{{"prompt_token_ids": [{begin}]}}], params)
codes = output.outputs[0].token_ids  # {positions} codes, a grid of {grid}
```

`allowed_token_ids` leaves out the tokens that begin a grid, as `suppress_tokens` does in transformers.
`dtype="float32"` keeps float32 weights from being rounded.
"""
