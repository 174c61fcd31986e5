"""What the page of `vqvae demo` does, without a browser: pictures, costs, samples, files, and errors."""

import math

import numpy as np
import pytest
import torch
from demo_worlds import NUM_CODES, SIDE, dropped, run_in
from PIL import Image

from priors import AnyOrderPrior, Sampling
from priors.grid import TrainedOn
from vqvae import VQVAE
from vqvae.bound import elbo
from vqvae.cli.demo import maps
from vqvae.cli.demo.answers import Answers
from vqvae.cli.demo.service import Service
from vqvae.cli.demo.uploads import MOST_SIDE, read_picture
from vqvae.fingerprint import of_tokenizer
from vqvae.likelihoods import LocalContext

gradio = pytest.importorskip("gradio", reason="extra `demo`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("demo") / "run")


@pytest.fixture(scope="module")
def service(folder):
    return Service(str(folder), any_order=str(folder.parent / "any-order"), data="fashion-mini")


@pytest.fixture
def answers(service, tmp_path):
    return Answers(service, tmp_path)


def noise(height, width, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def told(function, *args):
    """What a refused request is told."""
    with pytest.raises(gradio.Error) as found:
        list(function(*args))
    assert not found.value.print_exception
    return found.value.message


def test_a_picture_of_the_models_size_costs_what_its_elbo_says(service):
    image = noise(SIDE, SIDE)
    found = service.coded(image)
    expected = elbo(service.model, service.prior, image[None])
    assert found.code_bits.sum().item() == pytest.approx(expected.rate.item() / math.log(2), rel=1e-5)
    assert found.pixel_bits.sum().item() == pytest.approx(expected.distortion.item() / math.log(2), rel=1e-5)
    assert found.bits_per_dim == pytest.approx(expected.bits_per_dim(image.numel()).item(), rel=1e-5)
    assert torch.equal(found.codes, service.model.encode(image[None])[0])
    assert torch.equal(found.decoded, service.model.reconstruct(image[None])[0])


@pytest.mark.parametrize("likelihood", [None, LocalContext.Config()])
def test_pixels_cost_the_distortion_whatever_the_likelihood(tmp_path, likelihood):
    folder = run_in(tmp_path / "run", num_channels=3)
    if likelihood is not None:
        model = VQVAE.from_pretrained(folder)
        options = {**model.config.to_plain(), "likelihood": LocalContext.Config(num_channels=1), "num_channels": 1}
        VQVAE.Config.from_plain(options).build().eval().save_pretrained(folder / "codebook")
    service = Service(str(folder), data="fashion-mini")
    image = noise(SIDE, SIDE, service.model.config.num_channels)
    expected = elbo(service.model, service.prior, image[None]).distortion.item() / math.log(2)
    assert service.coded(image).pixel_bits.sum().item() == pytest.approx(expected, rel=1e-4)


def test_a_larger_picture_is_its_tiles(service):
    image = noise(SIDE + 3, 2 * SIDE)
    found = service.coded(image)
    assert found.codes.shape == found.code_bits.shape == (8, 8)
    assert found.decoded.shape == image.shape
    assert found.pixel_bits.shape == image.shape[1:]
    whole = service.coded(image[:, :SIDE, SIDE:])
    assert torch.equal(found.codes[:4, 4:], whole.codes)
    torch.testing.assert_close(found.pixel_bits[:SIDE, SIDE:], whole.pixel_bits)
    assert torch.equal(found.decoded[:, :SIDE, SIDE:], whole.decoded)


def test_an_exchanged_code_changes_that_place(service):
    found = service.coded(noise(SIDE, SIDE))
    other = (int(found.codes[1, 2]) + 1) % NUM_CODES
    changed = service.exchanged(found, (1, 2), other)
    assert changed.codes[1, 2] == other
    assert (changed.codes != found.codes).sum() == 1
    assert not torch.equal(changed.decoded, found.decoded)
    for position, code, said in (((1, 2), NUM_CODES, "expected one of 0 to 15"), ((4, 0), 0, "a grid of 4 by 4")):
        with pytest.raises(ValueError, match=said):
            service.exchanged(found, position, code)


def test_samples_come_block_by_block_and_by_seed(service):
    blocks = list(service.sample(6, 1, Sampling(temperature=0.9), 3))
    assert [len(codes) for codes, _ in blocks] == [4, 2]
    again = list(service.sample(6, 1, Sampling(temperature=0.9), 3))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(blocks, again, strict=True))
    assert torch.equal(blocks[0][1], service.model.decode(blocks[0][0]))
    other = next(service.sample(6, 1, Sampling(temperature=0.9), 4))
    assert not torch.equal(blocks[0][0], other[0])
    (codes, _), *_ = service.sample(2, None, Sampling(num_steps=2), 0, in_any_order=True)
    assert codes.shape == (2, 4, 4)


def test_a_file_comes_back_and_a_text_is_one(service, folder):
    image = noise(SIDE + 2, SIDE)
    found = service.compress(image)
    assert found.same
    assert found.sizes["this model"] == len(found.data)
    assert found.sizes["JPEG-XL"]
    assert torch.equal(service.decompress(found.data)[0], image)
    images, used, same = service.dream("To be, or not to be", 2)
    assert same
    assert len(images) in (1, 2)
    assert used > 0


def test_codes_are_counted_and_shown(service):
    views = service.codebook
    assert views.counts.sum() == 1000 * 16
    assert torch.equal(views.counts, service.model.encode(service.images).flatten().bincount(minlength=NUM_CODES))
    used, unused = int(views.ranked[0]), int(views.ranked[-1])
    assert views.in_context(used)[0].shape == (1, 6, 6)
    vectors = service.model.quantizer.decode(torch.arange(NUM_CODES)[:, None])[:, 0]
    near = (vectors - vectors[used]).norm(dim=1).argsort()[1:4].tolist()
    assert views.neighbours(used, 3) == near
    assert views.atlas([used, unused]).shape == (2, 1, 2, 2)


def test_pictures_of_bits_and_codes():
    picture = maps.heat(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), 8)
    assert picture.shape == (8, 8, 3)
    assert picture[0, 0].sum() < picture[0, -1].sum() < picture[-1, -1].sum()
    codes = maps.code_map(torch.tensor([[1, 2], [2, 1]]), 4)
    assert (codes[0, 0] == codes[-1, -1]).all()
    assert (codes[0, 0] != codes[0, -1]).any()
    equal = maps.difference(torch.full((1, 2, 2), 7, dtype=torch.uint8), torch.full((1, 2, 2), 7, dtype=torch.uint8))
    assert (equal == 128).all()
    framed = maps.marked(np.zeros((40, 40, 3), np.uint8), (4, 4), (1, 2))
    assert framed[10:20, 20:30].any()
    assert not framed[:10].any()


