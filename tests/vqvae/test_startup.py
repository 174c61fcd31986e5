"""What is loaded, and when: a command or an import waits for what it uses, and for nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vqvae
from priors import TransformerPrior
from vqvae import VQVAE, cli
from vqvae.quantizers import VectorQuantizer

ROOT = Path(__file__).parents[2]

# What takes long to load and is for something particular. constriction is the codec's, and loads fast.
PARTICULAR = {
    *("torchvision", "matplotlib", "scipy", "skimage"),
    *("pyarrow", "datasets", "pandas", "ray", "webdataset", "huggingface_hub", "requests", "httpx"),
    *("onnx", "onnxruntime", "onnxscript", "torch.onnx", "transformers", "diffusers"),
    *("lightning_fabric", "tensorboardX", "torch.utils.tensorboard", "yaml"),
    *("torch._dynamo", "torch._inductor", "triton", "sympy"),
}
# What the names of the commands can be told without.
TENSORS = {"torch", "numpy", "einops", "jaxtyping", "safetensors", "PIL", "tqdm", "tyro", "argparse"}

# Several commands in one process: none of them may load what is for something else.
COMMANDS = """
import contextlib, io, json, sys
from vqvae import cli
for words in json.loads(sys.argv.pop()):
    sys.argv = ["vqvae", *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main()
    except SystemExit as stop:
        assert not stop.code, words
"""


def loaded(*words: str) -> set[str]:
    """The modules that a fresh Python loads, given these words."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert lines, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.fixture(scope="module")
def particular():
    """What is for something particular, less what torch alone loads in this version."""
    return PARTICULAR - loaded("-c", "import torch")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "vqvae", "--help"],
        ["-m", "vqvae", "--version"],
        ["-m", "vqvae", "sampel"],
        ["-c", "import vqvae.cli; from vqvae import exits; vqvae.allocator"],
    ],
)
def test_the_names_of_the_commands_and_an_import_need_no_torch(words):
    modules = loaded(*words)
    assert "vqvae.cli" in modules
    assert modules & (TENSORS | PARTICULAR) == set()


NAMES = ("codec", "data", "em", "evaluation", "interop", "likelihoods", "pictures", "quantizers", "tokens")


@pytest.mark.parametrize(
    "program",
    [
        "import vqvae; vqvae.VQVAE",
        f"from vqvae import *; import priors, {', '.join(f'vqvae.{name}' for name in NAMES)}",
    ],
    ids=["a model", "all"],
)
def test_the_packages_load_torch_and_what_they_need(program, particular):
    modules = loaded("-c", program)
    assert "torch" in modules
    assert modules & (particular | {"tyro", "constriction"}) == set()


def test_commands_load_what_they_use(particular, tmp_path):
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=8, dim=4)
    model = VQVAE(image_size=16, num_channels=1, width=8, num_blocks=1, quantizer=quantizer)
    prior = TransformerPrior(num_codes=8, grid=model.grid, width=16, depth=1, num_heads=2)
    model.save_pretrained(tmp_path / "run" / "codebook")
    prior.save_pretrained(tmp_path / "run" / "prior")
    vqvae.pictures.save_image(tmp_path / "image.png", torch.zeros(1, 16, 16, dtype=torch.uint8))
    run, image, file = (str(tmp_path / name) for name in ("run", "image.png", "some.vq"))
    commands = [
        *([name, "--help"] for name in cli.COMMANDS),
        ["sample", run, "--num", "2", "--output", str(tmp_path / "samples.png")],
        ["compress", run, image, "-o", file],
        ["info", file, run],
        ["decompress", run, file, "-o", str(tmp_path / "again")],
        ["dream", run, "--num", "1", "--output", str(tmp_path / "dream.png")],
    ]
    assert loaded("-c", COMMANDS, json.dumps(commands)) & particular == set()
    assert (tmp_path / "dream.png").is_file()


def test_the_help_is_a_line_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vqvae", "--help"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith("  ")]
    assert [line.split()[0] for line in commands] == list(cli.COMMANDS)
    assert all(len(line) <= 80 and line.endswith(".") for line in commands)
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in commands}) == 1


def test_the_names_of_the_package_are_there_before_they_are_loaded():
    assert {*vqvae.__all__} <= {*dir(vqvae)}
    assert vqvae.codec is sys.modules["vqvae.codec"]
    with pytest.raises(AttributeError, match="module 'vqvae' has no attribute 'VQVEA'"):
        vqvae.VQVEA  # noqa: B018
