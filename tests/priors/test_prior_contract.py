"""What every prior must do, whatever its kind."""

import copy
import math
from pathlib import Path

import pytest
import torch
from prior_worlds import KINDS, LABELLED, every_grid, offered, rebuilt, seeded, some_codes, some_labels
from torch import Tensor

import safefolder
from priors import (
    AnyOrderPrior,
    DepthTransformerPrior,
    LlamaPrior,
    NextScalePrior,
    NGramPrior,
    PixelCNNPrior,
    Prior,
    Sampling,
    TransformerPrior,
    UniformPrior,
    UnigramPrior,
)
from priors.sampling import known_chooser


def test_probabilities_of_all_grids_sum_to_one(prior: Prior) -> None:
    prior = prior.double()
    world = every_grid(prior)
    choices = [None] if prior.num_classes is None else [None, *range(prior.num_classes)]
    for label in choices:
        labels = None if label is None else torch.full((len(world),), label)
        log_probs = prior.log_prob(world, labels)
        assert log_probs.dtype == torch.float64
        assert abs(log_probs.exp().sum().item() - 1) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_the_walk_scores_like_the_full_forward(prior: Prior, dtype: torch.dtype, tolerance: float) -> None:
    prior = prior.to(dtype)
    codes = every_grid(prior)
    labels = some_labels(prior, len(codes))
    chooser = known_chooser(codes)
    assert torch.equal(prior.walk(len(codes), chooser, labels), codes)
    assert chooser.log_prob is not None
    assert chooser.log_prob.dtype == dtype
    expected = prior.log_prob(codes, labels)
    torch.testing.assert_close(chooser.log_prob, expected, atol=tolerance, rtol=0)
    assert torch.equal(prior(codes, labels), expected)


def test_walks_offer_the_conditionals_after_any_prefix(prior: Prior) -> None:
    prior = prior.double()
    codes = some_codes(prior, 6)
    labels, flat = some_labels(prior, 6), codes.flatten(1)
    expected = prior.log_conditionals(codes, labels).flatten(1, -2)
    for num_known in range(prior.num_positions):
        got = offered(prior, flat[:, num_known:], labels, prefix=flat[:, :num_known])
        torch.testing.assert_close(got, expected[:, num_known:], atol=1e-11, rtol=0)
        drawn = prior.sample(6, labels, prefix=flat[:, :num_known])
        assert torch.equal(drawn.flatten(1)[:, :num_known], flat[:, :num_known])

    def refuse(log_probs: Tensor) -> Tensor:
        raise AssertionError("no position was open")

    assert torch.equal(prior.walk(6, refuse, labels, prefix=flat), codes)


