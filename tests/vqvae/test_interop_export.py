"""Exported tokenizers: graphs, torch.export and ONNX against the model, and what is refused."""

import copy
import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from export_worlds import FORMS, LIKELIHOODS, check_codes, check_export, check_images, drawn_codes, load, make, noise
from quantizer_worlds import MEMBERS, PARAMS
from test_interop_places import names_no_place
from torch import Tensor, nn

from vqvae.gaussian import GaussianVAE
from vqvae.interop import code_graphs, compare_codes, export_onnx, export_program, exported, onnx, traced
from vqvae.interop.traced import CodesToImages, ImagesToCodes
from vqvae.quantizers import MASKED, VectorQuantizer
from vqvae.vqgan import VQGAN

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


# One of each class of graph.
GRAPHS = ("learned", "gumbel", "fsq", "bsq", "projected learned", "grouped ema", "residual ema", "multiscale ema")
# Options of training, without which a graph is the same; `test_graphs_are_encode_and_decode` has them all.
OF_TRAINING = ("rotation", "clustered", "dropout", "no revival", "soft", "one sample")
# And kinds whose graph within another is that of `ema`: the nearest of a table.
TABLES = ("learned", "soft em", "simvq", "sqvae")
SAME = tuple(f"{outer} {inner}" for outer in ("grouped", "residual", "multiscale") for inner in TABLES)
EXPORTED = [name for name in MEMBERS if not name.endswith(OF_TRAINING) and name not in SAME]
# ONNX is made of the programs of torch.export. Of compositions it has one of each class, and those of compositions.
OUTER = ("projected", "grouped", "residual", "multiscale")
TWICE = tuple(f"{outer} {inner}" for outer in OUTER for inner in OUTER)
QUANTIZERS = [
    *(("program", name) for name in EXPORTED),
    *(("onnx", name) for name in EXPORTED if name in GRAPHS or not name.startswith(OUTER) or name.startswith(TWICE)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name"), QUANTIZERS)
@pytest.mark.usefixtures("untyped")
def test_exports_of_every_quantizer_equal_the_model(tmp_path: Path, form: str, name: str):
    check_export(make(name), form, tmp_path / "out")


# With the sums of a mixture as long as they are; the others have a graph of a tenth of the length.
LONG = {("program", "mixture", 1), ("onnx", "mixture with zero", 1)}
CASES = [(form, name, num_channels) for form in FORMS for name in LIKELIHOODS for num_channels in (1, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "name", "num_channels"), CASES)
@pytest.mark.usefixtures("untyped")
def test_exports_of_every_likelihood_equal_the_model(
    tmp_path: Path, form: str, name: str, num_channels: int, monkeypatch: pytest.MonkeyPatch
):
    if (form, name, num_channels) not in LONG:
        monkeypatch.setattr(traced, "LEVELS", 51)
    check_export(make("ema", name, num_channels, large=True), form, tmp_path / "out")


@pytest.mark.parametrize("spatial_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["program", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("untyped")
def test_exports_of_a_vqgan_equal_the_model(tmp_path: Path, form: str, spatial_norm: bool):
    torch.manual_seed(0)
    config = VQGAN.Config(
        image_size=8,
        channels=(32, 32),
        num_blocks=1,
        latent_channels=4,
        spatial_norm=spatial_norm,
        quantizer=VectorQuantizer.Config(num_codes=16, dim=4),
    )
    # A group norm of no images is an error in onnxruntime.
    check_export(config.build().eval(), form, tmp_path / "out", empty=form == "program")


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


@pytest.mark.usefixtures("untyped")
def test_an_export_is_judged_by_a_copy_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under autocast, which would be traced; and whatever the live model's own arithmetic is, as a GPU has another."""
    model = make()
    images = noise(model, 3)
    codes = model.encode(images)
    judges = []
    compare = exported.compare_codes
    monkeypatch.setattr(exported, "compare_codes", lambda judge, *rest: judges.append(judge) or compare(judge, *rest))
    with torch.autocast("cpu", torch.bfloat16):
        export_program(model, tmp_path / "out")
    assert judges
    assert all(judge is not model and next(judge.parameters()).device.type == "cpu" for judge in judges)
    encode, _ = load("program", tmp_path / "out")
    check_codes(model, images, encode(images))
    assert compare_codes(model, images, encode(images)).num_equal == codes.numel()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.usefixtures("untyped")
def test_a_model_on_a_gpu_is_exported(tmp_path: Path):
    model = make(large=True)
    export_program(copy.deepcopy(model).cuda(), tmp_path / "out")
    encode, decode = load("program", tmp_path / "out")
    images = noise(model, 3)
    check_codes(model, images, encode(images))
    check_images(model, drawn_codes(model, 3), decode(drawn_codes(model, 3)))
    assert compare_codes(copy.deepcopy(model).cuda(), images.cuda(), encode(images)).num_wrong == 0


def test_the_folder_says_how_to_call_what_is_in_it(folders: dict[str, Path]):
    folder = folders["onnx"]
    info = json.loads((folder / "tokenizer.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["decoder.onnx", "encoder.onnx", "tokenizer.json"]
    assert info["grid"] == [5, 5]
    assert info["num_codes"] == 16
    assert info["encoder"]["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 1, 5, 5]}
    assert info["decoder"]["input"] == {"name": "codes", "dtype": "int64", "shape": ["batch", 5, 5]}
    session = onnxruntime.InferenceSession(folder / info["encoder"]["file"])
    assert [(each.name, each.shape, each.type) for each in (*session.get_inputs(), *session.get_outputs())] == [
        ("images", ["batch", 1, 5, 5], "tensor(uint8)"),
        ("codes", ["batch", 5, 5], "tensor(int64)"),
    ]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["grid"]) == [5, 5]
    assert json.loads(metadata["num_codes"]) == 16
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


@pytest.mark.parametrize("form", FORMS)
def test_a_model_in_training_stays_as_it_is(tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture):
    model = make().train()
    model.decoder.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layouts = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        FORMS[form](model, tmp_path / "out")
    assert not caplog.records
    assert model.training
    assert model.encoder.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.stride() == layouts[name] for name, tensor in model.state_dict().items())


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


def test_weights_beside_the_file_move_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnx, "MOST_BYTES", 0)
    model = make()
    export_onnx(model, tmp_path / "out")
    assert (tmp_path / "out" / "encoder.onnx.data").stat().st_size > 0
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    encode, decode = load("onnx", tmp_path / "elsewhere")
    check_codes(model, noise(model, 2), encode(noise(model, 2)))
    check_images(model, drawn_codes(model, 2), decode(drawn_codes(model, 2)))


def test_a_failed_export_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    earlier = {
        form: ("tokenizer.json", *(f"{part}.{suffix}" for part in ("encoder", "decoder")))
        for form, suffix in (("program", "pt2"), ("onnx", "onnx"))
    }
    for form, names in earlier.items():
        (tmp_path / form).mkdir()
        for name in names:
            (tmp_path / form / name).write_text(f"an earlier {name}")

    def check(problem: str, form: str = "program") -> None:
        with pytest.raises(ValueError, match=problem):
            FORMS[form](make(), tmp_path / form)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["onnx", "program"]
        assert {path.read_text() for path in (tmp_path / form).iterdir()} == {
            f"an earlier {name}" for name in earlier[form]
        }

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", full)
        patch.setattr(torch.onnx.ONNXProgram, "save", full)
        for form in FORMS:
            check("no space is left on the disk", form)

    class Other(ImagesToCodes):
        def forward(self, images: Tensor) -> Tensor:
            return (super().forward(images) + 1) % 16

    with monkeypatch.context() as patch:
        patch.setattr(exported, "ImagesToCodes", Other)
        check("gives [0-9]+ of 25 codes that are not the model's")

    class Brighter(CodesToImages):
        def forward(self, codes: Tensor) -> Tensor:
            return super().forward(codes).clamp_max(254) + 1

    with monkeypatch.context() as patch:
        patch.setattr(exported, "CodesToImages", Brighter)
        check("gives [0-9]+ of 25 pixels that are not the model's")


def test_other_files_are_not_removed(tmp_path: Path):
    model = make()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds other things, config.json, model.safetensors, .* take another folder"):
        export_program(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
    # Names that only begin like those of an export.
    for name in ("encoder/precious.txt", "encoder.py", "decoder.safetensors", "encoder.onnx"):
        path = tmp_path / name.replace(".", "-").replace("/", "-") / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(ValueError, match=f"holds other things, {name.split('/')[0]}, "):
            export_program(model, tmp_path / name.replace(".", "-").replace("/", "-"))
        assert path.read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file is a file, expected a folder"):
        export_program(model, tmp_path / "file")


@pytest.mark.parametrize("convert", [nn.Module.double, nn.Module.half, nn.Module.bfloat16])
def test_other_precisions_are_refused(tmp_path: Path, convert: Callable[[nn.Module], nn.Module]):
    with pytest.raises(ValueError, match=r"in (b?float\d+), expected float32: export model.float\(\)"):
        export_program(convert(make()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untyped")
def test_models_without_codes_are_refused(tmp_path: Path):
    model = GaussianVAE.Config(image_size=8, width=4, num_blocks=0).build()
    with pytest.raises(ValueError, match="got a GaussianVAE, expected a VQVAE"):
        export_program(model, tmp_path / "out")


@pytest.mark.usefixtures("untyped")
def test_kinds_that_are_not_the_library_s_are_refused():
    model = make()
    model.likelihood = nn.Identity()
    with pytest.raises(ValueError, match="Identity has no graph: expected LogisticMixture"):
        CodesToImages(model)
    model = make()
    model.quantizer = nn.Identity()
    with pytest.raises(ValueError, match=r"Identity has no graph: expected a quantizer of vqvae.quantizers"):
        ImagesToCodes(model)


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(ValueError, match=rf"needs {missing}, .*pip install 'vqvae-priors\[onnx\]'"):
        export_onnx(make(), tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_a_code_outside_the_codebook_is_an_error_of_the_look_up(folders: dict[str, Path], form: str):
    _, decode = load(form, folders[form])
    with pytest.raises(Exception, match=r"(?i)out of (range|data bounds)"):
        decode(torch.full((1, 5, 5), 16))
