"""What speculative sampling takes beside a code at a time and beside Hugging Face, on a run whose prior has a draft.

    pip install transformers
    python train.py --run RUN --draft yes --prior.width 256 --prior.depth 6 --prior.num-heads 8    # 5M weights
    python -m benchmarks speculation RUN
    python -m benchmarks speculation RUN --large --num-proposals 2 3 4 --batches 1 --no-alone

Each side samples grids of a class: `code by code`, in float32 and in bfloat16; by proposals of the head, and of the
run's n-gram, in bfloat16; `auto`, which measures; and `generate` of a Llama of the same sizes, with random weights, in
its fastest way. Sides take turns; medians of CPU time on one thread. With --large the prior is
a larger one of the same function: 768 wide and 12 deep (85M weights), of which the run's weights are a part; those that
read are rescaled for the wider norms, and the others write nothing. So its passes cost what those of such a prior cost,
and the head's proposals are taken as often. That the function is the same is checked first.

Besides: the share of proposals that is taken, counted on the samples; codes a pass; and -ln P of the samples under the
prior in nats a code, with its standard error, which must agree between all sides.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tyro.conf import Positional

from benchmarks import harness, sampling
from priors import DraftHead, Prior, Sampling, TransformerPrior
from priors.scorers import Scorer

QUICK = "--num 2 --rounds 1 --batches 1 --num-proposals 1 --no-alone"
WIDTH, DEPTH = 768, 12


def grown(prior: TransformerPrior) -> TransformerPrior:
    """A larger prior of the same function."""
    old, heads = prior.config, WIDTH // (prior.config.width // prior.config.num_heads)
    sizes = {"num_codes": prior.num_codes, "grid": prior.grid, "num_classes": prior.num_classes}
    new = TransformerPrior(**sizes, width=WIDTH, depth=DEPTH, num_heads=heads).eval()
    shrink = math.sqrt(old.width / WIDTH)  # a norm over padded vectors is that much larger
    with torch.no_grad():
        for name in ("start.embedding.weight", "code.weight", "trunk.target"):
            _padded(new.get_parameter(name), prior.get_parameter(name))
        _padded(new.logits.weight, shrink * prior.logits.weight)
        for depth, block in enumerate(new.trunk.trunk.blocks):
            block.attention.out.weight.zero_()
            block.mlp.out.weight.zero_()
            if depth < old.depth:
                known = prior.trunk.trunk.blocks[depth]
                for mine, its in zip(
                    block.attention.qkv.weight.chunk(3), known.attention.qkv.weight.chunk(3), strict=True
                ):
                    _padded(mine, shrink * its)
                for mine, its in zip(
                    block.mlp.gate_and_value.weight.chunk(2), known.mlp.gate_and_value.weight.chunk(2), strict=True
                ):
                    _padded(mine, shrink * its)
                _padded(block.attention.out.weight, known.attention.out.weight, rest=0)
                _padded(block.mlp.out.weight, known.mlp.out.weight, rest=0)
    return new


def grown_head(head: DraftHead, prior: TransformerPrior, new: TransformerPrior) -> DraftHead:
    """The head that does on the larger prior what `head` does on the smaller one."""
    width, shrink = prior.config.width, math.sqrt(prior.config.width / WIDTH)
    made = DraftHead.of(new).eval()
    scale = new.code.weight.std() / prior.code.weight.std()
    with torch.no_grad():
        made.hidden.weight.zero_()
        parts = zip(made.hidden.weight.split(WIDTH, 1), head.hidden.weight.split(width, 1), strict=True)
        for number, (mine, its) in enumerate(parts):
            _padded(mine, (scale if number else shrink) * its, rest=0)
        made.out.weight.zero_()
        _padded(made.out.weight, head.out.weight / shrink, rest=0)
        made.target.zero_()
        _padded(made.target, head.target, rest=0)
        made.accepted.copy_(head.accepted)
    return made


def _padded(weight: Tensor, part: Tensor, rest: float | None = None) -> None:
    """Put a part into the corner of a weight; what else its rows hold becomes 0, other rows `rest` if it is given."""
    rows, columns = part.shape
    if rest is not None:
        weight.fill_(rest)
    weight[:rows] = 0
    weight[:rows, :columns] = part


def counted(prior: Any, draft: Any, num_proposals: int, num: int, label: int | None) -> tuple[float, Tensor]:
    """Codes a pass of one grid at a time, and the grids."""
    passes = 0
    start = type(prior)._start_scorer

    def counting(self: Any, *begun: Any) -> Scorer:
        scorer = start(self, *begun)

        def score(*stretch: Any) -> Tensor:
            nonlocal passes
            passes += 1
            return scorer(*stretch)

        score.features_before = getattr(scorer, "features_before", None)  # pyrefly: ignore[missing-attribute]
        score.rows = begun[0].num  # pyrefly: ignore[missing-attribute]
        return score

    options = Sampling(draft=draft, num_proposals=num_proposals, precision="float32", batch_size=1)
    type(prior)._start_scorer = counting
    try:
        grids = prior.sample(num, label, options, torch.Generator().manual_seed(1))
    finally:
        type(prior)._start_scorer = start
    return grids.numel() / passes, grids


def nats(prior: Any, grids: Tensor, label: int | None) -> str:
    costs = -prior.log_prob(grids, label) / prior.num_positions
    return f"{costs.mean():.3f} ± {costs.std() / len(costs) ** 0.5:.3f}"


@torch.no_grad()
def main(
    run: Positional[Path],
    batches: tuple[int, ...] = (1, 16),
    num_proposals: tuple[int, ...] = (1, 2, 3, 4),
    rounds: int = 7,
    large: bool = False,
    alone: bool = True,
    num: int = 100,
    budget: float = 240,
) -> None:
    """Time a run's prior; --no-alone leaves `generate` out, --num grids are looked at."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prior: Any = Prior.from_pretrained(run)
    head, ngram = DraftHead.from_pretrained(run), Prior.from_pretrained(run / "ngram")
    label = 0 if prior.num_classes else None
    if large:
        prior, head = _checked_growth(prior, head)
    found: dict[str, Callable[[], object]] = {}
    table = harness.Table("draft", "proposals", "codes a pass", "nats a code of the samples")
    plain = prior.sample(num, label, Sampling(precision="float32"), torch.Generator().manual_seed(1))
    table.row("none", "", "1", nats(prior, plain, label))
    for name, draft in {"head": head, "n-gram": ngram}.items():
        for number in num_proposals:
            rate, grids = counted(prior, draft, number, num, label)
            table.row(name, number, f"{rate:.2f}", nats(prior, grids, label))
    print(f"the head says that its guesses are taken with {[round(each, 3) for each in head.accepted.tolist()]}\n")
    shape = sampling.Shape(
        width=prior.config.width, depth=prior.config.depth, num_heads=prior.config.num_heads, num_codes=prior.num_codes
    )
    for batch in batches:
        found = {
            "code by code, float32": partial(prior.sample, batch, label, Sampling(precision="float32")),
            "code by code, bfloat16": partial(prior.sample, batch, label, Sampling(precision="bfloat16")),
            "auto, without a draft": partial(prior.sample, batch, label),
            "auto, head": partial(prior.sample, batch, label, Sampling(draft=head)),
        }
        for number in num_proposals:
            options = Sampling(draft=head, num_proposals=number, precision="bfloat16")
            found[f"head, {number}"] = partial(prior.sample, batch, label, options)
        found["n-gram, 2"] = partial(
            prior.sample, batch, label, Sampling(draft=ngram, num_proposals=2, precision="bfloat16")
        )
        if alone:
            case = sampling.Case("", prior.num_positions, batch, "cpu", shape)
            for dtype in (torch.float32, torch.bfloat16):
                found[f"generate, {dtype}"] = sampling.rival(sampling.GENERATE, case, dtype).run
        for job in found.values():
            job()  # what a first call prepares
        spent = harness.interleaved({name: partial(harness.timed, job) for name, job in found.items()}, rounds, budget)
        seconds = {name: [each.counted for each in times] for name, times in spent.items()}
        speeds = harness.Table(f"batch {batch}", "codes/s", "against code by code", "against generate")
        base = min(("float32", "bfloat16"), key=lambda dtype: statistics.median(seconds[f"code by code, {dtype}"]))
        others = [name for name in seconds if name.startswith("generate")]
        best = min(others, key=lambda name: statistics.median(seconds[name])) if others else None
        for name, times in seconds.items():
            speed = batch * prior.num_positions / statistics.median(times)
            against = harness.ratio(seconds[f"code by code, {base}"], times)
            beside = f"{harness.ratio(seconds[best], times):.2f}" if best else ""
            speeds.row(name, f"{speed:,.0f}", f"{against:.2f}", beside)


def _checked_growth(prior: TransformerPrior, head: DraftHead) -> tuple[TransformerPrior, DraftHead]:
    new = grown(prior)
    codes = torch.randint(prior.num_codes, (8, *prior.grid))
    torch.testing.assert_close(new.log_prob(codes), prior.log_prob(codes), atol=1e-2, rtol=1e-3)
    larger = grown_head(head, prior, new)
    both = [
        torch.stack(
            [guess[:, 0] for guess, _ in one.guesses(of, of.features_and_conditionals(codes)[0], codes.flatten(1))]
        )
        for one, of in ((head, prior), (larger, new))
    ]
    torch.testing.assert_close(*both, atol=1e-2, rtol=1e-2)
    return new, larger
