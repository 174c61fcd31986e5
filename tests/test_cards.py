"""Model cards: what they say is true of the model, and figures stand there as they were measured or not at all."""

import json
import math

import huggingface_hub
import pytest
import torch

import safefolder
from priors import MixtureTransformerPrior, NGramPrior, TransformerPrior, UniformPrior
from vqvae import VQVAE, GaussianVAE
from vqvae.data import Batch
from vqvae.evaluation import evaluate
from vqvae.quantizers import EMAVectorQuantizer

PLAIN = {"title": "small", "summary": "It is small.", "facts": {"class": "`Thing`"}, "usage": "Use it."}
MEASURED = {"distortion": 1200.5, "entropy": 0.0, "negative_elbo": 1299.6, "bits_per_dim": 2.3914, "usage": 0.981}
RATES = {"uniform": 305.75, "transformer": 99.12345678901}
FIGURES = {"images": 10_000, "skipped": 2, "dims": 784, "rate": RATES, **MEASURED, "seconds": 61.0, "seed": 3}


def metrics(text):
    return {
        result.metric_type: result.metric_value for result in huggingface_hub.ModelCard(text).data.eval_results or []
    }


def test_figures_stand_to_the_last_digit_in_the_header_and_with_units_in_the_table():
    shown = {"tags": ["a", "b"], "pipeline_tag": "image-to-image", "pictures": ["usage.png", "cat.png"]}
    text = safefolder.cards.card(**PLAIN, **shown, figures=FIGURES, data="photos")
    data = huggingface_hub.ModelCard(text).data
    assert (data.library_name, data.tags, data.pipeline_tag) == ("vqvae-priors", ["a", "b"], "image-to-image")
    assert (data.license, data.model_name) == (None, "small")
    assert metrics(text) == {**MEASURED, **{f"rate_{name}": value for name, value in RATES.items()}}
    assert {result.dataset_name for result in data.eval_results} == {"photos"}
    assert "| Rate, transformer prior | 99.12 | nats per image |" in text
    assert "| Usage | 98.1% |" in text
    assert "10,000 test images of photos; 2 more could not be read; seed 3." in text
    assert "](usage.png)" in text
    assert not any(name in text for name in ("samples.png", "cat.png"))


@pytest.mark.parametrize(
    ("split", "what"), [("train", "training images"), ("all", "images"), (None, "test images"), ([], "test images")]
)
def test_the_part_of_a_set_is_that_of_the_figures(split, what):
    text = safefolder.cards.card(**PLAIN, figures={**FIGURES, "split": split}, data="photos")
    expected = split if isinstance(split, str) else "test"
    assert {each.dataset_split for each in huggingface_hub.ModelCard(text).data.eval_results} == {expected}
    assert f"Means over 10,000 {what} of photos;" in text


def test_only_what_was_measured_stands_there():
    for figures in (None, {"images": 3, "seconds": 1.0, "psnr": None}):
        text = safefolder.cards.card(**PLAIN, figures=figures)
        assert "No figures" in text
        assert not any(name in text for name in ("nats", "model-index", "pipeline_tag", "Pictures"))
    text = safefolder.cards.card(**PLAIN, figures={"psnr": math.inf, "usage": 1.0})
    assert "| inf | dB |" in text
    assert metrics(text) == {"usage": 1.0}
    assert not any(name in text for name in ("Rate", "seed"))


@pytest.mark.parametrize("figures", [{"rate": {"uniform": [1.0]}}, {"usage": True}])
def test_what_is_no_figure_is_refused(figures):
    with pytest.raises(ValueError, match="expected a number"):
        safefolder.cards.card(**PLAIN, figures=figures)


def test_names_cannot_break_the_page():
    text = safefolder.cards.card(
        **{**PLAIN, "title": "a\n---\nlicense: mit", "facts": {"x | y": "z\n# head"}},
        figures={"rate": {"a | b\n# c": 1.0}},
        data="d\n# e",
    )
    assert not any(line in ("# head", "# c", "# e") for line in text.splitlines())
    data = huggingface_hub.ModelCard(text).data
    assert data.license is None
    assert data.model_name == "a --- license: mit"
    assert metrics(text) == {"rate_a_b_c": 1.0}


def ran(text, name, folder):
    """What the Python of a card defines, of a model in a folder here instead of the hub."""
    code = text.partition("```python\n")[2].partition("```")[0]
    assert '"owner/name"' in code
    scope = {}
    exec(compile(code.replace('"owner/name"', repr(str(folder))), "README.md", "exec"), scope)
    return scope[name]


@pytest.mark.parametrize("kind", ["codes", "vectors"])
def test_the_card_of_a_tokenizer(tmp_path, kind):
    torch.manual_seed(0)
    sizes = {"image_size": 8, "width": 8, "num_blocks": 1}
    quantizer = EMAVectorQuantizer.Config(num_codes=32, dim=4)
    model = GaussianVAE(**sizes, dim=3) if kind == "vectors" else VQVAE(**sizes, num_channels=3, quantizer=quantizer)
    model.save_pretrained(tmp_path / "model")
    text = model.model_card()
    assert ran(text, "latents", tmp_path / "model").shape[1:3] == (2, 2)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert f"| class | `{type(model).__name__}` |" in text
    assert f"| images | 8 × 8, {'1 channel' if kind == 'vectors' else '3 channels'} |" in text
    assert ("| num_codes | 32 |" in text) == (kind != "vectors")
    assert ("| bits per image of uniform codes | 20.0 |" in text) == (kind != "vectors")


def test_the_figures_of_an_evaluation(tmp_path):
    """From images to elbo.json to the card, number by number."""
    torch.manual_seed(0)
    model = VQVAE(image_size=8, width=8, num_blocks=1).eval()
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    prior = UniformPrior(num_codes=model.num_codes, grid=model.grid)
    evaluate(model, {"uniform": prior}, [Batch(images=images, labels=None)]).save(tmp_path / "e.json", seed=7)
    figures = json.loads((tmp_path / "e.json").read_text())
    text = model.model_card(figures, source="owner/name")
    for name, value in metrics(text).items():
        assert value == (figures["rate"]["uniform"] if name == "rate_uniform" else figures[name])
    assert {"bits_per_dim", "rate_uniform", "distortion", "psnr", "usage", "perplexity"} <= metrics(text).keys()
    assert "Means over 4 test images; seed 7." in text


@pytest.mark.parametrize("kind", ["classes", "ngram", "uniform", "vectors"])
def test_the_card_of_a_prior(tmp_path, kind):
    torch.manual_seed(0)
    small = {"grid": (2, 3), "width": 16, "depth": 1, "num_heads": 2}
    prior = {
        "classes": lambda: TransformerPrior(num_codes=8, num_classes=3, **small),
        "ngram": lambda: NGramPrior(num_codes=8, grid=(2, 3)),
        "uniform": lambda: UniformPrior(num_codes=8, grid=(2, 3)),
        "vectors": lambda: MixtureTransformerPrior(dim=2, **small),
    }[kind]()
    if kind == "ngram":
        prior.fit(torch.randint(0, 8, (20, 2, 3)))
    prior.save_pretrained(tmp_path / "model")
    text = prior.model_card()
    assert ran(text, "nats", tmp_path / "model").shape == (4,)
    assert "| grid | 2 × 3 |" in text
    assert ("| bits per image of uniform codes | 18.0 |" in text) == (kind != "vectors")
    assert f"| classes | {3 if kind == 'classes' else 'none'} |" in text
