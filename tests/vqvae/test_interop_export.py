"""Exported tokenizers: graphs, torch.export and ONNX against the model, ties and what is none, and what is refused."""

import copy
import errno
import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantizer_worlds import KINDS, MEMBERS, PARAMS, trained
from torch import Tensor, nn

from vqvae import VQVAE, VQVAEConfig
from vqvae.gaussian import GaussianVAEConfig
from vqvae.interop import (
    Agreement,
    CodesToImages,
    ImagesToCodes,
    code_graphs,
    compare_codes,
    export_onnx,
    export_program,
    exported,
    onnx,
    traced,
)
from vqvae.interop.ties import count_wrong_pixels
from vqvae.likelihoods import CategoricalConfig, LocalContextConfig, LogisticMixtureConfig, NormalConfig
from vqvae.quantizers import MASKED, ResidualQuantizerConfig, VectorQuantizer, VectorQuantizerConfig
from vqvae.vqgan import VQGANConfig

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

FORMS = {"program": export_program, "onnx": export_onnx}
LIKELIHOODS = {
    "normal": NormalConfig(),
    "mixture": LogisticMixtureConfig(num_components=2),
    "mixture with zero": LogisticMixtureConfig(num_components=2, zero_component=True),
    "context": LocalContextConfig(num_components=2, width=4, num_blocks=1),
    "categorical": CategoricalConfig(),
}


@functools.cache
def _made(quantizer: str, likelihood: str, num_channels: int, large: bool) -> VQVAE:
    torch.manual_seed(0)
    model = VQVAE(
        VQVAEConfig(
            image_size=20 if large else 5,
            num_channels=num_channels,
            width=32 if large else 4,
            downsampling=4 if large else 1,
            num_blocks=1 if large else 0,
            attention=large,
            quantizer=MEMBERS[quantizer].config,
            likelihood=LIKELIHOODS[likelihood],
        )
    )
    model.quantizer = trained(quantizer)
    return _shaken(model).eval()


def _shaken(model: VQVAE) -> VQVAE:
    """With weights that make something of an image; fresh ones are the identity here and zero there."""
    for part in (model.encoder, model.decoder):
        for weight in part.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=1.4 / weight[0].numel() ** 0.5)
    return model


def make(quantizer: str = "ema", likelihood: str = "normal", num_channels: int = 1, large: bool = False) -> VQVAE:
    """A model of the member with 5 x 5 places; a large one has all parts of the networks."""
    return copy.deepcopy(_made(quantizer, likelihood, num_channels, large))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The exports of `make()`."""
    found = {}
    for form, export in FORMS.items():
        found[form] = tmp_path_factory.mktemp("exports") / form
        export(make(), found[form])
    return found


def noise(model: VQVAE, num: int, seed: int = 0) -> Tensor:
    size = model.config.image_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, model.config.num_channels, size, size), generator=generator).to(torch.uint8)


def drawn_codes(model: VQVAE, num: int) -> Tensor:
    return torch.randint(model.num_codes, (num, *model.grid), generator=torch.Generator().manual_seed(num))


def check_codes(model: VQVAE, images: Tensor, codes: Tensor) -> None:
    assert codes.dtype == torch.int64
    agreement = compare_codes(model, images, codes)
    assert agreement.num_wrong == 0
    assert agreement.num_ties <= 1
    assert agreement.num_equal + agreement.num_ties == codes.numel()


def check_images(model: VQVAE, codes: Tensor, images: Tensor) -> None:
    assert images.dtype == torch.uint8
    assert images.shape[1:] == (model.config.num_channels, model.config.image_size, model.config.image_size)
    num_other, num_wrong = count_wrong_pixels(model, codes, images)
    assert num_wrong == 0
    assert num_other <= 1 + images.numel() // 1000
    assert (images.int() - model.decode(codes).int()).abs().amax() <= 1


def load(form: str, folder: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Encoder and decoder, as somebody without this library calls them."""
    if form == "program":
        encode, decode = (torch.export.load(folder / f"{part}.pt2").module() for part in ("encoder", "decoder"))
        return encode, decode

    sessions = [
        onnxruntime.InferenceSession(folder / f"{part}.onnx", providers=["CPUExecutionProvider"])
        for part in ("encoder", "decoder")
    ]
    return (
        lambda images: torch.from_numpy(sessions[0].run(["codes"], {"images": images.numpy()})[0]),
        lambda codes: torch.from_numpy(sessions[1].run(["images"], {"codes": codes.numpy()})[0]),
    )


