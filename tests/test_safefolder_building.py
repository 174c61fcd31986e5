"""Models out of folders that somebody else may have written: what the config asks for, and what the caller has set."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from default_worlds import default

import safefolder
from priors import NGramPrior, Prior, TransformerPrior
from safefolder.building import neutral
from vqvae import VQVAE, Autoencoder, fingerprint
from vqvae.quantizers import EMAVectorQuantizer


def small() -> VQVAE:
    torch.manual_seed(0)
    return VQVAE(image_size=8, width=8, num_blocks=1, quantizer=EMAVectorQuantizer.Config(num_codes=8, dim=4))


def small_prior() -> TransformerPrior:
    return TransformerPrior(num_codes=8, grid=(2, 2), width=16, depth=1, num_heads=2)


SURROUNDINGS = {
    "float64": lambda: default(torch.float64),
    "bfloat16": lambda: default(torch.bfloat16),
    "meta": lambda: default(torch.device("meta")),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_case_11_a_loaded_model_does_not_depend_on_what_the_caller_has_set(tmp_path, name):
    model, prior = small(), small_prior()
    model.save_pretrained(tmp_path / "model")
    prior.save_pretrained(tmp_path / "prior")
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    random = torch.random.get_rng_state()
    with SURROUNDINGS[name]():
        loaded, known = VQVAE.from_pretrained(tmp_path / "model"), Prior.from_pretrained(tmp_path / "prior")
        dtype = torch.get_default_dtype()
    assert torch.equal(random, torch.random.get_rng_state())
    assert dtype == {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(name, torch.float32)
    assert fingerprint.of_tokenizer(loaded) == fingerprint.of_tokenizer(model)
    for got, expected in ((loaded, model), (known, prior)):
        for one, other in zip(got.state_dict().values(), expected.state_dict().values(), strict=True):
            assert (one.dtype, one.device) == (other.dtype, other.device)
        assert {each.dtype for each in got.buffers()} == {each.dtype for each in expected.buffers()}
        assert all(each.requires_grad and not each.is_inference() for each in got.parameters())
    codes = model.eval().encode(images)
    assert torch.equal(loaded.encode(images), codes)
    assert torch.equal(known.log_prob(codes), prior.eval().log_prob(codes))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_autocast_of_any_device_is_on_inside(device):
    """A codec's model may be on a GPU."""
    torch.set_autocast_enabled(device, True)
    try:
        with neutral():
            assert not torch.is_autocast_enabled(device)
        assert torch.is_autocast_enabled(device)
    finally:
        torch.set_autocast_enabled(device, False)


@pytest.mark.parametrize("saved", [torch.float64, torch.float32, torch.bfloat16])
def test_weights_are_float32_or_as_precise_as_they_were_saved(tmp_path, saved):
    small().to(saved).save_pretrained(tmp_path / "model")
    small_prior().to(saved).save_pretrained(tmp_path / "prior")
    model, prior = Autoencoder.from_pretrained(tmp_path / "model"), Prior.from_pretrained(tmp_path / "prior")
    assert {each.dtype for each in model.parameters()} == {torch.promote_types(saved, torch.float32)}
    assert {each.dtype for each in prior.parameters()} == {saved}


