"""The transformer against a NumPy transcription of its equations, and what only it does."""

import math

import numpy as np
import pytest
import torch
from prior_worlds import every_grid, make_transformer
from torch import Tensor

from priors import Sampling, TransformerPrior

SHAPES = [((3, 4), None), ((2, 3), 3), ((6,), None), ((2, 2, 3), 2), ((1, 1), None)]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def rms_norm(x: np.ndarray) -> np.ndarray:
    return x / math.sqrt((x**2).mean() + 1e-6)


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / math.sqrt(((x - x.mean()) ** 2).mean() + 1e-6)


def rotate(head: np.ndarray, position: tuple[int, ...], grid: tuple[int, ...]) -> np.ndarray:
    """Rotate each pair of neighbours of one head's vector by the position's angles, pair by pair."""
    pairs = len(head) // 2
    rotated, at = np.empty_like(head), 0
    for axis, size in enumerate(grid):
        share = pairs // len(grid) + (1 if axis < pairs % len(grid) else 0)
        for j in range(share):
            angle = position[axis] / max(100, size) ** (j / share)
            a, b = head[2 * at], head[2 * at + 1]
            rotated[2 * at] = a * math.cos(angle) - b * math.sin(angle)
            rotated[2 * at + 1] = a * math.sin(angle) + b * math.cos(angle)
            at += 1
    assert at == pairs
    return rotated


def reference_conditionals(prior: TransformerPrior, codes: list[int], label: int | None) -> np.ndarray:
    """ln P(. | before) at each position of one grid, "n k": loops over positions, heads and keys."""
    weights = {name: t.detach().numpy() for name, t in prior.state_dict().items()}
    config, grid = prior.config, prior.grid
    num, num_heads = len(codes), config.num_heads
    d = config.width // num_heads
    positions = list(np.ndindex(*grid))
    held = [tuple(-1 for _ in grid), *positions[:-1]]  # the position whose code each input token holds
    label = len(weights["start.embedding.weight"]) - 1 if label is None else label
    tokens = [weights["start.embedding.weight"][label], *(weights["code.weight"][c] for c in codes[:-1])]
    x = [token + weights["trunk.target"][i] for i, token in enumerate(tokens)]
    for layer in range(config.depth):
        qkv_weight = weights[f"trunk.trunk.blocks.{layer}.attention.qkv.weight"]
        out_weight = weights[f"trunk.trunk.blocks.{layer}.attention.out.weight"]
        qkv = [np.split(qkv_weight @ rms_norm(x[i]), 3) for i in range(num)]
        mixed = []
        for i in range(num):
            heads = []
            for h in range(num_heads):
                part = slice(h * d, (h + 1) * d)
                query = rotate(layer_norm(qkv[i][0][part]), positions[i], grid)
                scores = [
                    query @ rotate(layer_norm(qkv[j][1][part]), held[j], grid) / math.sqrt(d) for j in range(i + 1)
                ]
                shares = softmax(np.array(scores))
                heads.append(sum(s * qkv[j][2][part] for j, s in enumerate(shares)))
            mixed.append(out_weight @ np.concatenate(heads))
        x = [x[i] + mixed[i] for i in range(num)]
        for i in range(num):
            both = weights[f"trunk.trunk.blocks.{layer}.mlp.gate_and_value.weight"] @ rms_norm(x[i])
            gate, value = np.split(both, 2)
            hidden = gate / (1 + np.exp(-gate)) * value
            x[i] = x[i] + weights[f"trunk.trunk.blocks.{layer}.mlp.out.weight"] @ hidden
    return np.array([np.log(softmax(weights["logits.weight"] @ rms_norm(xi))) for xi in x])


@pytest.mark.parametrize(("grid", "num_classes"), SHAPES)
def test_log_prob_is_the_reference_in_numpy(grid: tuple, num_classes: int | None) -> None:
    prior = make_transformer(num_codes=5, grid=grid, num_classes=num_classes).double()
    torch.manual_seed(1)
    codes = torch.randint(5, (3, *grid))
    for label in [None] if num_classes is None else [None, 0, num_classes - 1]:
        labels = None if label is None else torch.full((3,), label)
        got = prior.log_prob(codes, labels).tolist()
        for row, value in zip(codes.flatten(1).tolist(), got, strict=True):
            log_probs = reference_conditionals(prior, row, label)
            expected = sum(log_probs[i, code] for i, code in enumerate(row))
            assert abs(value - expected) < 1e-10