def chi_square(prior: Prior, samples: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """The statistic, and the value that it exceeds with a probability below 1e-4."""
    digits = samples.flatten(1).double()
    place_values = prior.num_codes ** torch.arange(digits.shape[1] - 1, -1, -1).double()
    counts = torch.bincount((digits @ place_values).long(), minlength=len(probabilities)).double()
    # Grids expected less than 5 times are counted together, as the test's approximation asks.
    rare = probabilities * len(samples) < 5
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((probabilities[~rare], probabilities[rare].sum()[None])) * len(samples)
    used = expected > 0
    statistic = ((counts - expected) ** 2 / expected)[used].sum().item()
    freedom = int(used.sum()) - 1
    # Wilson & Hilferty 1931: the cube root of a chi-square over its mean is nearly normal.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    return statistic, bound


# The draw is the same for all, and a walk's conditionals are those of `log_prob`: one of each family is enough.
@pytest.mark.parametrize("prior", ["uniform", "unigram", "ngram", *LABELLED], indirect=True)
def test_samples_are_as_frequent_as_they_are_probable(prior: Prior) -> None:
    num = 20_000
    labels = None if prior.num_classes is None else torch.ones(num, dtype=torch.int64)
    samples = prior.sample(num, labels, generator=seeded(3))
    world = every_grid(prior)
    with torch.no_grad():
        log_probs = prior.log_prob(world, None if labels is None else labels[: len(world)])
    statistic, bound = chi_square(prior, samples, log_probs.double().exp())
    assert statistic < bound
    # The test can fail: the same counts refute a distribution that is slightly tilted.
    tilted = (log_probs.double() * 0.9).softmax(0)
    if not isinstance(prior, UniformPrior):
        statistic, bound = chi_square(prior, samples, tilted)
        assert statistic > bound


def test_the_same_seed_gives_the_same_codes(prior: Prior) -> None:
    twin = copy.deepcopy(prior)
    labels = some_labels(prior, 8)
    first = prior.sample(8, labels, generator=seeded(5))
    torch.manual_seed(99)  # a generator of its own leaves the global one out of it
    assert torch.equal(first, twin.sample(8, labels, generator=seeded(5)))
    assert not torch.equal(first, prior.sample(8, labels, generator=seeded(6)))
    torch.manual_seed(99)
    assert torch.equal(prior.sample(8, labels), twin.sample(8, labels, generator=seeded(99)))


def test_greedy_by_temperature_and_by_top_k(prior: Prior) -> None:
    labels = some_labels(prior, 3)
    greedy = prior.walk(3, lambda log_probs: log_probs.argmax(1), labels)
    for options in ({"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}):
        if isinstance(prior, UniformPrior) and options in ({"temperature": 1e-6}, {"min_p": 1.0}):
            continue  # among equals these leave all
        assert torch.equal(prior.sample(3, labels, Sampling(**options)), greedy), options


@pytest.mark.usefixtures("untyped")
def test_neutral_options_change_nothing(prior: Prior) -> None:
    labels, n = some_labels(prior, 64), prior.num_positions

    def draw(labels: Tensor | None = labels, **options: object) -> Tensor:
        return prior.sample(64, labels, Sampling(**options), seeded(2))

    plain = draw()
    assert torch.equal(plain, draw(temperature=1.0, top_k=prior.num_codes, top_p=1.0, min_p=0.0))
    # Guidance of 1 needs nothing to guide to.
    assert torch.equal(draw(None, guidance=1), draw(None))
    if labels is not None:
        for none in (1, [1.0] * n):
            assert torch.equal(plain, draw(guidance=none))
        assert not torch.equal(plain, draw(guidance=4.0))
        assert torch.equal(draw(guidance=3.0), draw(guidance=[3.0] * n))
        # Where the last position alone is guided, what comes before it is as without.
        last = draw(guidance=[1.0] * (n - 1) + [6.0]).flatten(1) == plain.flatten(1)
        assert last[:, :-1].all()
        assert not last[:, -1].all()


@pytest.mark.parametrize("kind", LABELLED)
def test_guidance_is_its_equation_after_any_prefix(kind: str) -> None:
    prior = KINDS[kind]().double()
    codes, labels = some_codes(prior, 6), some_labels(prior, 6)
    flat, strengths = codes.flatten(1), [0.3 * position for position in range(prior.num_positions)]
    given, free = (prior.log_conditionals(codes, told).flatten(1, -2) for told in (labels, None))
    mixed = (free + torch.tensor(strengths, dtype=torch.float64)[:, None] * (given - free)).log_softmax(-1)
    assert (mixed - given).abs().max() > 0.1
    for num_known in (0, 1, 3):
        got = offered(prior, flat[:, num_known:], labels, guidance=strengths, prefix=flat[:, :num_known])
        torch.testing.assert_close(got, mixed[:, num_known:], atol=1e-11, rtol=0)


def test_one_grid_scores_as_it_does_among_many(prior: Prior) -> None:
    torch.manual_seed(0)
    codes = torch.randint(prior.num_codes, (16, *prior.grid))
    together = prior.log_prob(codes)
    alone = torch.cat([prior.log_prob(one[None]) for one in codes])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_a_walk_leaves_modes_and_gradients_alone(prior: Prior) -> None:
    prior.train()
    frozen = list(prior.children())[-1:]
    for part in frozen:
        part.eval()
    modes = [part.training for part in prior.modules()]
    seen = []

    def fail(log_probs: Tensor) -> Tensor:
        seen.append((prior.training, log_probs.requires_grad))
        raise RuntimeError("the chooser gave up")

    with pytest.raises(RuntimeError, match="gave up"):
        prior.walk(1, fail)
    assert seen == [(False, False)]
    assert [part.training for part in prior.modules()] == modes


# ---- training


@pytest.mark.parametrize("kind", LABELLED)
def test_every_weight_gets_a_gradient_with_and_without_checkpointing(kind: str) -> None:
    prior = KINDS[kind]()
    codes, gradients = some_codes(prior, 16), []
    changes = [{}] if isinstance(prior, PixelCNNPrior) else [{"checkpointing": False}, {"checkpointing": True}]
    for change in changes:
        twin = rebuilt(prior, label_dropout=0.0, **change).train()
        torch.manual_seed(0)
        # The last label is always "no label": its vector counts too.
        twin(codes[:8], some_labels(prior, 8)).sum().backward()
        twin(codes[8:]).sum().backward()
        gradients.append({name: weight.grad for name, weight in twin.named_parameters()})
    assert [name for name, gradient in gradients[0].items() if gradient is None or not gradient.any()] == []
    torch.testing.assert_close(gradients[0], gradients[-1])


@pytest.mark.parametrize("kind", LABELLED)
@pytest.mark.parametrize("option", ["dropout", "code_noise", "label_dropout"])
def test_noise_and_dropout_are_for_training_alone(kind: str, option: str) -> None:
    prior = KINDS[kind]()
    quiet = {"dropout": 0.0, "code_noise": 0.0, "label_dropout": 0.0}
    codes, labels = some_codes(prior, 8), some_labels(prior, 8)
    noisy = rebuilt(prior, **{**quiet, option: 0.5})
    assert torch.equal(noisy(codes, labels), prior(codes, labels))
    scores = []
    for twin in (noisy, noisy, rebuilt(prior, **quiet)):
        torch.manual_seed(len(scores) and 1)
        scores.append(twin.train()(codes, labels))
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[1], scores[2])
    greedy = Sampling(temperature=0.0)
    assert torch.equal(noisy.sample(4, labels[:4], greedy), prior.sample(4, labels[:4], greedy))
    assert noisy.training


# ---- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_are_bit_equal(prior: Prior, dtype: torch.dtype, tmp_path: Path) -> None:
    prior = prior.to(dtype)
    prior.save_pretrained(tmp_path / "prior")
    torch.manual_seed(4)
    expected_noise = torch.rand(3)
    torch.manual_seed(4)
    for loader in (type(prior), Prior):
        again = loader.from_pretrained(tmp_path / "prior")
        assert type(again) is type(prior)
        assert not again.training
        assert again.config == prior.config
        for name, tensor in prior.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        codes = every_grid(prior)
        if again.dtype == dtype:  # counts are integers in any
            assert torch.equal(again.log_prob(codes), prior.log_prob(codes))
    assert torch.equal(torch.rand(3), expected_noise)  # loading draws no numbers from the caller's


def test_loading_insists_on_the_class_asked_for(tmp_path: Path) -> None:
    UniformPrior(num_codes=3, grid=(2, 2)).save_pretrained(tmp_path / "uniform")
    with pytest.raises(ValueError, match="holds a UniformPrior, expected a TransformerPrior"):
        TransformerPrior.from_pretrained(tmp_path / "uniform")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", ["unigram", "transformer"])
def test_weights_that_do_not_fit_are_one_clear_line(kind: str, tmp_path: Path) -> None:
    prior = KINDS[kind]()
    prior.save_pretrained(tmp_path / "good")
    config, tensors = safefolder.load(tmp_path / "good")
    name = next(iter(tensors))
    without = {n: t for n, t in tensors.items() if n != name}
    cases = {
        "missing": (config, without),
        "extra": (config, {**tensors, "stranger": torch.zeros(2)}),
        "shape": (config, {**tensors, name: torch.zeros(1, 1, 1)}),
        "other size": ({**config, "num_codes": 5}, tensors),
        "no field": ({k: v for k, v in config.items() if k != "grid"}, tensors),
        "new field": ({**config, "colour": 3}, tensors),
        "bad field": ({**config, "grid": [2, "x"]}, tensors),
        "bad number": ({**config, "num_codes": 2.5}, tensors),
    }
    for case, (bad_config, bad_tensors) in cases.items():
        safefolder.save(tmp_path / "bad", bad_config, bad_tensors)
        with pytest.raises(ValueError, match="bad") as error:
            Prior.from_pretrained(tmp_path / "bad")
        assert "\n" not in str(error.value), case


# ---- mistakes


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 2, 2), "float32, expected integers"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), "bool, expected integers"),
        (torch.zeros(2, 4, dtype=torch.int64), r"shape \(2, 4\), expected \(b, 2, 2\)"),
        (torch.tensor(0), r"shape \(\), expected \(b, 2, 2\)"),
        (torch.tensor([[[0, 1], [2, 3]]]), "codes from 0 to 3, expected 0 to 2"),
        (torch.tensor([[[0, 1], [2, -1]]]), "codes from -1 to 2, expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("kind", ["uniform", "unigram", "transformer", "ngram"])
def test_bad_codes(kind: str, codes: Tensor, message: str) -> None:
    prior = KINDS[kind]()
    before = copy.deepcopy(prior.state_dict())
    counting = [prior.fit] if isinstance(prior, UnigramPrior | NGramPrior) else []
    for take in (prior.log_prob, prior.log_conditionals, *counting):
        with pytest.raises(ValueError, match=message):
            take(codes)
    assert all(torch.equal(before[name], tensor) for name, tensor in prior.state_dict().items())


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": -1}, "num=-1"),
        ({"num": 2.0}, "num=2.0"),
        ({"num": True}, "num=True"),
        ({"sampling": 0.9}, r"sampling=0\.9, expected Sampling\("),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "got labels, expected none"),
        ({"sampling": Sampling(guidance=2.0)}, "guidance=2.0, .* without num_classes"),
        ({"prefix": torch.zeros(3, 1, dtype=torch.int64)}, r"prefix of shape \(3, 1\)"),
        ({"prefix": torch.zeros(2, 5, dtype=torch.int64)}, r"prefix of shape \(2, 5\)"),
        ({"prefix": torch.zeros(2, 2, 2, dtype=torch.int64)}, r"prefix of shape \(2, 2, 2\)"),
        ({"prefix": torch.full((2, 1), 3)}, "prefix from 3 to 3, expected 0 to 2"),
        ({"prefix": torch.zeros(2, 1)}, "prefix of torch.float32"),
    ],
)
def test_bad_sampling_options(options: dict, message: str) -> None:
    for kind in ("uniform", "transformer"):
        with pytest.raises(ValueError, match=message):
            KINDS[kind]().sample(**{"num": 2, **options})