def check_export(model: VQVAE, form: str, folder: Path, empty: bool = True) -> None:
    """Both programs against the model, in batches of several sizes, of none too unless told otherwise."""
    FORMS[form](model, folder)
    encode, decode = load(form, folder)
    for num in (1, 2, 5):
        images = noise(model, num)
        check_codes(model, images, encode(images))
        codes = drawn_codes(model, num)
        check_images(model, codes, decode(codes))
    if empty:
        assert encode(noise(model, 0)).shape == (0, *model.grid)
        assert decode(drawn_codes(model, 0)).shape == noise(model, 0).shape


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


# One of each class of graph; the others take minutes.
GRAPHS = ("learned", "gumbel", "fsq", "bsq", "projected learned", "grouped ema", "residual ema", "multiscale ema")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in GRAPHS else pytest.mark.slow) for name in MEMBERS]
)
@pytest.mark.usefixtures("untyped")
def test_exports_of_every_quantizer_equal_the_model(tmp_path: Path, form: str, name: str):
    check_export(make(name), form, tmp_path / "out")


FAST = {("program", "mixture", 3), ("program", "context", 1), ("program", "categorical", 3), ("onnx", "mixture", 1)}
CASES = [(form, name, num_channels) for form in FORMS for name in LIKELIHOODS for num_channels in (1, 3)]


@pytest.mark.parametrize(
    ("form", "name", "num_channels"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES],
)
@pytest.mark.usefixtures("untyped")
def test_exports_of_every_likelihood_equal_the_model(
    tmp_path: Path, form: str, name: str, num_channels: int, monkeypatch: pytest.MonkeyPatch
):
    if (form, name, num_channels) in FAST:
        monkeypatch.setattr(traced, "LEVELS", 51)  # a graph of a tenth of the length
    check_export(make("ema", name, num_channels, large=True), form, tmp_path / "out")