def test_the_walk_offers_the_reference_conditionals() -> None:
    prior = make_transformer(num_codes=5, grid=(3, 4), num_classes=3).double()
    codes = torch.randint(5, (2, 12), generator=torch.Generator().manual_seed(2))
    conditionals = []

    def follow(log_probs: Tensor) -> Tensor:
        conditionals.append(log_probs)
        return codes[:, len(conditionals) - 1]

    prior.walk(2, follow, torch.tensor([2, 0]))
    for row, label in enumerate((2, 0)):
        expected = reference_conditionals(prior, codes[row].tolist(), label)
        got = torch.stack([log_probs[row] for log_probs in conditionals]).numpy()
        assert np.abs(got - expected).max() < 1e-10


@pytest.mark.parametrize("autocast", [False, True])
def test_no_position_sees_itself_or_what_comes_after(autocast: bool) -> None:
    prior = make_transformer(num_codes=5, grid=(3, 3))
    seen: dict[str, Tensor] = {}
    prior.logits.register_forward_hook(lambda _, __, out: seen.update(logits=out))
    prior.code.register_forward_hook(lambda _, __, out: seen.update(code=out))
    codes = torch.zeros(1, 3, 3, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prior(codes)
        base, embedded = seen["logits"], seen["code"]
        for i in range(9):
            target = base[0, i].float().square().sum()
            gradient = torch.autograd.grad(target, embedded, retain_graph=True)[0]
            reached = gradient[0].abs().sum(-1) > 0  # token j holds the code of position j
            assert reached.tolist() == [j < i for j in range(8)]
        for changed in range(9):
            other = codes.clone()
            other.view(-1)[changed] = 3
            prior(other)
            same = (seen["logits"] == base)[0].all(-1).tolist()
            assert same == [i <= changed for i in range(9)]


def test_the_names_of_weights_stay_so_that_saved_priors_load() -> None:
    prior = make_transformer(num_codes=4, grid=(2, 3), depth=2)
    layer = ["attention.qkv", "attention.out", "mlp.gate_and_value", "mlp.out"]
    blocks = [f"trunk.trunk.blocks.{i}.{part}.weight" for i in range(2) for part in layer]
    assert list(prior.state_dict()) == [
        "start.embedding.weight",
        "code.weight",
        "trunk.target",
        *blocks,
        "logits.weight",
    ]
    assert sorted(prior.config.to_plain()) == sorted(
        [
            *("num_codes", "grid", "num_classes", "width", "depth", "num_heads"),
            *("dropout", "label_dropout", "code_noise", "checkpointing"),
        ]
    )


def test_every_weight_gets_a_gradient() -> None:
    prior = make_transformer(num_codes=4, grid=(2, 3), num_classes=2).train()
    codes = torch.arange(24).reshape(4, 2, 3) % 4
    (-prior(codes, torch.tensor([0, 1, 0, 1])).mean()).backward()
    for name, weight in prior.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_gradients_are_those_of_finite_differences() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), depth=1).double()
    codes = every_grid(prior)[::7]
    prior(codes).sum().backward()
    for weight in prior.parameters():
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
        sides = []
        with torch.no_grad():
            for step in (1e-5, -1e-5):
                weight.add_(direction, alpha=step)
                sides.append(prior(codes).sum().item())
                weight.sub_(direction, alpha=step)
        slope = (sides[0] - sides[1]) / 2e-5
        assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.5])
def test_guidance_is_its_equation_on_the_enumerated_world(guidance: float) -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2).double()
    world = every_grid(prior)
    flat = world.flatten(1)

    def conditional(prefix: list[int], label: int | None) -> Tensor:
        labels = None if label is None else torch.full((len(world),), label)
        joint = prior.log_prob(world, labels).detach()
        n = len(prefix)
        fits = (flat[:, :n] == torch.tensor(prefix, dtype=torch.int64)).all(1)
        each = [joint[fits & (flat[:, n] == code)].logsumexp(0) for code in range(3)]
        return torch.stack(each).log_softmax(0)

    path, conditionals = [2, 0, 1, 1], []

    def follow(log_probs: Tensor) -> Tensor:
        conditionals.append(log_probs[0])
        return torch.tensor(path[len(conditionals) - 1 : len(conditionals)])

    prior.walk(1, follow, torch.tensor([1]), guidance=guidance)
    for position, log_probs in enumerate(conditionals):
        with_label = conditional(path[:position], 1)
        free = conditional(path[:position], None)
        expected = (free + guidance * (with_label - free)).log_softmax(0)
        torch.testing.assert_close(log_probs, expected, atol=1e-10, rtol=0)


