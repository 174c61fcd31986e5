"""Promises about the whole: public names, the import contract, and the README's own words."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import priors
import safefolder
import vqvae
import vqvae.codec
import vqvae.data
import vqvae.em
import vqvae.interop
import vqvae.likelihoods
import vqvae.quantizers
import vqvae.tokens

ROOT = Path(__file__).parents[1]


def test_public_names():
    """A name that leaves this list is somebody's broken program."""
    assert sorted(vqvae.__all__) == [
        *("Autoencoder", "ELBO", "GaussianVAE", "VQGAN", "VQVAE"),
        "load_images",
    ]
    assert sorted(priors.__all__) == [
        *("AnyOrderPrior", "ContinuousPrior", "DepthTransformerPrior"),
        *("GridModel", "LlamaPrior"),
        *("MixtureTransformerPrior"),
        *("NGramPrior", "NextScalePrior", "NormalPrior", "PixelCNNPrior"),
        *(
            "Prior",
            "TransformerPrior",
            "UniformPrior",
            "UnigramPrior",
        ),
    ]
    kinds = [
        *("BSQ", "EMAVectorQuantizer", "FSQ", "GroupedQuantizer", "GumbelQuantizer", "IBQ", "LFQ"),
        *("MultiScaleQuantizer", "ProjectedQuantizer", "ResidualQuantizer", "SimVQ", "SoftEMVectorQuantizer"),
        *("StochasticVectorQuantizer", "VectorQuantizer"),
    ]
    assert sorted(vqvae.quantizers.__all__) == sorted(
        [
            *kinds,
            *("MASKED", "PriorInTheLoop", "Quantized", "Quantizer"),
            *("gumbel_softmax", "nearest", "rotation_trick", "straight_through"),
        ]
    )
    assert sorted(vqvae.likelihoods.__all__) == [
        *("Categorical", "Chooser", "Likelihood", "LocalContext"),
        *("LogisticMixture", "Normal", "SymbolChooser", "Symbols"),
    ]
    assert sorted(vqvae.em.__all__) == [*("BernoulliPixels", "CategoricalPixels", "Fit", "GaussianPixels", "Mixture")]
    assert sorted(safefolder.__all__) == [
        *(
            "BESIDE",
            "CONFIG_NAME",
            "Configured",
            "ConfiguredOptions",
            "FORMAT",
            "Given",
            "HubOptions",
            "Options",
            "PICTURES",
            "SavedModel",
            "build",
            "card",
            "has_part",
        ),
        *(
            "import_line",
            "load",
            "load_weights",
            "loading",
            "members",
            "model_facts",
            "one_writer",
            "option_sentences",
            "public_name",
        ),
        *("push", "python", "read_config", "read_json", "replacing", "save", "stale_patterns"),
        *("upload", "write_text"),
    ]
    assert sorted(vqvae.codec.__all__) == [
        *("Archive", "Codec", "CompressedImages", "Compression", "Cost", "DamagedFile", "Decoded", "Dream"),
        *("Header", "Mode", "Recovered", "append", "awake", "bytes_for_an_image", "dream", "recover", "write"),
    ]
    assert sorted(vqvae.interop.__all__) == [
        *("Agreement", "CodesToImages", "ImagesToCodes", "compare_codes", "export_diffusers", "export_onnx"),
        *("export_program", "fit_scale", "import_diffusers", "import_llamagen", "import_taming", "import_tokenizer"),
    ]
    assert sorted(vqvae.tokens.__all__) == [
        *(
            "CodeBatch",
            "CodeDataset",
            "Decoded",
            "Encoded",
            "Plan",
            "RaySession",
            "Summary",
            "Timings",
            "Tokenized",
            "Tokenizer",
            "Tokenizing",
            "TokenizingOnRay",
        ),
        *("check_same_origin", "encode_batch", "finish", "is_done", "missing", "plan", "read_batch", "tokenize"),
        *("tokenize_on_ray", "write_parquet", "write_shard"),
    ]
    modules = (vqvae, priors, safefolder, vqvae.quantizers, vqvae.likelihoods, vqvae.data, vqvae.em, vqvae.codec)
    modules += (vqvae.interop, vqvae.tokens)
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert value.__doc__, f"{module.__name__}.{name} has no docstring"


def test_signatures_at_the_seams():
    names = list(inspect.signature(priors.Prior.sample).parameters)
    assert names[:5] == ["self", "num", "labels", "sampling", "generator"]
    assert names[5:] == ["given", "mask", "prefix", "seeds", "progress"]
    assert list(inspect.signature(priors.Prior.samples).parameters) == names
    assert list(inspect.signature(priors.Prior.log_prob).parameters) == ["self", "codes", "labels"]
    names = list(inspect.signature(priors.ContinuousPrior.sample).parameters)
    assert names == ["self", "num", "labels", "sampling", "generator"]
    assert list(inspect.signature(priors.ContinuousPrior.log_prob).parameters) == ["self", "latents", "labels"]
    assert list(inspect.signature(vqvae.quantizers.Quantizer.forward).parameters) == ["self", "z_e", "mask"]


def test_the_import_contract():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_images(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    inside = ("vqvae/cli/look.py", "vqvae/codec/codec.py", "priors/transformer.py", "safefolder/__init__.py")
    for name in (*inside, "assets/fashion-mini/train-00"):
        assert name in listed
    assert "tests/" not in listed
