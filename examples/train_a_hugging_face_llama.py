"""A Hugging Face Llama trained on our codes with a plain loop, and taken back as one of our priors.

    vqvae tokenize RUN_OR_MODEL SOURCE -o codes
    python examples/train_a_hugging_face_llama.py RUN_OR_MODEL codes [--num-steps 300] [--output llama]

Needs transformers. The tokens are the codes 0..K-1, then K, which begins a grid without a class, then one for each
class; a sequence is the class's token and the codes of the grid in raster order. In a tenth of training's sequences K
stands for the class, or its vector would stay as random as it began. A folder with these tokens is a prior of ours:
`load_llama` gives its bits, with labels and without, draws from it and decodes, and `vqvae import` does the same from a
terminal.
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from priors.llama_folder import load_llama
from vqvae import VQVAE, pictures
from vqvae.tokens import CodeBatch, CodeDataset

# The share of training's sequences that begin without their class.
UNLABELLED = 0.1


def to_tokens(batch: CodeBatch, num_codes: int) -> torch.Tensor:
    """Codes "b *grid" to sequences "b 1+n" for training: what begins them, then the codes."""
    without = torch.full((len(batch.codes),), -1)
    classes = without if batch.labels is None else batch.labels.where(torch.rand(len(without)) >= UNLABELLED, without)
    return torch.cat([num_codes + 1 + classes[:, None], batch.codes.flatten(1)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("codes", type=Path)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("llama"))
    args = parser.parse_args()

    train, test = CodeDataset(args.codes / "train"), CodeDataset(args.codes / "test")
    num_positions = math.prod(train.grid)
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=train.num_codes + 1 + (train.num_classes or 0),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=1 + num_positions,
            bos_token_id=train.num_codes,
            eos_token_id=None,
            # What load_llama asks for; transformers keeps it, and has no use for it.
            code_grid=list(train.grid),
            num_codes=train.num_codes,
            num_classes=train.num_classes,
        )
    )
    optimizer = torch.optim.AdamW(llama.parameters(), 2e-3)
    for step, batch in zip(range(args.num_steps), train.batches(64, seed=0), strict=False):
        tokens = to_tokens(batch, train.num_codes)
        loss = llama(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item() / math.log(2):.3f} bits a code")
    llama.save_pretrained(args.output)

    prior = load_llama(args.output)
    held = test[: min(500, len(test))]
    even = f"even codes would take {math.log2(train.num_codes):.3f}"
    known = {} if held.labels is None else {"labels known": held.labels}
    for name, labels in {**known, "no labels": None}.items():
        with torch.no_grad():
            bits = -prior.log_prob(held.codes, labels).mean().item() / math.log(2) / num_positions
        print(f"{bits:.3f} bits a code on test codes, {name}; {even}")

    codebook = args.model / "codebook"
    model = VQVAE.from_pretrained(codebook if codebook.is_dir() else args.model)
    train.check_tokenizer(model)
    labels = None if train.num_classes is None else torch.arange(20) % train.num_classes
    drawn = prior.sample(20, labels=labels, generator=torch.Generator().manual_seed(0))
    pictures.save_grid(args.output / "samples.png", model.decode(drawn), 10)
    print(f"{args.output}: the Llama, and samples.png")


if __name__ == "__main__":
    main()