def test_guidance_goes_with_a_prefix_and_a_batch() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2).double()
    prefix = torch.tensor([[2, 0], [0, 1]])
    labels, conditionals = torch.tensor([1, 0]), []

    def record(log_probs: Tensor) -> Tensor:
        conditionals.append(log_probs)
        return torch.zeros(len(log_probs), dtype=torch.int64)

    prior.walk(2, record, labels, guidance=3.0, prefix=prefix)
    together = list(conditionals)
    for row in range(2):
        conditionals.clear()
        one = slice(row, row + 1)
        steps = iter([*prefix[row].tolist(), 0, 0])

        def follow(log_probs: Tensor, steps=steps) -> Tensor:
            record(log_probs)
            return torch.tensor([next(steps)])

        prior.walk(1, follow, labels[one], guidance=3.0)
        for a, b in zip(together, conditionals[2:], strict=True):
            torch.testing.assert_close(a[one], b, atol=1e-12, rtol=0)


def test_labels_are_dropped_in_training_only() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2, label_dropout=0.3)
    num = 2000
    codes, labels = torch.ones(num, 2, 2, dtype=torch.int64), torch.ones(num, dtype=torch.int64)
    with torch.no_grad():
        with_label, without = prior(codes[:1], labels[:1]), prior(codes[:1])
        assert (prior(codes, labels) - with_label).abs().max() < 1e-5
        torch.manual_seed(0)
        trained = prior.train()(codes, labels)
    is_dropped = (trained - without).abs() < 1e-4
    assert ((trained - with_label).abs() < 1e-4).logical_xor(is_dropped).all()
    assert abs(is_dropped.float().mean().item() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / num)


def test_dropout_is_for_training_only() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), dropout=0.5)
    plain = make_transformer(num_codes=3, grid=(2, 2))
    codes = every_grid(prior)
    assert torch.equal(prior(codes), plain(codes))
    torch.manual_seed(0)
    prior.train()
    assert (prior(codes) - prior(codes)).abs().max() > 0.01
    greedy = prior.sample(2, sampling=Sampling(temperature=0.0))
    assert torch.equal(greedy, plain.sample(2, sampling=Sampling(temperature=0.0)))
    assert prior.training


def test_a_fresh_prior_is_nearly_uniform() -> None:
    torch.manual_seed(0)
    prior = TransformerPrior(num_codes=64, grid=(4, 4))
    codes = torch.randint(64, (16, 4, 4))
    per_position = -prior(codes).mean().item() / 16
    assert abs(per_position - math.log(64)) < 0.1


def test_it_learns_what_labels_and_positions_determine() -> None:
    torch.manual_seed(0)
    config = TransformerPrior.Config(
        num_codes=4,
        grid=(3, 3),
        num_classes=2,
        width=32,
        depth=1,
        num_heads=2,
        label_dropout=0.5,
    )
    prior = config.build()
    optimiser = torch.optim.AdamW(prior.parameters(), lr=3e-3)
    patterns = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 0], [3, 3, 1, 1, 2, 2, 0, 0, 3]])
    labels = torch.arange(64) % 2
    codes = patterns[labels].reshape(64, 3, 3)
    for _ in range(120):
        optimiser.zero_grad()
        (-prior(codes, labels).mean()).backward()
        optimiser.step()
    prior.eval()
    # The class is worth ln 2 nats, and without a label nothing more is left to say.
    assert prior(codes, labels).min() > -0.2
    assert (prior(codes) + math.log(2)).abs().max() < 0.4
    assert torch.equal(prior.sample(64, labels, Sampling(temperature=0.0)), codes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "num_heads": 4}, "width=30 with num_heads=4, expected a multiple of 8"),
        ({"width": 8, "num_heads": 4}, "heads of 2 channels for a grid of 2 axes"),
        ({"depth": 0}, "depth=0"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"label_dropout": -0.1}, "label_dropout=-0.1"),
        ({"grid": ()}, r"grid=\(\)"),
    ],
)
def test_bad_configs(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerPrior.Config(**{"num_codes": 4, "grid": (2, 2), **options})