@pytest.mark.parametrize("label", [None, 1])
def test_more_grids_than_memory_holds_come_block_by_block(label: int | None) -> None:
    prior = KINDS["transformer-labels"]()
    with pytest.raises(
        ValueError, match=r"got num=1,000,000,000,000, but .* GB: take them block by block from `samples`"
    ):
        prior.sample(10**12, label)
    blocks = prior.samples(10**12, label, Sampling(batch_size=3), generator=seeded(1))
    assert torch.equal(next(blocks), prior.sample(3, label, generator=seeded(1)))


@pytest.mark.usefixtures("untyped")
def test_bad_labels_and_guidance() -> None:
    prior, codes = KINDS["transformer-labels"](), torch.zeros(2, 2, 2, dtype=torch.int64)
    for labels, message in (
        ([0, 2], "labels from 0 to 2, expected 0 to 1"),
        (-1, "labels from -1 to -1, expected 0 to 1"),
        (torch.tensor([0, 1, 0]), r"labels of torch.int64 \(3,\), expected integers of shape \(2,\), or one for all"),
        (torch.zeros(2), r"labels of torch.float32 \(2,\)"),
        (True, "labels of torch.bool"),
        (1.0, "labels of float"),
        (["cat", "dog"], "labels of <U3"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.log_prob(codes, labels)
        with pytest.raises(ValueError, match=message):
            prior.samples(2, labels)  # said at once, before a grid is asked for
    with pytest.raises(ValueError, match="guidance of 3 numbers, expected one for each of 4 positions"):
        prior.sample(2, [0, 1], Sampling(guidance=[2.0] * 3))
    with pytest.raises(ValueError, match=r"guidance=2\.0 without labels"):
        prior.sample(2, sampling=Sampling(guidance=2.0))


@pytest.mark.usefixtures("untyped")
def test_a_chooser_must_answer_with_one_code_a_grid() -> None:
    prior = UniformPrior(num_codes=3, grid=(2, 2))
    for answer in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1).long()):
        with pytest.raises(ValueError, match="from the chooser"):
            prior.walk(2, lambda log_probs, answer=answer: answer)


