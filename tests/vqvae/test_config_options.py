"""What models and quantizers are built from is checked when it is written down, in every config class alike."""

import copy
import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest
import torch

import priors
from priors import Sampling
from safefolder import Options
from safefolder.configured import Configured, concrete, option_sentences
from safefolder.options import kind_name
from vqvae import VQGAN, VQVAE, Autoencoder, GaussianVAE
from vqvae.codec import Compression
from vqvae.fingerprint import of_tokenizer
from vqvae.likelihoods import LogisticMixture
from vqvae.quantizers import (
    FSQ,
    EMAVectorQuantizer,
    GroupedQuantizer,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    ResidualQuantizer,
    VectorQuantizer,
)
from vqvae.tokens import Tokenizing
from vqvae.training.options import FitConfig


def every_options() -> list[type]:
    found, waiting = [], [Options]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        ours = kind.__module__.split(".")[0] in ("vqvae", "priors")
        if ours and dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
            found.append(kind)
    return sorted(set(found), key=kind_name)


# Those with small tables, and grids that go with the kind.
SMALL = {
    "VQGAN": {"image_size": 8, "channels": (8, 8), "latent_channels": 8, "num_groups": 4},
    "VQVAE": {"image_size": 8, "width": 8},
    "GaussianVAE": {"image_size": 8, "width": 8},
    "DepthTransformerPrior": {"grid": (4, 4, 2)},
    "MultiScaleQuantizer": {"scales": (1, 2)},
    "FitConfig": {"num_steps": 1},
    "Run": {"codebook_fit": FitConfig(num_steps=1), "prior_fit": FitConfig(num_steps=1)},
}
EVERY_CLASS = [kind for kind in concrete(Configured) if kind.__module__.split(".")[0] in ("vqvae", "priors")]


@pytest.mark.parametrize("kind", EVERY_CLASS, ids=lambda kind: kind.__name__)
def test_an_option_is_stated_once(kind):
    """`X(**options)`, `X.Config(**options).build()` and `x.config` are one thing; each option has its sentence."""
    options = SMALL.get(kind.__name__, {})
    config = kind.Config(**options)
    one, other = kind(**options), config.build()
    assert type(one) is type(other) is kind
    assert one.config == other.config == config == kind.Config.from_plain(json.loads(json.dumps(config.to_plain())))
    assert dataclasses.replace(config) == config
    assert copy.deepcopy(one).config == pickle.loads(pickle.dumps(config)) == config
    names = [each.name for each in dataclasses.fields(kind.Config)]
    assert list(inspect.signature(kind).parameters) == names
    assert all(
        each.kind is each.KEYWORD_ONLY
        for each in inspect.signature(kind.__init__).parameters.values()
        if (each.name != "self" and each.kind is not each.VAR_KEYWORD)
    )
    restated = {"VQGAN": {"image_size", "num_channels", "likelihood", "quantizer", "beta"}}.get(kind.__name__, set())
    assert set(option_sentences(kind)) >= set(names) - restated
    with pytest.raises(ValueError, match=r"takes its options by name.*call its build"):
        kind(config)


@pytest.mark.parametrize("kind", every_options(), ids=kind_name)
def test_case_33_all_options_say_what_they_do_not_take(kind, untyped):
    name = kind.__name__ if kind.owner is None else kind.owner.__name__
    own = SMALL.get(name, {})
    assert kind(**own) == kind(**own)
    with pytest.raises(ValueError, match=rf"^{name} has no nonsense_of_mine"):
        kind(**own, nonsense_of_mine=1)
    for field in dataclasses.fields(kind):
        for wrong in (object(), 1j):
            with pytest.raises(ValueError, match=rf"^got {field.name}\b.*expected "):
                kind(**{**own, field.name: wrong})


def test_case_33_an_option_that_stands_elsewhere_is_found():
    for options, message in (
        ({"levels": (8, 5)}, r"VQVAE has no levels; quantizer=FSQ.Config\(levels=\(8, 5\)\) has"),
        ({"scale": 3.0}, r"VQVAE has no scale; likelihood=Normal.Config\(scale=3.0\) has"),
        ({"quantizer": VectorQuantizer.Config(), "dim": 4}, r"quantizer=VectorQuantizer.Config\(dim=4\) has"),
        ({"widht": 8}, r"VQVAE has no widht; did you mean width\?"),
        ({"codes": 8}, r"did you mean the num_codes of quantizer=EMAVectorQuantizer.Config\(...\)\?"),
    ):
        with pytest.raises(ValueError, match=message):
            VQVAE.Config(**options)


def test_case_28_a_part_is_given_by_its_name():
    assert VQVAE(image_size=8, width=8, quantizer="FSQ", likelihood="Normal").num_codes == 1000
    for kind in (ResidualQuantizer, GroupedQuantizer, ProjectedQuantizer, MultiScaleQuantizer):
        assert kind(quantizer="FSQ").num_codes == 1000
    assert ResidualQuantizer.Config(quantizer=GroupedQuantizer.Config(quantizer="LFQ")).build().code_axes == (4, 2)
    plain = {"class": "ResidualQuantizer", "depth": 2, "quantizer": {"class": "FSQ", "levels": [8, 5]}}
    want = ResidualQuantizer.Config(depth=2, quantizer=FSQ.Config(levels=(8, 5)))
    assert VQVAE.Config(quantizer=plain).quantizer == want


