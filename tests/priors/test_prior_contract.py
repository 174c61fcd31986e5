"""What every prior must do, whatever its kind."""

import copy
import math
from pathlib import Path

import pytest
import torch
from lanes import some
from prior_worlds import KINDS, every_grid, make_transformer, some_labels
from torch import Tensor

import safefolder
from priors import Prior, Sampling, TransformerPrior, UniformPrior, UnigramPrior
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
    torch.testing.assert_close(chooser.log_prob, prior.log_prob(codes, labels), atol=tolerance, rtol=0)


def test_every_conditional_of_the_walk_is_normalised(prior: Prior) -> None:
    conditionals = []

    def first_code(log_probs: Tensor) -> Tensor:
        conditionals.append(log_probs)
        return torch.zeros(len(log_probs), dtype=torch.int64)

    prior.walk(2, first_code, some_labels(prior, 2))
    assert len(conditionals) == prior.num_positions
    for log_probs in conditionals:
        assert log_probs.shape == (2, prior.num_codes)
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(2))


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


@pytest.mark.parametrize("prior", some(KINDS), indirect=True)
def test_samples_are_as_frequent_as_they_are_probable(prior: Prior) -> None:
    num = 20_000
    labels = None if prior.num_classes is None else torch.ones(num, dtype=torch.int64)
    samples = prior.sample(num, labels, generator=torch.Generator().manual_seed(3))
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


def test_samples_have_the_grid_and_the_range(prior: Prior) -> None:
    for num in (0, 1, 5):
        codes = prior.sample(num, some_labels(prior, num))
        assert codes.shape == (num, *prior.grid)
        assert codes.dtype == torch.int64
        assert num == 0 or (codes.min() >= 0 and codes.max() < prior.num_codes)


def test_no_grids_have_no_log_probs(prior: Prior) -> None:
    codes = torch.zeros(0, *prior.grid, dtype=torch.int64)
    assert prior.log_prob(codes).shape == (0,)