# --------------------------------------------------------------------------------------------- what is dropped on it


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text.png", "cannot be read as a picture: not an image in a known format"),
        ("empty.png", "the file is empty"),
        ("huge.png", "more than 50 million pixels"),
        ("line.png", "900x2 pixels, which is a line"),
    ],
)
def test_what_is_no_picture_is_told_in_words(answers, tmp_path, name, said):
    files = dropped(tmp_path)
    words = told(answers.reconstruct, str(files[name]))
    assert said in words
    assert str(tmp_path) not in words


def test_of_an_animation_the_first_frame_is_taken_and_large_pictures_are_scaled_down(tmp_path):
    files = dropped(tmp_path)
    with Image.open(files["moving.gif"]) as moving:
        first = np.asarray(moving.convert("L"))
    Image.new("1", (10_000, 6000)).save(tmp_path / "wide.png")
    with pytest.raises(ValueError, match="60 million pixels, expected at most 50 million"):
        read_picture(tmp_path / "wide.png", 1)
    assert (read_picture(files["moving.gif"], 1)[0].numpy() == first).all()
    Image.new("L", (2000, 1000)).save(tmp_path / "large.png")
    assert read_picture(tmp_path / "large.png", 3).shape == (3, MOST_SIDE // 2, MOST_SIDE)
    with pytest.raises(ValueError, match="there is no picture yet"):
        read_picture(None, 1)
    with pytest.raises(ValueError, match="not there any more"):
        read_picture(tmp_path / "gone.png", 1)


def test_a_large_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("vqvae.cli.demo.uploads.MOST_BYTES", 1 << 20)
    (tmp_path / "large.png").write_bytes(bytes(3 << 20))
    with pytest.raises(ValueError, match="has 3 MB, expected at most 1"):
        read_picture(tmp_path / "large.png", 1)


def test_answers_are_pictures_files_and_words(answers, tmp_path):
    good = str(dropped(tmp_path)["good.png"])
    decoded, change, codes, code_bits, pixel_bits, words = answers.reconstruct(good, False)
    assert decoded.shape == change.shape
    assert codes.shape[2] == code_bits.shape[2] == pixel_bits.shape[2] == 3
    assert "PSNR" in words
    *_, (images, path) = answers.sample("2", 5, 1, 0.9, 1.5, 8, 0.9)
    assert len(images) == 5
    assert np.load(path).shape == (5, 4, 4)
    file, table, _ = answers.compress(good)
    assert "equal to the last bit" in table
    assert len(answers.decompress(file)) == 1
    pictures, sentence = answers.dream("some words", 1)
    assert len(pictures) == 1
    assert "give the same bytes" in sentence
    contexts, near, sentence = answers.code(3)
    assert contexts
    assert len(near) == 8
    assert sentence.startswith("Code 3 stands at")
    assert answers.atlas()
    state, _, _ = answers.open(good)
    _, _, words = answers.exchange((state[0], (0, 1)), 5)
    assert words.startswith("Row 1, column 2: code 5")
    with Image.open(good) as picture:
        value = {"background": picture.convert("RGB"), "layers": [Image.new("RGBA", picture.size, (1, 1, 1, 255))]}
    *_, found = answers.inpaint(value, "any", 2, 0)
    assert len(found) == 2


def test_wrong_requests_are_told_in_words(answers, tmp_path):
    picture = Image.new("RGB", (20, 20))
    other = {"background": picture, "layers": [Image.new("RGBA", (10, 20), (1, 1, 1, 255))]}
    clear = {"background": picture, "layers": [Image.new("RGBA", (20, 20))]}
    file = tmp_path / "words.vq"
    file.write_text("no file of bits")
    cases = [
        (answers.sample, ("9", 4), "got class '9', expected any or one of 0, 1, 2"),
        (answers.sample, ("any", 4, 0, 1.0, 2.0), "guidance leads towards a class"),
        (answers.sample, ("any", 65), "got 65 images, expected 1 to 64"),
        (answers.sample, ("any", 4, -1), "got seed -1"),
        (answers.inpaint, (None,), "there is no picture yet"),
        (answers.inpaint, (other,), "the mask is of 10x20 pixels, expected the picture's 20x20"),
        (answers.inpaint, (clear,), "nothing is painted"),
        (answers.decompress, (str(file),), "no file of this codec"),
        (answers.decompress, (None,), "there is no file yet"),
        (answers.dream, ("  ", 1), "there is no text yet"),
        (answers.dream, ("x" * 30_000, 1), "expected at most 20,000"),
        (answers.code, (16,), "got code 16, expected one of 0 to 15"),
        (answers.code, (None,), "no number where a code belongs"),
        (answers.sample, ("any", 4, None), "no number where a seed belongs"),
        (answers.exchange, (None, 1), "open a picture"),
    ]
    for function, args, said in cases:
        assert said in told(function, *args), said


def test_a_fault_is_told_without_a_stack_of_calls(answers, monkeypatch):
    monkeypatch.setattr(answers, "_read", lambda *_: 1 / 0)
    assert told(answers.reconstruct, "x").startswith("this went wrong here, and is a fault: ZeroDivisionError")


def test_a_service_is_for_one_code_a_position(tmp_path, folder):
    VQVAE(image_size=8, width=8, num_blocks=0).eval().save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="has no prior"):
        Service(str(tmp_path / "alone"))
    with pytest.raises(ValueError, match="no model folder at"):
        Service(str(tmp_path / "nothing"))
    without = Service(str(folder))
    assert without.any_order is None
    other = VQVAE(image_size=8, width=8, num_blocks=0, downsampling=2, quantizer=without.model.config.quantizer)
    other.eval().save_pretrained(tmp_path / "other")
    prior = AnyOrderPrior.from_pretrained(folder.parent / "any-order")
    prior.trained_on = TrainedOn(tokenizer=of_tokenizer(other), images="0" * 32)
    prior.save_pretrained(tmp_path / "any-order")
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        Service(str(folder), any_order=str(tmp_path / "any-order"))
    assert without.images.shape == (100, 1, SIDE, SIDE)  # as the run does not say which images it is of
    with pytest.raises(ValueError, match="no prior in any order"):
        next(without.sample(1, None, Sampling(), 0, in_any_order=True))


def test_the_packaged_page_has_a_prior_in_any_order():
    assert Service("fashion-28").any_order is not None