@pytest.mark.usefixtures("untyped")
def test_case_28_a_name_that_is_mistyped_is_told():
    for make, message in (
        (lambda: VQVAE.Config(quantizer="fsq"), r"unknown quantizer 'fsq', expected one of .*; did you mean 'FSQ'\?"),
        (lambda: VQVAE.Config(likelihood="normal"), r"unknown likelihood 'normal', .*; did you mean 'Normal'\?"),
        (lambda: ResidualQuantizer(quantizer="LQF"), r"unknown quantizer 'LQF', .*; did you mean 'LFQ'\?"),
        (lambda: VQVAE.Config(quantizer=FSQ.Config), r"expected the options of a quantizer.*; give FSQ.Config\("),
        (lambda: ResidualQuantizer(quantizer=FSQ.Config().build()), r"for ResidualQuantizer.*give FSQ.Config"),
        (
            lambda: VQVAE.Config(likelihood=FSQ.Config()),
            "expected the options of a likelihood",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_case_28_the_size_of_an_image():
    for size in ([64, 64], torch.Size([64, 64]), np.int64(64)):
        for kind in (VQVAE, GaussianVAE, VQGAN):
            assert kind.Config(image_size=size).image_size == 64
            assert kind.Config(image_size=[64, 48]).image_size == (64, 48)
    for size, message in (
        ((64, 64, 3), r"got image_size=\(64, 64, 3\) for VQVAE, expected an integer, or a tuple of 2 integers"),
        ((64.0, 64.0), r"got image_size=64.0 for VQVAE, expected an integer"),
        ((64, 48.0), r"got image_size=\(64, 48.0\) for VQVAE, expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            VQVAE.Config(image_size=size)


@pytest.mark.usefixtures("untyped")
def test_what_a_config_writes_is_as_it_was():
    """An integer stays one where a float may stand, since files are told apart by what their configs write."""
    config = VQVAE.Config(
        beta=4,
        quantizer=ResidualQuantizer.Config(depth=2, quantizer=EMAVectorQuantizer.Config(commitment_weight=1)),
        likelihood=LogisticMixture.Config(zero_component=True),
    )
    plain = config.to_plain()
    assert plain.pop("smooth") is False  # which came later, and counts where it is used
    assert json.dumps(plain, sort_keys=True) == (
        '{"attention": false, "beta": 4, "downsampling": 4, "image_size": 28, "likelihood": {"class": '
        '"LogisticMixture", "num_components": 5, "zero_component": true}, "num_blocks": 2, "num_channels": 1, '
        '"quantizer": {"class": "ResidualQuantizer", "depth": 2, "dropout": 0.0, "quantizer": {"class": '
        '"EMAVectorQuantizer", "commitment_weight": 1, "decay": 0.99, "dim": 64, "normalize": false, "num_codes": 512, '
        '"revival": "dead", "rotation": false}, "shared": false}, "width": 64}'
    )
    assert VQVAE.Config.from_plain(json.loads(json.dumps(config.to_plain()))) == config
    prior = priors.TransformerPrior.Config(num_codes=np.int64(512), grid=torch.Size([7, 7]), dropout=0)
    assert json.dumps(prior.to_plain())[:24] == '{"grid": [7, 7], "num_cl'
    assert prior == priors.TransformerPrior.Config(num_codes=512, grid=[7, 7])


def test_numbers_of_numpy_are_held_against_their_ranges_too():
    assert Sampling(guidance=np.array([1.0, 2.0])).guidance == (1.0, 2.0)
    for make in (
        lambda: Sampling(guidance=np.array([1.0, -2.0])),
        lambda: EMAVectorQuantizer.Config(commitment_weight=-1.0),
    ):
        with pytest.raises(ValueError, match=r"guidance|commitment_weight"):
            make()
    for kind, name in ((Tokenizing, "batch_size"), (Compression, "images_per_block")):
        assert getattr(kind(**{name: np.int64(4)}), name) == 4
        with pytest.raises(ValueError, match=r"got .*expected"):
            kind(**{name: np.int64(0)})


def test_a_fingerprint_tells_weights_and_options_apart(tmp_path):
    model = VQVAE(**SMALL["VQVAE"])
    prior = priors.TransformerPrior(num_codes=8, grid=(2, 2), width=16, num_heads=2, depth=1)
    for each, other in ((model, Autoencoder), (prior, priors.Prior)):
        each.save_pretrained(tmp_path / type(each).__name__)
        again = other.from_pretrained(tmp_path / type(each).__name__)
        assert again.fingerprint() == each.fingerprint() == copy.deepcopy(each).fingerprint()
        with torch.no_grad():
            next(again.parameters()).view(-1)[0] += 1
        assert again.fingerprint() != each.fingerprint()
    assert len({model.fingerprint(), VQVAE(**SMALL["VQVAE"], beta=1.0).fingerprint(), prior.fingerprint()}) == 3


@pytest.mark.parametrize(
    ("kind", "whole", "codes"),
    [(VQVAE, "b8ef48aa461c2b1a", "1592d5ae19e355e3"), (GaussianVAE, "a8fa7e66218d9587", "a8fa7e66218d9587")],
)
def test_models_are_told_by_what_they_were_told_by_before_later_options(kind, whole, codes):
    """Recorded before there was `smooth`: files of bits, priors and cards of such models stay theirs."""
    model, other = (kind(image_size=8, width=8, num_blocks=1, downsampling=4, smooth=each) for each in (False, True))
    for each in (model, other):
        with torch.no_grad():
            for value in each.state_dict().values():
                value.zero_()
    assert model.fingerprint().startswith(whole)
    assert of_tokenizer(model).startswith(codes)
    assert other.fingerprint() != model.fingerprint()