def test_the_same_seed_gives_the_same_codes(prior: Prior) -> None:
    twin = copy.deepcopy(prior)
    labels = some_labels(prior, 8)
    first = prior.sample(8, labels, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(99)  # a generator of its own leaves the global one out of it
    second = twin.sample(8, labels, generator=torch.Generator().manual_seed(5))
    other = prior.sample(8, labels, generator=torch.Generator().manual_seed(6))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(1)
    first = prior.sample(8, labels)
    torch.manual_seed(1)
    assert torch.equal(first, prior.sample(8, labels))


@pytest.mark.parametrize("num_known", [0, 1, 3, 4])
def test_a_prefix_is_kept_and_goes_on_as_the_walk_would(prior: Prior, num_known: int) -> None:
    codes = prior.sample(6, generator=torch.Generator().manual_seed(0)).flatten(1)
    prefix = codes[:, :num_known]
    filled = prior.sample(6, prefix=prefix, generator=torch.Generator().manual_seed(1))
    assert torch.equal(filled.flatten(1)[:, :num_known], prefix)
    # The conditionals after the prefix are those of a walk that chose the prefix's codes one by one.
    rest = known_chooser(codes[:, num_known:])
    whole = known_chooser(codes)
    prior.walk(6, rest, prefix=prefix)
    prior.walk(6, whole)
    if num_known < prior.num_positions:
        start = prior_of_first_positions(prior, codes, num_known)
        torch.testing.assert_close(rest.log_prob + start, whole.log_prob, atol=1e-5, rtol=0)


def prior_of_first_positions(prior: Prior, codes: Tensor, num_known: int) -> Tensor:
    """ln P(first positions) by summing over every way to go on."""
    world = every_grid(prior)
    log_probs = prior.log_prob(world).detach()
    fits = (world.flatten(1)[None, :, :num_known] == codes[:, None, :num_known]).all(-1)
    return log_probs.masked_fill(~fits, -math.inf).logsumexp(-1)


def test_a_whole_prefix_leaves_nothing_to_choose(prior: Prior) -> None:
    codes = prior.sample(3)

    def refuse(log_probs: Tensor) -> Tensor:
        raise AssertionError("no position was open")

    assert torch.equal(prior.walk(3, refuse, prefix=codes.flatten(1)), codes)


def test_greedy_by_temperature_and_by_top_k(prior: Prior) -> None:
    labels = some_labels(prior, 3)
    greedy = prior.walk(3, lambda log_probs: log_probs.argmax(1), labels)
    for options in ({"temperature": 0.0}, {"temperature": 1e-6}, {"top_k": 1}, {"top_p": 1e-9}):
        if isinstance(prior, UniformPrior) and options == {"temperature": 1e-6}:
            continue  # among equals only the limit itself decides
        assert torch.equal(prior.sample(3, labels, Sampling(**options)), greedy), options


def test_neutral_options_change_nothing(prior: Prior) -> None:
    def draw(**options: float) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        return prior.sample(64, some_labels(prior, 64), Sampling(**options), generator)

    plain = draw()
    assert torch.equal(plain, draw(temperature=1.0, top_k=prior.num_codes, top_p=1.0))
    if prior.num_classes is not None:
        assert torch.equal(plain, draw(guidance=1.0))
        assert not torch.equal(plain, draw(guidance=4.0))


def test_one_grid_scores_as_it_does_among_many(prior: Prior) -> None:
    torch.manual_seed(0)
    codes = torch.randint(prior.num_codes, (64, *prior.grid))
    together = prior.log_prob(codes)
    alone = torch.cat([prior.log_prob(one[None]) for one in codes])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_autocast_keeps_log_probs_in_float32(prior: Prior) -> None:
    codes = every_grid(prior)
    expected = prior.log_prob(codes)
    chooser = known_chooser(codes)
    with torch.autocast("cpu", torch.bfloat16):
        got = prior.log_prob(codes)
        prior.walk(len(codes), chooser)
    for log_probs in (got, chooser.log_prob):
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs, expected, atol=0.1, rtol=0.02)


def test_codes_of_any_integer_type(prior: Prior) -> None:
    codes = every_grid(prior)
    for dtype in (torch.int32, torch.int16):
        assert torch.equal(prior.log_prob(codes.to(dtype)), prior.log_prob(codes))


def test_forward_is_log_prob(prior: Prior) -> None:
    codes = every_grid(prior)
    assert torch.equal(prior(codes), prior.log_prob(codes))


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
        assert (again.num_codes, again.grid) == (prior.num_codes, prior.grid)
        assert again.num_classes == prior.num_classes
        for name, tensor in prior.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        if isinstance(prior, TransformerPrior):
            assert again.config == prior.config
            codes = every_grid(prior)
            assert torch.equal(again.log_prob(codes), prior.log_prob(codes))
    assert torch.equal(torch.rand(3), expected_noise)  # loading draws no numbers from the caller's