def test_damaged_weights_and_what_names_no_folder_are_a_sentence(tmp_path):
    for made, kind in ((small(), Autoencoder), (small_prior(), Prior)):
        name, weight = list(made.named_parameters())[-1]
        with torch.no_grad():
            weight.view(-1)[0] = float("nan")
        made.save_pretrained(tmp_path / kind.__name__)
        with pytest.raises(ValueError, match=f"are damaged: {name} hold NaN"):
            kind.from_pretrained(tmp_path / kind.__name__)
    path = tmp_path / "Prior" / "model.safetensors"
    eight = {name: each.to(torch.float8_e4m3fn) for name, each in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(eight, path)
    with pytest.raises(ValueError, match=r"are torch.float8_e4m3fn, expected torch.bfloat16"):
        Prior.from_pretrained(path.parent)
    for source in (None, "", "x" * 5000):
        with pytest.raises(ValueError, match=r"expected a folder's path|cannot be looked at"):
            safefolder.load(source)  # pyrefly: ignore


# What a config of a few bytes may ask for; by the family, the fields and their values.
BOMBS = [
    *[("model", {"width": width}) for width in (4096, 10**18, -1, "28", None)],
    *[("model", {"num_blocks": number}) for number in (30_000, 10**9)],
    *[("model", {"downsampling": number}) for number in (0, -2, 2**40)],
    *[("model", {"image_size": size}) for size in (0, -4)],
    ("model", {"quantizer": {"class": "EMAVectorQuantizer", "num_codes": 10**12, "dim": 4}}),
    ("model", {"quantizer": {"class": "ResidualQuantizer", "depth": 10**9, "quantizer": {"class": "FSQ"}}}),
    ("model", {"quantizer": {"class": "GroupedQuantizer", "num_groups": 10**9, "quantizer": {"class": "FSQ"}}}),
    ("model", {"quantizer": {"class": "FSQ", "levels": [5] * 100_000}}),
    ("model", {"quantizer": {"class": "LFQ", "dim": 10**9}}),
    ("model", {"likelihood": {"class": "LogisticMixture", "num_components": 10**9}}),
    *[("model", {"class": kind}) for kind in ([], "GridModel")],
    *[("prior", {"depth": depth}) for depth in (30_000, 10**9, -1)],
    ("prior", {"width": 8192, "grid": [4096, 4096]}),
    *[("prior", {"grid": grid}) for grid in ([4096, 4096], [10**6, 10**6], [], [0])],
    *[("prior", {"num_codes": number}) for number in (10**9, 0, -8)],
    *[("prior", {"num_classes": number}) for number in (10**9, 10**18, 0, -1)],
    *[("ngram", {"grid": grid}) for grid in ([10**6, 10**6], [4096, 4096])],
    *[("ngram", {"num_stored": stored}) for stored in ([10**12] * 5, [10**9], "x", None, 7)],
    ("prior", {"trained_on": "x"}),
    ("prior", {"class_names": ["one"]}),
    ("prior", {"class_names": "ab"}),
    ("prior", {"trained_on": {"tokenizer": "/home/me", "images": None}}),
]
TRY = """
import json, resource, sys, time
from pathlib import Path
import torch
from priors.grid import GridModel
from vqvae import Autoencoder

root = Path(sys.argv[1])
families = {"model": Autoencoder, "prior": GridModel, "ngram": GridModel}
for name, kind in families.items():
    kind.from_pretrained(root / name)  # whatever torch imports for it is there now
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
outcomes = []
for name, change in json.loads((root / "bombs.json").read_text()):
    path = root / name / "config.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), **change}))
    start = time.process_time()
    try:
        families[name].from_pretrained(root / name)
        outcome = "loaded"
    except ValueError as error:
        outcome = "refused" if len(str(error)) < 1000 else "a long story"
    except BaseException as error:
        outcome = repr(error)[:200]
    path.write_text(good)
    outcomes.append((outcome, time.process_time() - start))
print(json.dumps(outcomes))
"""


def test_case_15_a_config_that_does_not_fit_the_weights_takes_neither_memory_nor_time(tmp_path):
    """Each is refused within 300 MB and some seconds of a processor; most asked for gigabytes and minutes."""
    small().save_pretrained(tmp_path / "model")
    small_prior().save_pretrained(tmp_path / "prior")
    prior = NGramPrior(num_codes=8, grid=(2, 2))
    prior.fit(torch.randint(0, 8, (20, 2, 2)))
    prior.save_pretrained(tmp_path / "ngram")
    (tmp_path / "bombs.json").write_text(json.dumps(BOMBS))
    done = subprocess.run([sys.executable, "-c", TRY, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for bomb, (outcome, seconds) in zip(BOMBS, json.loads(done.stdout), strict=True):
        assert outcome == "refused", bomb
        assert seconds < 5, bomb


def test_case_32_a_run_is_taken_for_its_part(tmp_path):
    run = tmp_path / "run"
    small().save_pretrained(run / "codebook")
    assert isinstance(VQVAE.from_pretrained(run), VQVAE)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        Prior.from_pretrained(run)
    small_prior().save_pretrained(run / "prior")
    assert isinstance(Prior.from_pretrained(str(run)), TransformerPrior)
    Path(tmp_path / "begun" / "state").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"codebook is not finished: go on with `vqvae train --resume --run \S+begun`"):
        VQVAE.from_pretrained(tmp_path / "begun")
