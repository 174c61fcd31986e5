"""`vqvae report`: the page of whatever is named, several side by side, and what is refused."""

import json
import shutil

import pytest
import torch
from cli_worlds import SIZE, in_empty_folder, save_run
from PIL import Image
from report_pages import Read, check_alone

from priors import DepthTransformerPrior, UnigramPrior
from vqvae import VQVAE, GaussianVAE
from vqvae.quantizers import FSQ, EMAVectorQuantizer, ResidualQuantizer

call = pytest.fixture(in_empty_folder)
# What a folder may be called, and a class is called after its folder.
NASTY = "<img src=x onerror=alert(1)> & \"co'"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for index in range(60):
        place = folder / ("test" if index < 24 else "train") / (NASTY, "plain")[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (SIZE, SIZE), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(place / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run's folder with untrained parts, for those images."""
    return of_images(save_run(tmp_path_factory.mktemp("runs") / "small", num_classes=2), photos)


def of_images(folder, photos):
    (folder / "state").mkdir()
    (folder / "state" / "run.json").write_text(json.dumps({"data": {"source": str(photos), "root": None}}))
    return folder


def figures_of(call, run, *words):
    call("evaluate", run, *words)
    return json.loads((run / "elbo.json").read_text())


def test_figures_are_those_of_elbo_json_where_it_is_of_these_weights(call, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    figures = figures_of(call, tmp_path / "run", "-o", tmp_path / "run" / "elbo.json")
    figures |= {"distortion": 123.456, "seconds": 4000.0}  # to be told from what would be measured
    (tmp_path / "run" / "elbo.json").write_text(json.dumps(figures))
    said = call("report", tmp_path / "run", "--num", 5)
    assert "report.html" in said.out
    read = Read(tmp_path / "run" / "report.html")
    check_alone(read)
    assert "123.46" in read.text
    assert "67 min" in read.text
    assert f"{figures['rate']['transformer']:.2f}" in read.text
    assert "What each of 5 images costs" in read.text
    assert read.names.count("img") == 3 * 2 * 5 + 1
    # Of other weights, it is left out, and that is said.
    figures["models"] = "0" * 16
    (tmp_path / "run" / "elbo.json").write_text(json.dumps(figures))
    call("report", tmp_path / "run", "-o", "other.html")
    other = Read(tmp_path / "other.html")
    assert "123.46" not in other.text
    assert "of other weights" in other.text
    assert f"{figures['negative_elbo']:.2f}" in other.text  # the same, measured anew


@pytest.mark.parametrize("damage", [{"rate": {}}, {"rate": 3}, {"psnr": "<b>"}, {"images": -1}, {"dims": 0}])
def test_a_damaged_elbo_json_is_left_out(call, run, tmp_path, damage):
    shutil.copytree(run, tmp_path / "run")
    figures = figures_of(call, tmp_path / "run", "-o", tmp_path / "run" / "elbo.json")
    (tmp_path / "run" / "elbo.json").write_text(json.dumps(figures | damage))
    said = call("report", tmp_path / "run", "--num", 3)
    assert "elbo.json is not looked at" in said.err
    read = Read(tmp_path / "run" / "report.html")
    assert "damaged" in read.text
    assert "Over 3 test images" in read.text


def test_names_from_outside_are_escaped(call, run, tmp_path):
    folder = tmp_path / "<script>alert(1)<" / "<b>run & co"
    shutil.copytree(run, folder)
    call("report", folder, "-o", "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "<b>run" not in page
    assert "onerror=alert(1)>" not in page
    read = Read(tmp_path / "page.html")
    check_alone(read)
    assert "<b>run & co" in read.text
    assert NASTY in read.text
    assert any(NASTY in (value or "") for _, name, value in read.attributes if name == "alt")


def test_figures_of_the_eye_are_those_of_these_weights(call, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    figures = figures_of(call, tmp_path / "run", "-o", tmp_path / "run" / "elbo.json")
    estimate = {"value": 0.12345, "low": 0.1, "high": 0.2}
    looks = {"protocol": {"network": "of <b>mine</b>"}, "reconstructions": {"LPIPS": estimate}}
    (tmp_path / "run" / "looks.json").write_text(json.dumps(figures | {"looks": looks}))
    others = {"models": "0" * 16, "looks": looks | {"reconstructions": {"of others": estimate}}}
    (tmp_path / "run" / "others.json").write_text(json.dumps(others))
    (tmp_path / "run" / "notes.json").write_text("no JSON")
    said = call("report", tmp_path / "run")
    assert "notes.json" in said.err
    read = Read(tmp_path / "run" / "report.html")
    for told in ("Figures of the eye", "LPIPS", "0.12345", "0.1 to 0.2", "of <b>mine</b>"):
        assert told in read.text
    assert "of others" not in read.text


def test_a_model_without_a_prior_or_a_run(call, run, photos, tmp_path):
    call("report", run / "codebook", "--data", photos, "--split", "train")
    read = Read(tmp_path / "report.html")
    check_alone(read)
    assert "no prior yet" in read.text
    assert "rate, uniform prior" in read.text
    assert "Over 36 training images" in read.text
    assert "Samples" not in read.text
    assert "vqvae train" not in read.text
    assert not (run / "codebook" / "report.html").exists()


def test_vectors_and_residual_codes(call, photos, tmp_path):
    torch.manual_seed(0)
    GaussianVAE(image_size=SIZE, width=8, num_blocks=1, dim=3).save_pretrained(tmp_path / "vae")
    call("report", tmp_path / "vae", "--data", photos, "-o", "vae.html")
    read = Read(tmp_path / "vae.html")
    check_alone(read)
    assert "Usage of channels" in read.text
    assert "on 4 draws together" in read.text
    inner = EMAVectorQuantizer.Config(num_codes=8, dim=4)
    residual = ResidualQuantizer.Config(quantizer=inner, depth=3)
    folder = save_run(tmp_path / "residual", quantizer=residual, kind=DepthTransformerPrior, num_classes=None)
    of_images(folder, photos)
    call("report", folder, "-o", "residual.html")
    read = Read(tmp_path / "residual.html")
    check_alone(read)
    assert "4x4x3" in read.text
    assert "codebook 2" in read.text
    assert "rate, depth_transformer prior" in read.text


def test_several_runs_stand_in_one_table(call, run, photos, tmp_path):
    other = of_images(save_run(tmp_path / "small", quantizer=FSQ.Config(levels=(3, 3)), num_classes=2), photos)
    for folder in (run, other):
        (folder / "metrics.csv").write_text(
            "stage,step,split,name,value\ncodebook,1,test,distortion,3.5\ncodebook,2,test,distortion,nan\n"
            "codebook,3,test,distortion,2.5\nprior,3,test,rate,1\ncut,sho\ncodebook,x,test,distortion,1\n"
        )
    call("report", run, other, "--num", 10)
    read = Read(tmp_path / "compare.html")
    check_alone(read)
    # Two of one name are told apart.
    assert "small (1)" in read.text
    assert "small (2)" in read.text
    assert "the same 10 images" in read.text
    assert "Distortion, codebook" in read.text
    assert read.names.count("img") == 3 * 8
    for folder in (run, other):
        call("evaluate", folder, "-o", "figures.json")
        figures = json.loads((tmp_path / "figures.json").read_text())
        shutil.copytree(folder, tmp_path / "copies" / figures["models"])
        (tmp_path / "copies" / figures["models"] / "elbo.json").write_text(json.dumps(figures))
    copies = sorted((tmp_path / "copies").iterdir())
    call("report", *copies, "-o", "whole.html")
    whole = Read(tmp_path / "whole.html")
    assert "the same 24 images" in whole.text
    for folder in copies:
        figures = json.loads((folder / "elbo.json").read_text())
        assert f"{figures['bits_per_dim']:.4f}" in whole.text
    # Of another protocol, neither's are taken: all is measured anew on the same images.
    (copies[0] / "elbo.json").write_text(json.dumps(json.loads((copies[0] / "elbo.json").read_text()) | {"images": 7}))
    call("report", *copies, "-o", "anew.html", "--num", 9)
    assert "the same 9 images" in Read(tmp_path / "anew.html").text


def test_figures_of_the_eye_of_two_protocols_are_in_two_tables(call, run, tmp_path):
    estimate = {"value": 0.5, "low": 0.1, "high": 0.9}
    for number in range(3):
        folder = tmp_path / f"run{number}"
        shutil.copytree(run, folder)
        figures = figures_of(call, folder, "-o", folder / "elbo.json")
        looks = {"protocol": {"network": "lite0" if number < 2 else "lite2"}, "reconstructions": {"distance": estimate}}
        (folder / "elbo.json").write_text(json.dumps(figures | {"looks": looks}))
    call("report", *(tmp_path / f"run{number}" for number in range(3)))
    read = Read(tmp_path / "compare.html")
    check_alone(read)
    assert read.text.count("Figures of the eye") == 2
    first, second = read.text.split("Figures of the eye")[1:]
    assert "run0" in first
    assert "run1" in first
    assert "run2" not in first.partition("Training")[0]
    assert "run2" in second


def test_a_page_is_replaced_whole(call, run, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("before")

    def full(path, text, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(target), "write_text", full)
    said = call("report", run, "-o", target, code=2)
    monkeypatch.undo()
    assert "no space is left on the disk" in said.err.splitlines()[-1]
    assert target.read_text() == "before"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["RUN", "--num", "0"], "--num must be at least 1"),
        (["RUN", "-o", "."], "is a folder, expected the name of an HTML file"),
        (["RUN", "-o", "page.png"], "page.html"),
        (["nowhere"], "nowhere"),
        ([], "no run to report on"),
        (["RUN/codebook"], "--data"),
        (["RUN", "larger", "--num", "2"], "image_size 32"),
        (["RUN", "--data", "nothing-there"], "nothing-there"),
    ],
)
def test_mistakes_are_one_line(call, run, tmp_path, words, says):
    VQVAE(image_size=32, width=8, num_blocks=1).save_pretrained(tmp_path / "larger")
    assert says in call.refused("report", *(word.replace("RUN", str(run)) for word in words))
    assert not (run / "report.html").exists()
    assert not list(tmp_path.glob("*.html"))


def test_the_same_run_makes_the_same_bytes(call, run, tmp_path):
    unigram = UnigramPrior(num_codes=8, grid=(4, 4)).fit(torch.zeros(2, 4, 4, dtype=torch.int64))
    shutil.copytree(run, tmp_path / "run")
    unigram.save_pretrained(tmp_path / "run" / "unigram")
    for name in ("one.html", "two.html"):
        call("report", tmp_path / "run", "-o", name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert len((tmp_path / "one.html").read_bytes()) < 400_000