def test_loading_insists_on_the_class_asked_for(tmp_path: Path) -> None:
    UniformPrior(num_codes=3, grid=(2, 2)).save_pretrained(tmp_path / "uniform")
    with pytest.raises(ValueError, match="holds a UniformPrior, expected a TransformerPrior"):
        TransformerPrior.from_pretrained(tmp_path / "uniform")
    safefolder.save(tmp_path / "other", {"class": "VQVAE", "format": 1}, {})
    with pytest.raises(ValueError, match=r"holds a VQVAE, expected .*TransformerPrior or Uni"):
        Prior.from_pretrained(tmp_path / "other")


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


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 2, 2), "float32, expected integers"),
        (torch.zeros(2, 2, 2, dtype=torch.bool), "bool, expected integers"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), r"shape \(2, 2, 3\), expected \(b, 2, 2\)"),
        (torch.zeros(2, 4, dtype=torch.int64), r"shape \(2, 4\), expected \(b, 2, 2\)"),
        (torch.tensor(0), r"shape \(\), expected \(b, 2, 2\)"),
        (torch.tensor([[[0, 1], [2, 3]]]), "codes from 0 to 3, expected 0 to 2"),
        (torch.tensor([[[0, 1], [2, -1]]]), "codes from -1 to 2, expected 0 to 2"),
    ],
)
@pytest.mark.parametrize("kind", ["uniform", "unigram", "transformer"])
def test_bad_codes(kind: str, codes: Tensor, message: str) -> None:
    prior = KINDS[kind]()
    with pytest.raises(ValueError, match=message):
        prior.log_prob(codes)
    if isinstance(prior, UnigramPrior):
        before = prior.counts.clone()
        with pytest.raises(ValueError, match=message):
            prior.fit(codes)
        assert torch.equal(prior.counts, before)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": -1}, "num=-1"),
        ({"num": 2.0}, "num=2.0"),
        ({"sampling": 0.9}, r"got sampling=0\.9, expected Sampling\("),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "got labels, expected none"),
        ({"sampling": Sampling(guidance=2.0)}, "guidance=2.0"),
        ({"prefix": torch.zeros(3, 1, dtype=torch.int64)}, r"prefix of shape \(3, 1\)"),
        ({"prefix": torch.zeros(2, 5, dtype=torch.int64)}, r"prefix of shape \(2, 5\)"),
        ({"prefix": torch.zeros(2, 2, 2, dtype=torch.int64)}, r"prefix of shape \(2, 2, 2\)"),
        ({"prefix": torch.full((2, 1), 3)}, "prefix from 3 to 3, expected 0 to 2"),
        ({"prefix": torch.zeros(2, 1)}, "prefix of torch.float32"),
    ],
)
def test_bad_sampling_options(options: dict, message: str) -> None:
    for kind in ("uniform", "unigram", "transformer"):
        with pytest.raises(ValueError, match=message):
            KINDS[kind]().sample(**{"num": 2, **options})


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 2]), "labels from 0 to 2, expected 0 to 1"),
        (torch.tensor([-1, 0]), "labels from -1 to 0, expected 0 to 1"),
        (torch.tensor([0, 1, 0]), r"\(3,\), expected integers of shape \(2,\)"),
        (torch.zeros(2), r"float32 \(2,\), expected integers of shape \(2,\)"),
    ],
)
def test_bad_labels(labels: Tensor, message: str) -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2)
    with pytest.raises(ValueError, match=message):
        prior.log_prob(torch.zeros(2, 2, 2, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match=message):
        prior.sample(2, labels)


def test_bad_guidance() -> None:
    prior = make_transformer(num_codes=3, grid=(2, 2), num_classes=2)
    with pytest.raises(ValueError, match=r"guidance=2\.0 without labels"):
        prior.sample(2, sampling=Sampling(guidance=2.0))


@pytest.mark.usefixtures("untyped")
def test_a_chooser_must_answer_with_one_code_a_grid() -> None:
    prior = UniformPrior(num_codes=3, grid=(2, 2))
    for answer in (torch.zeros(3, dtype=torch.int64), torch.zeros(2), torch.zeros(2, 1).long()):
        with pytest.raises(ValueError, match="from the chooser"):
            prior.walk(2, lambda log_probs, answer=answer: answer)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_codes": 0}, "num_codes=0"),
        ({"num_codes": 2.0}, "num_codes=2.0"),
        ({"grid": ()}, r"grid=\(\)"),
        ({"grid": (2, 0)}, "grid size=0"),
        ({"grid": 4}, "grid=4"),
    ],
)
def test_bad_sizes(options: dict, message: str) -> None:
    for kind in (UniformPrior, UnigramPrior):
        with pytest.raises(ValueError, match=message):
            kind(**{"num_codes": 3, "grid": (2, 2), **options})


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