@pytest.mark.parametrize("spatial_norm", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("untyped")
def test_exports_of_a_vqgan_equal_the_model(tmp_path: Path, form: str, spatial_norm: bool):
    torch.manual_seed(0)
    config = VQGANConfig(
        image_size=8,
        channels=(32, 32),
        num_blocks=1,
        latent_channels=4,
        spatial_norm=spatial_norm,
        quantizer=VectorQuantizerConfig(num_codes=16, dim=4),
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


# Ties.


def midway(depth: int = 1) -> tuple[VQVAE, Tensor, Tensor]:
    """A model of 2 codes whose feature at the first place of an image is midway between them but for rounding."""
    torch.manual_seed(0)
    quantizer = ResidualQuantizerConfig(depth=depth, quantizer=VectorQuantizerConfig(num_codes=2, dim=6))
    model = _shaken(
        VQVAE(VQVAEConfig(image_size=10, width=4, downsampling=2, num_blocks=1, quantizer=quantizer)).eval()
    )
    images = noise(model, 1)
    feature = model.encoder(images)[0, 0, 0].detach()
    away = torch.linspace(-1, 1, 6)
    codebook(model, 0).data.copy_(torch.stack([feature + away, feature - away]))
    return model, images, away


def codebook(model: VQVAE, step: int) -> nn.Parameter:
    quantizer = model.quantizer.steps[step]
    assert isinstance(quantizer, VectorQuantizer)
    return quantizer.codebook


def test_either_of_two_codes_is_right_where_they_tie():
    model, images, away = midway()
    codes = model.encode(images)
    other = codes.clone()
    other[0, 0, 0] = 1 - codes[0, 0, 0]
    assert compare_codes(model, images, codes) == Agreement(
        num_codes_compared=25, num_equal=25, num_ties=0, num_wrong=0
    )
    assert compare_codes(model, images, other) == Agreement(
        num_codes_compared=25, num_equal=24, num_ties=1, num_wrong=0
    )
    # A ten thousandth of the distance further it is none.
    with torch.no_grad():
        codebook(model, 0)[other[0, 0, 0, 0]] -= 2e-4 * away * (1 - 2 * other[0, 0, 0, 0])
    nearer = model.encode(images)[0, 0, 0]
    other[0, 0, 0] = 1 - nearer
    assert compare_codes(model, images, other).num_wrong == 1


def test_a_code_after_a_tie_is_judged_on_its_own_path():
    model, images, _ = midway(depth=2)
    codes = model.encode(images)
    other = codes.clone()
    first = other[0, 0, 0]
    first[0] = 1 - first[0]
    # What either code leaves is the opposite of what the other leaves; the second step's codes are those.
    feature = model.encoder(images)[0, 0, 0].detach()
    with torch.no_grad():
        codebook(model, 1).copy_(feature - codebook(model, 0))
    codes = model.encode(images)
    assert codes[0, 0, 0, 0] == codes[0, 0, 0, 1]
    other = codes.clone()
    other[0, 0, 0] = 1 - other[0, 0, 0]
    found = compare_codes(model, images, other)
    assert (found.num_ties, found.num_wrong) == (2, 0)
    other[0, 0, 0, 1] = codes[0, 0, 0, 1]  # the model's own code, which is wrong after the other first one
    found = compare_codes(model, images, other)
    assert (found.num_ties, found.num_wrong) == (1, 1)
    assert found.num_equal == codes.numel() - 2


def test_copies_of_a_code_tie():
    model = make("learned")
    images = noise(model, 4)
    with torch.no_grad():
        model.quantizer.codebook[8:] = model.quantizer.codebook[:8]
    codes = model.encode(images)
    found = compare_codes(model, images, codes + 8)
    assert found.num_ties == codes.numel()


@pytest.mark.parametrize("name", KINDS)
def test_another_rounding_ties_and_another_model_is_wrong(name: str):
    model = make(name)
    images = noise(model, 64)

    def moved(scale: float) -> Agreement:
        """Of codes of the same model, with weights that are off by this much."""
        other = copy.deepcopy(model)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in other.encoder.parameters():
                weight *= 1 + scale * torch.randn_like(weight)
        return compare_codes(model, images, other.encode(images))

    assert moved(3e-8).num_wrong == 0
    assert moved(1e-2).num_wrong >= 5
    wrong = model.encode(images)
    wrong[:, ..., 0] = (wrong[:, ..., 0] + 1) % model.num_codes
    assert compare_codes(model, images, wrong).num_wrong > wrong[..., 0].numel() * 0.9


def test_codes_of_a_vqgan_are_judged():
    torch.manual_seed(0)
    quantizer = VectorQuantizerConfig(num_codes=16, dim=4)
    model = VQGANConfig(image_size=8, channels=(32, 32), num_blocks=1, latent_channels=4, quantizer=quantizer).build()
    codes = model.encode(noise(model, 8))
    found = compare_codes(model, noise(model, 8), (codes + 1) % 16)
    assert found.num_wrong > codes.numel() * 0.9
    assert model.training


@pytest.mark.usefixtures("untyped")
def test_codes_that_no_model_gives_are_refused():
    model = make()
    images = noise(model, 2)
    codes = model.encode(images)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 5\), got torch.int64 of shape \(1, 5, 5\)"):
        compare_codes(model, images, codes[:1])
    for code in (16, -1):
        with pytest.raises(ValueError, match=r"codes must lie in \[0, 16\)"):
            compare_codes(model, images, torch.full_like(codes, code))


def test_another_level_is_right_at_the_edge_alone():
    model = make(large=True)
    codes = drawn_codes(model, 4)
    estimate = model.likelihood.point(model.decoder(model.vectors(codes)))
    images = model.decode(codes)
    assert count_wrong_pixels(model, codes, images) == (0, 0)
    inside = (estimate > 1) & (estimate < 254)
    other = torch.where(inside, images.int() + 1, images.int()).to(torch.uint8)
    num_other, num_wrong = count_wrong_pixels(model, codes, other)
    assert num_other == inside.sum()
    edge = (estimate - images.float()) > 0.5 - 1 / 64
    assert num_wrong == (inside & ~edge).sum()
    assert (inside & edge).sum() > 0


# What an export leaves, and what it refuses.


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
def test_no_file_names_a_folder_of_this_machine(tmp_path: Path, folders: dict[str, Path], form: str):
    shutil.copytree(folders[form], tmp_path / "out")
    for path in (tmp_path / "out").glob("*.pt2"):
        shutil.unpack_archive(path, tmp_path / "out" / path.stem, "zip")
    contents = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(b"encoder.layers" in content for content in contents)  # names are there to be found
    for content in contents:
        assert str(Path(traced.__file__).parents[2]).encode() not in content
        assert b"traced.py" not in content


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
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("tokenizer.json", "encoder.onnx", "decoder.onnx"):
        (folder / name).write_text(f"an earlier {name}")

    def check(problem: str, export: Callable[[VQVAE, Path], None] = export_program) -> None:
        with pytest.raises(ValueError, match=problem):
            export(make(), folder)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        assert {path.read_text() for path in folder.iterdir()} == {
            f"an earlier {name}" for name in ("tokenizer.json", "encoder.onnx", "decoder.onnx")
        }

    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "save", full)
        patch.setattr(torch.onnx.ONNXProgram, "save", full)
        for export in FORMS.values():
            check("no space is left on the disk", export)

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
    with pytest.raises(ValueError, match=r"holds other files, such as config.json, .* a folder of its own"):
        export_program(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
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
    model = GaussianVAEConfig(image_size=8, width=4, num_blocks=0).build()
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
