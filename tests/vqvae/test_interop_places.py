"""Exports: what they must not hold of the machine that wrote them, and that a full disk is an error like another."""

import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from export_worlds import FORMS

import vqvae
from priors import LlamaPrior
from priors.llama_folder import save_llama
from vqvae.interop import export_diffusers, torch_export
from vqvae.interop.exported import Program
from vqvae.quantizers import VectorQuantizer
from vqvae.vqgan import VQGAN

pytest.importorskip("onnxscript")


def vqgan(channels: tuple[int, ...] = (32,), **options: Any) -> VQGAN:
    torch.manual_seed(0)
    quantizer = VectorQuantizer.Config(num_codes=16, dim=4)
    sizes = {"image_size": 8, "channels": channels, "num_blocks": 1, "latent_channels": 4}
    return VQGAN.Config(**sizes, quantizer=quantizer, **options).build().eval()


def llama() -> LlamaPrior:
    return LlamaPrior(num_codes=16, grid=(2, 2), num_classes=3, width=16, depth=1, num_heads=2)


def names_no_place(folder: Path) -> None:
    """No byte of any file of an export tells where it was written, or by what."""
    homes = {Path.home(), Path(sys.prefix), Path(sys.base_prefix), Path.cwd(), Path(vqvae.__file__).parents[1], folder}
    places = {f"{place}/" for place in {*homes, folder.parent, Path(tempfile.gettempdir())}}
    places |= {"site-packages", "/home/", "/Users/", "/usr/", f"/{Path.home().name}/", "traced.py"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 2
    for path in files:
        for part, data in contents(path.name, path.read_bytes()):
            for place in places - {"//"}:
                assert place.encode() not in data, (part, place)
                assert place.encode("utf-16-le") not in data, (part, place)


def contents(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """What a file holds, and, where it is a zip, what its members hold, and so on."""
    yield name, data
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from contents(f"{name}/{member}", archive.read(member))


WRITERS = {
    **{form: (lambda folder, form=form: FORMS[form](vqgan(), folder)) for form in FORMS},
    "diffusers": lambda folder: export_diffusers(vqgan(), folder),
    "llama": lambda folder: save_llama(llama(), folder),
}


@pytest.mark.parametrize("name", ["diffusers", "llama"])
@pytest.mark.usefixtures("untyped")
def test_case_17_nothing_exported_names_a_place_of_this_machine(name: str, tmp_path: Path):
    """Of the other forms `test_interop_export` has a test."""
    WRITERS[name](tmp_path / "exported")
    names_no_place(tmp_path / "exported")


FULL = """
import resource, signal, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_interop_places import WRITERS
from vqvae.interop import onnx

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
name, place = sys.argv[4], Path(sys.argv[2]) / "out"
onnx.MOST_BYTES = 0 if name.startswith("weights beside") else 2**31
for limit in map(int, sys.argv[3].split(",")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        WRITERS[name.removeprefix("weights beside ")](place)
    except ValueError as error:
        assert "could not write" in str(error) and "was saved there before is untouched" in str(error), error
        assert "\\n" not in str(error)
    else:
        raise SystemExit(f"{name} was written within {limit} bytes")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not list(place.parent.iterdir()), limit
print("all")
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_case_22_a_program_on_a_full_disk_is_an_error_and_no_abort():
    module = torch.nn.Linear(2, 2)
    part = Program(module=module, input="images", output="codes", example=torch.ones(2, 2), metadata={"grid": "[1]"})
    with pytest.raises(OSError, match="No space left"):
        torch_export._save(part, Path("/dev/full"))


CASES = {"program": "0,20000,150000", "diffusers": "20000", "onnx": "20000", "weights beside onnx": "20000"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_case_22_a_full_disk_is_an_error_wherever_it_is_met(name: str, tmp_path: Path):
    """It leaves nothing, wherever in its files the disk is full."""
    command = [sys.executable, "-c", FULL, str(Path(__file__).parent), str(tmp_path), CASES[name], name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr[-2000:]