TRANSFORMERS = (TransformerPrior, LlamaPrior, DepthTransformerPrior, NextScalePrior, AnyOrderPrior)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        ((UniformPrior, UnigramPrior, TransformerPrior), {"num_codes": 0}, "num_codes=0"),
        ((UniformPrior, TransformerPrior, DepthTransformerPrior), {"grid": ()}, r"grid=\(\)"),
        ((UniformPrior, DepthTransformerPrior), {"grid": (2, 0)}, "grid size=0"),
        ((UniformPrior, NextScalePrior), {"grid": 4}, "grid=4"),
        ((UniformPrior,), {"grid": (2**12, 2**11)}, "8,388,608 positions, expected at most 4,194,304"),
        (TRANSFORMERS, {"width": 30, "num_heads": 4}, "width=30 with num_heads=4, expected a multiple of 8"),
        ((TransformerPrior, AnyOrderPrior, NextScalePrior), {"width": 8, "num_heads": 4}, "heads of 2 .* of 2 axes"),
        ((DepthTransformerPrior,), {"grid": (2, 2, 3), "width": 8, "num_heads": 4}, "heads of 2 .* of 2 axes"),
        ((*TRANSFORMERS, PixelCNNPrior), {"depth": 0}, "depth=0"),
        (TRANSFORMERS, {"num_heads": 0}, "num_heads=0"),
        ((*TRANSFORMERS, PixelCNNPrior), {"num_classes": 0}, "num_classes=0"),
        ((*TRANSFORMERS, PixelCNNPrior), {"dropout": 1.0}, "dropout=1.0"),
        ((*TRANSFORMERS, PixelCNNPrior), {"label_dropout": -0.1}, "label_dropout=-0.1"),
        ((*TRANSFORMERS, PixelCNNPrior), {"code_noise": 1.0}, "code_noise=1.0"),
        ((AnyOrderPrior,), {"raster_share": 1.0}, r"raster_share=1\.0, expected a number in \[0, 1\)"),
        ((DepthTransformerPrior,), {"grid": (4,)}, r"grid=\(4,\), expected two axes or more"),
        ((DepthTransformerPrior,), {"code_depth": 0}, "code_depth=0"),
        ((LlamaPrior,), {"rope_base": 1.0}, "rope_base=1.0, expected a number above 1"),
        ((LlamaPrior,), {"rope_base": float("inf")}, "rope_base=inf"),
        ((LlamaPrior,), {"mlp_width": 0}, "mlp_width=0"),
        ((NextScalePrior,), {"scales": ()}, r"scales=\(\), expected the sides"),
        ((NextScalePrior,), {"scales": 4}, "scales=4 for NextScalePrior, expected a tuple of integers"),
        ((NextScalePrior,), {"scales": (0, 2)}, "a scale=0"),
        ((NextScalePrior,), {"scales": (1, 2.0)}, r"scales=\(1, 2.0\) for NextScalePrior, expected a tuple"),
        ((NextScalePrior,), {"scales": (1, 3, 3)}, r"scales=\(1, 3, 3\), expected each larger"),
        ((NextScalePrior,), {"scales": (1, 2), "grid": (6,)}, r"grid=\(6,\) with scales=\(1, 2\), expected \(5,\)"),
        ((PixelCNNPrior,), {"grid": (2, 2, 2)}, r"grid=\(2, 2, 2\), expected two axes"),
        ((PixelCNNPrior,), {"kernel_size": 4}, "kernel_size=4, expected an odd number >= 3"),
        ((PixelCNNPrior,), {"kernel_size": 1}, "kernel_size=1, expected an odd number >= 3"),
        ((NGramPrior,), {"num_codes": 100_000, "grid": (2, 2, 2)}, "100000 codes on a grid of 3 axes"),
    ],
)
def test_bad_configs(kinds: tuple[type[Prior], ...], options: dict, message: str) -> None:
    for kind in kinds:
        grid = {} if kind is NextScalePrior else {"grid": (2, 2)}
        with pytest.raises(ValueError, match=message):
            kind(**{"num_codes": 3, **grid, **options})


# ---- the simplest kinds


def test_uniform_is_minus_n_log_k() -> None:
    prior = UniformPrior(num_codes=512, grid=(7, 7)).double()
    codes = torch.randint(512, (3, 7, 7))
    assert prior.log_prob(codes).tolist() == [-49 * math.log(512)] * 3


def test_unigram_is_the_smoothed_histogram() -> None:
    prior = UnigramPrior(num_codes=4, grid=(3,)).double()
    codes = torch.tensor([[0, 1, 1], [1, 0, 3]])
    assert torch.equal(prior.log_prob(codes), UniformPrior(num_codes=4, grid=(3,)).double()(codes))
    prior.fit(codes[:1]).fit(codes[1:])
    assert prior.counts.dtype == torch.int64
    assert prior.counts.tolist() == [2, 3, 0, 1]
    p = [2.5 / 8, 3.5 / 8, 0.5 / 8, 1.5 / 8]
    expected = [math.log(p[0] * p[1] * p[1]), math.log(p[1] * p[0] * p[3])]
    torch.testing.assert_close(prior.log_prob(codes), torch.tensor(expected).double())
