"""What models and quantizers are built from is checked when it is written down, in every config class alike."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch

import priors
import vqvae
import vqvae.em
from safefolder import Options
from vqvae import VQVAE, GaussianVAEConfig, VQGANConfig, VQVAEConfig
from vqvae.likelihoods import LogisticMixtureConfig, NormalConfig
from vqvae.quantizers import (
    EMAVectorQuantizerConfig,
    FSQConfig,
    GroupedQuantizer,
    GroupedQuantizerConfig,
    LFQConfig,
    MultiScaleQuantizer,
    ProjectedQuantizer,
    ProjectedQuantizerConfig,
    ResidualQuantizer,
    ResidualQuantizerConfig,
    VectorQuantizerConfig,
)


def every_kind() -> list[type]:
    found, waiting = [], [Options]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        ours = kind.__module__.split(".")[0] in ("vqvae", "priors")
        if ours and dataclasses.is_dataclass(kind) and not inspect.isabstract(kind):
            found.append(kind)
    return sorted(set(found), key=lambda kind: kind.__name__)


NEEDED = {"num_codes": 16, "grid": (4, 4), "dim": 4}


def needed(kind: type) -> dict:
    """What a kind cannot do without, of which priors have some."""
    missing = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    values = {name: value for name, value in NEEDED.items() if name in missing}
    if kind is priors.DepthTransformerPriorConfig:
        values["grid"] = (4, 4, 2)
    return values


def test_every_config_class_is_one_of_options():
    names = {kind.__name__ for kind in every_kind()}
    for module in (vqvae, vqvae.quantizers, vqvae.likelihoods, vqvae.em, priors):
        assert {name for name in module.__all__ if name.endswith("Config")} - names <= {"QuantizerConfig"}
    assert len(names) >= 31


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.__name__)
def test_case_33_every_config_class_says_what_it_does_not_take(kind, untyped):
    own = needed(kind)
    assert kind(**own) == kind(**own)
    with pytest.raises(ValueError, match=rf"^{kind.__name__} has no nonsense_of_mine"):
        kind(**own, nonsense_of_mine=1)
    for field in dataclasses.fields(kind):
        for wrong in (object(), b"1", {1, 2}, 1j):
            with pytest.raises(ValueError, match=rf"^got {field.name}=.* for {kind.__name__}, expected "):
                kind(**{**own, field.name: wrong})
    for name in own:
        with pytest.raises(ValueError, match=rf"^{kind.__name__} needs .*{name}"):
            kind(**{other: value for other, value in own.items() if other != name})


def test_case_33_an_option_that_stands_elsewhere_is_found():
    for options, message in (
        ({"num_codes": 512}, "VQVAEConfig has no num_codes; quantizer=EMAVectorQuantizerConfig(num_codes=512) has"),
        ({"levels": (8, 5)}, "VQVAEConfig has no levels; quantizer=FSQConfig(levels=(8, 5)) has"),
        ({"scale": 3.0}, "VQVAEConfig has no scale; likelihood=NormalConfig(scale=3.0) has"),
        (
            {"num_components": 5},
            "VQVAEConfig has no num_components; likelihood=LogisticMixtureConfig(num_components=5) has",
        ),
        ({"quantizer": "VectorQuantizer", "dim": 4}, "quantizer=EMAVectorQuantizerConfig(dim=4) has"),
        ({"quantizer": VectorQuantizerConfig(), "dim": 4}, "quantizer=VectorQuantizerConfig(dim=4) has"),
        ({"widht": 8}, "VQVAEConfig has no widht; did you mean width?"),
        (
            {"codes": 8},
            "VQVAEConfig has no codes; did you mean the num_codes of quantizer=EMAVectorQuantizerConfig(...)?",
        ),
    ):
        with pytest.raises(ValueError, match=r"^VQVAEConfig has no") as error:
            VQVAEConfig(**options)
        assert message in str(error.value)


def test_case_28_a_part_is_given_by_its_name():
    assert VQVAEConfig(quantizer="FSQ").quantizer == FSQConfig()
    assert VQVAEConfig(likelihood="Normal").likelihood == NormalConfig()
    assert VQVAE(VQVAEConfig(image_size=8, width=8, quantizer="FSQ", likelihood="Normal")).num_codes == 1000
    for kind in (ResidualQuantizerConfig, GroupedQuantizerConfig, ProjectedQuantizerConfig):
        assert kind(quantizer="FSQ").quantizer == FSQConfig()
    assert ResidualQuantizerConfig(quantizer=GroupedQuantizerConfig(quantizer="LFQ")).build().code_axes == (4, 2)
    for quantizer in (
        ResidualQuantizer(quantizer="FSQ"),
        GroupedQuantizer(quantizer="FSQ"),
        ProjectedQuantizer(quantizer="FSQ"),
        MultiScaleQuantizer(quantizer="FSQ"),
    ):
        assert quantizer.num_codes == 1000
    plain = {"class": "ResidualQuantizer", "depth": 2, "quantizer": {"class": "FSQ", "levels": [8, 5]}}
    want = ResidualQuantizerConfig(depth=2, quantizer=FSQConfig(levels=(8, 5)))
    assert VQVAEConfig(quantizer=plain).quantizer == want


@pytest.mark.usefixtures("untyped")
def test_case_28_a_name_that_is_mistyped_is_told():
    for make, message in (
        (lambda: VQVAEConfig(quantizer="FQS"), r"unknown quantizer 'FQS', expected one of .*; did you mean 'FSQ'\?"),
        (lambda: VQVAEConfig(quantizer="fsq"), r"did you mean 'FSQ'\?"),
        (lambda: VQVAEConfig(quantizer="EMA"), r"did you mean 'EMAVectorQuantizer'\?|expected one of .*EMAVector"),
        (lambda: VQVAEConfig(likelihood="normal"), r"unknown likelihood 'normal', .*; did you mean 'Normal'\?"),
        (lambda: ResidualQuantizerConfig(quantizer="LQF"), r"unknown quantizer 'LQF', .*; did you mean 'LFQ'\?"),
        (lambda: ResidualQuantizer(quantizer="LQF"), r"unknown quantizer 'LQF', .*; did you mean 'LFQ'\?"),
        (lambda: VQVAEConfig(quantizer=FSQConfig), r"expected the options of a quantizer.*; give FSQConfig\(\.\.\.\)"),
        (lambda: VQVAEConfig(quantizer=FSQConfig().build()), r"expected the options .*; give FSQConfig\(\.\.\.\)"),
        (lambda: ResidualQuantizer(quantizer=FSQConfig().build()), r"for ResidualQuantizer.*give FSQConfig"),
        (
            lambda: VQVAEConfig(likelihood=FSQConfig()),
            "got likelihood=FSQConfig.*, expected the options of a likelihood",
        ),
        (lambda: VQVAEConfig(quantizer=None), "got quantizer=None for VQVAEConfig, expected the options"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_case_28_the_size_of_a_square_image():
    for size in ((64, 64), [64, 64], torch.Size([64, 64]), np.int64(64), 64):
        assert VQVAEConfig(image_size=size) == VQVAEConfig(image_size=64)
        assert GaussianVAEConfig(image_size=size).image_size == VQGANConfig(image_size=size).image_size == 64
    for size, message in (
        ((64, 48), r"got image_size=\(64, 48\), expected one number, as images are square: crop or scale them"),
        ((64, 64, 3), r"got image_size=\(64, 64, 3\) for VQVAEConfig, expected an integer"),
        ((64.0, 64.0), r"got image_size=64.0 for VQVAEConfig, expected an integer"),
        ("64", "got image_size='64' for VQVAEConfig, expected an integer"),
        (64.0, "got image_size=64.0 for VQVAEConfig, expected an integer"),
        (True, "got image_size=True for VQVAEConfig, expected an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            VQVAEConfig(image_size=size)


@pytest.mark.usefixtures("untyped")
def test_sizes_of_quantizers_are_integers():
    for make, message in (
        (lambda: vqvae.quantizers.VectorQuantizer(num_codes="512"), "got num_codes='512', expected an integer"),
        (lambda: vqvae.quantizers.VectorQuantizer(dim=4.0), "got dim=4.0, expected an integer"),
        (lambda: vqvae.quantizers.FSQ(levels=(8, 5.5)), r"got levels=\(8, 5.5\), expected a tuple of integers"),
        (lambda: vqvae.quantizers.FSQ(levels=8), "got levels=8, expected a tuple of integers"),
        (lambda: vqvae.quantizers.LFQ(num_bits=True), "got num_bits=True, expected an integer"),
        (lambda: ResidualQuantizer(depth=2.0), "got depth=2.0, expected an integer"),
        (lambda: GroupedQuantizer(num_groups="2"), "got num_groups='2', expected an integer"),
        (lambda: MultiScaleQuantizer(scales=(1, 2.0)), r"got scales=\(1, 2.0\), expected a tuple of integers"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert vqvae.quantizers.FSQ(levels=np.array([8, 5])).num_codes == 40
    assert vqvae.quantizers.VectorQuantizer(num_codes=np.int64(5), dim=np.int64(2)).num_codes == 5


@pytest.mark.usefixtures("untyped")
def test_what_a_config_writes_is_as_it_was():
    """An integer stays one where a float may stand, since files are told apart by what their configs write."""
    config = VQVAEConfig(
        beta=4,
        quantizer=ResidualQuantizerConfig(depth=2, quantizer=EMAVectorQuantizerConfig(commitment_weight=1)),
        likelihood=LogisticMixtureConfig(zero_component=True),
    )
    assert json.dumps(config.to_plain()) == (
        '{"image_size": 28, "num_channels": 1, "likelihood": {"class": "LogisticMixture", "num_components": 5, '
        '"zero_component": true}, "width": 64, "downsampling": 4, "num_blocks": 2, "attention": false, "quantizer": '
        '{"class": "ResidualQuantizer", "depth": 2, "quantizer": {"class": "EMAVectorQuantizer", "num_codes": 512, '
        '"dim": 64, "decay": 0.99, "commitment_weight": 1, "normalize": false, "rotation": false, "revival": "dead"}, '
        '"shared": false, "dropout": 0.0}, "beta": 4}'
    )
    assert VQVAEConfig.from_plain(json.loads(json.dumps(config.to_plain()))) == config
    prior = priors.TransformerPriorConfig(num_codes=np.int64(512), grid=torch.Size([7, 7]), dropout=0)
    assert json.dumps(dataclasses.asdict(prior))[:40] == '{"num_codes": 512, "grid": [7, 7], "num_'
    assert prior == priors.TransformerPriorConfig(num_codes=512, grid=[7, 7])


def test_parts_of_a_model_are_of_its_kinds():
    assert LFQConfig().build().num_codes == 1024
    with pytest.raises(ValueError, match="expected the options of a quantizer, or the name of one: BSQ, EMAVectorQ"):
        VQVAEConfig(quantizer=NormalConfig())
