"""Exported tokenizers: graphs, torch.export and ONNX against the model, and what is refused."""

import copy
import errno
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from export_worlds import (
    FORMS,
    LIKELIHOODS,
    check_codes,
    check_export,
    check_images,
    drawn_codes,
    load,
    make,
    names_no_place,
    noise,
    vqgan,
)
from quantizer_worlds import PARAMS
from torch import Tensor, nn

from priors import LlamaPrior
from priors.llama_folder import save_llama
from vqvae.gaussian import GaussianVAE
from vqvae.interop import (
    code_graphs,
    compare_codes,
    export_diffusers,
    export_onnx,
    export_program,
    exported,
    onnx,
    torch_export,
    traced,
)
from vqvae.interop.exported import Program
from vqvae.interop.traced import CodesToImages, ImagesToCodes
from vqvae.quantizers import MASKED

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exports of `make()`."""
    found = {}
    for form, export in FORMS.items():
        found[form] = tmp_path_factory.mktemp("exports") / form
        export(make(), found[form])
    return found


@pytest.mark.parametrize("name", PARAMS)
def test_graphs_are_encode_and_decode(name: str):
    model = make(name)
    images = noise(model, 16)
    codes = model.encode(images)
    assert len(codes.unique()) > (model.num_codes > 1)
    check_codes(model, images, ImagesToCodes(model)(images))
    decode = CodesToImages(model)
    check_images(model, codes, decode(codes))
    check_images(model, drawn_codes(model, 16), decode(drawn_codes(model, 16)))


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_graphs_of_every_likelihood_are_decode(name: str, num_channels: int):
    model = make("ema", name, num_channels, large=True)
    codes = drawn_codes(model, 16)
    assert model.decode(codes).float().std() > 0.5  # not one grey
    check_images(model, codes, CodesToImages(model)(codes))


# One of each class of graph, and compositions of compositions.
GRAPHS = ("learned", "gumbel", "fsq", "bsq", "projected learned", "grouped ema", "residual ema", "multiscale ema")
TWICE = ("residual, shared", "grouped residual", "residual grouped", "multiscale fsq")
VQGANS = ("vqgan", "vqgan with spatial norms")
# With the sums of a mixture as long as they are; the others have a graph of a tenth of the length.
LONG = {("program", "mixture"), ("onnx", "mixture with zero")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*GRAPHS, *TWICE, *LIKELIHOODS, *VQGANS])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("untyped")
def test_exports_equal_the_model(tmp_path: Path, form: str, name: str, monkeypatch: pytest.MonkeyPatch):
    is_long = (form, name) in LONG
    if not is_long:
        monkeypatch.setattr(traced, "LEVELS", 51)
    if name in LIKELIHOODS:
        model = make("ema", name, 1 if is_long else 3, large=True)
    elif name in VQGANS:
        model = vqgan(channels=(32, 32), spatial_norm=name != "vqgan")
    else:
        model = make(name)
    # A group norm of no images is an error in onnxruntime.
    check_export(model, form, tmp_path / "out", empty=form == "program" or name not in VQGANS)


@pytest.mark.parametrize(
    "name", ["residual ema", "residual, shared", "multiscale ema", "fsq", "lfq", "grouped residual"]
)
def test_masked_codes_decode_as_the_model_s(name: str):
    model = make(name)
    codes = drawn_codes(model, 4)
    codes[1:].flatten(1)[:, 1::2] = MASKED
    codes[3] = MASKED
    graph = CodesToImages(model)
    torch.testing.assert_close(graph.quantizer.look_up(codes), model.vectors(codes), rtol=1e-5, atol=1e-5)
    check_images(model, codes, graph(codes))


def test_a_large_codebook_is_searched_in_sections(monkeypatch: pytest.MonkeyPatch):
    model = make()
    images = noise(model, 16)
    for size in (1, 5, 15):
        monkeypatch.setattr(code_graphs, "SECTION", size)
        check_codes(model, images, ImagesToCodes(model)(images))


# What an export leaves, and what it refuses.


GPU = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.usefixtures("untyped")
def test_an_export_is_in_float32_wherever_the_model_is(tmp_path: Path, device: str):
    model = make(large=True)
    with torch.autocast(device, torch.bfloat16):
        export_program(copy.deepcopy(model).to(device), tmp_path / "out")
    encode, decode = load("program", tmp_path / "out")
    images = noise(model, 3)
    check_codes(model, images, encode(images))
    check_images(model, drawn_codes(model, 3), decode(drawn_codes(model, 3)))
    assert compare_codes(copy.deepcopy(model).to(device), images.to(device), encode(images)).num_wrong == 0


def test_the_folder_says_how_to_call_what_is_in_it(folders: dict[str, Path]):
    folder = folders["onnx"]
    info = json.loads((folder / "tokenizer.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "tokenizer.json"]
    assert (info["grid"], info["num_codes"]) == ([5, 5], 16)
    assert info["encoder"]["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 1, 5, 5]}
    assert info["decoder"]["input"] == {"name": "codes", "dtype": "int64", "shape": ["batch", 5, 5]}
    session = onnxruntime.InferenceSession(folder / info["encoder"]["file"])
    assert [(each.name, each.shape, each.type) for each in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", ["batch", 1, 5, 5], "tensor(uint8)"),
        ("codes", ["batch", 5, 5], "tensor(int64)"),
    ]
    metadata = session.get_modelmeta().custom_metadata_map
    assert (json.loads(metadata["grid"]), json.loads(metadata["num_codes"])) == ([5, 5], 16)
    assert metadata["fingerprint"] == info["fingerprint"]


@pytest.mark.parametrize("form", FORMS)
def test_the_lines_that_the_folder_gives_run(folders: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch):
    model = make()
    monkeypatch.chdir(folders[form])
    images = noise(model, 3)
    names = {"images": images if form == "program" else images.numpy()}
    exec("\n".join(json.loads(Path("tokenizer.json").read_text())["usage"]), names)
    assert torch.equal(torch.as_tensor(names["codes"]), model.encode(images))
    assert torch.equal(torch.as_tensor(names["images"]), model.decode(model.encode(images)))


@pytest.mark.parametrize("form", FORMS)
def test_case_17_no_file_names_a_folder_of_this_machine(folders: dict[str, Path], form: str):
    files = [path for path in folders[form].rglob("*") if path.is_file()]
    assert any(b"encoder.layers" in path.read_bytes() for path in files)  # names are there to be found
    names_no_place(folders[form])


def test_case_17_nor_do_folders_for_diffusers_and_transformers(tmp_path: Path):
    export_diffusers(vqgan(), tmp_path / "diffusers")
    llama = LlamaPrior(num_codes=16, grid=(2, 2), num_classes=3, width=16, depth=1, num_heads=2)
    save_llama(llama, tmp_path / "llama")
    for name in ("diffusers", "llama"):
        names_no_place(tmp_path / name)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_training_stays_as_it_is_and_files_may_move(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(onnx, "MOST_BYTES", 0)
    model = make().train()
    model.decoder.eval()
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING):
        FORMS[form](model, tmp_path / "out")
    assert not caplog.records
    assert (model.training, model.encoder.training, model.decoder.training) == (True, True, False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    # With weights beside the file.
    assert (tmp_path / "out" / "encoder.onnx.data").exists() == (form == "onnx")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    encode, decode = load(form, tmp_path / "elsewhere")
    check_codes(model.eval(), noise(model, 2), encode(noise(model, 2)))
    check_images(model, drawn_codes(model, 2), decode(drawn_codes(model, 2)))


def test_a_graph_is_out_of_reach_of_training():
    model = make("learned")
    encode, decode = ImagesToCodes(model), CodesToImages(model)
    images = noise(model, 4)
    codes, pictures = encode(images), decode(drawn_codes(model, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(encode(images), codes)
    assert torch.equal(decode(drawn_codes(model, 4)), pictures)


def test_a_failed_export_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "out"
    folder.mkdir()
    names = ("tokenizer.json", "encoder.pt2", "decoder.pt2")
    for name in names:
        (folder / name).write_text(f"an earlier {name}")

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Other(ImagesToCodes):
        def forward(self, images: Tensor) -> Tensor:
            return (super().forward(images) + 1) % 16

    class Brighter(CodesToImages):
        def forward(self, codes: Tensor) -> Tensor:
            return super().forward(codes).clamp_max(254) + 1

    for place, name, broken, message in (
        (torch.export, "save", full, "no space is left on the disk"),
        (exported, "ImagesToCodes", Other, "gives [0-9]+ of 25 codes that are not the model's"),
        (exported, "CodesToImages", Brighter, "gives [0-9]+ of 25 pixels that are not the model's"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, broken)
            with pytest.raises(ValueError, match=message):
                export_program(make(), folder)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            name: f"an earlier {name}" for name in names
        }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no disk that is always full")
def test_case_22_a_program_on_a_full_disk_is_an_error_and_no_abort():
    module = torch.nn.Linear(2, 2)
    part = Program(module=module, input="images", output="codes", example=torch.ones(2, 2), metadata={"grid": "[1]"})
    with pytest.raises(OSError, match="No space left"):
        torch_export._save(part, Path("/dev/full"))


@pytest.mark.usefixtures("untyped")
def test_models_that_are_no_tokenizers_in_float32_are_refused(tmp_path: Path):
    for model, message in (
        (make().half(), r"in float16, expected float32: export model.float\(\)"),
        (GaussianVAE(image_size=8, width=4, num_blocks=0), "got a GaussianVAE, expected a VQVAE"),
    ):
        with pytest.raises(ValueError, match=message):
            export_program(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(("part", "graph"), [("likelihood", CodesToImages), ("quantizer", ImagesToCodes)])
def test_kinds_that_are_not_the_library_s_are_refused(part: str, graph: type[nn.Module]):
    model = make()
    setattr(model, part, nn.Identity())
    with pytest.raises(ValueError, match="Identity has no graph: expected"):
        graph(model)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs onnxruntime, .*pip install 'vqvae-priors\[onnx\]'"):
        export_onnx(make(), tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_a_code_outside_the_codebook_is_an_error_of_the_look_up(folders: dict[str, Path], form: str):
    _, decode = load(form, folders[form])
    with pytest.raises(Exception, match=r"(?i)out of (range|data bounds)"):
        decode(torch.full((1, 5, 5), 16))
