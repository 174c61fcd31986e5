"""What random crops, flips and turns show, what they depend on, and that they are cut out of the whole picture."""

import itertools
import math
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import chw, noise, save
from PIL import Image
from torchvision.transforms import v2

from safefolder.options import Options
from vqvae.data import Images, ImageTensors, batches, load_images
from vqvae.data.augmentation import LARGE, MARGIN, Augment, Variation
from vqvae.data.decoding import fit, refit
from vqvae.data.views import View, room

# Workers are forked from a process with threads.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

PHOTO = Augment(crop=0.5, flip=True, rotate=5.0)
AUGMENTS = {
    "crop": Augment(crop=0.3),
    "flip": Augment(flip=True),
    "rotate": Augment(rotate=10.0),
    "all": PHOTO,
}


def variation(augment: Augment, epoch: int = 0, seed: int = 0) -> Variation:
    return Variation(augment=augment, seed=seed, epoch=epoch)


def smooth(height: int, width: int, detail: int = 16) -> np.ndarray:
    """A picture whose blotches are so many pixels wide."""
    small = Image.fromarray(noise(max(2, height // detail), max(2, width // detail), 3))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of several shapes, one of them large, one of them no picture."""
    for number, size in enumerate([(24, 40), (40, 24), (8, 8), (200, 320), (17, 90), (30, 30), (9, 9)]):
        save(tmp_path / "train" / f"{number}.png", smooth(*size))
    (tmp_path / "train" / "broken.png").write_bytes(b"broken")
    save(tmp_path / "test" / "0.png", smooth(20, 20))
    return tmp_path


def in_memory() -> ImageTensors:
    return ImageTensors(torch.from_numpy(noise(7, 3, 8, 8)), torch.arange(7))


def taken(images: Images, augment: Augment, num: int = 12, **options: object) -> list[torch.Tensor]:
    stream = batches(images, 3, seed=1, augment=augment, **options)
    with_all = list(itertools.islice(stream, num))
    stream.close()
    return [batch.images for batch in with_all]


# What a view shows


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    crop=st.floats(0.01, 1),
    rotate=st.floats(0, 45),
    index=st.integers(0, 1 << 40),
)
def test_a_view_lies_in_its_picture(width, height, size, crop, rotate, index):
    augment = Augment(crop=crop, rotate=rotate, flip=True)
    view = variation(augment).view(index, width, height, size)
    left, top, right, bottom = view.box
    assert -1e-6 <= left < right <= width + 1e-6
    assert -1e-6 <= top < bottom <= height + 1e-6
    assert abs(view.degrees) <= rotate
    # What is inside the box once it is turned has proportions between those of `ratio`, or is as near as it gets.
    wider, higher = room(view.degrees, size) if view.degrees else (1.0, 1.0)
    across, down = (right - left) / wider, (bottom - top) / higher
    aspect = across / down / (size[1] / size[0])
    low, high = augment.ratio if crop < 1 else (1, 1)
    assert low - 1e-6 <= aspect <= high + 1e-6
    if crop < 1 and not view.degrees and low < width / height / (size[1] / size[0]) < high:
        assert across * down >= crop * width * height * (1 - 1e-6)


def test_crops_are_distributed_as_those_of_torchvision():
    """Share of the area, proportions and place of 4,000 crops of a picture of 3:2, in their quantiles."""
    width, height, num = 300, 200, 4000
    augment = Augment(crop=0.25)
    boxes = np.array([variation(augment).view(index, width, height, (64, 64)).box for index in range(num)])
    torch.manual_seed(0)
    image = torch.zeros(1, height, width)
    peer = v2.RandomResizedCrop(64, scale=(0.25, 1.0), ratio=augment.ratio)
    asked = (peer.make_params([image]) for _ in range(num))
    found = np.array([(p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]) for p in asked], float)

    def figures(box: np.ndarray) -> np.ndarray:
        across, down = box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]
        centres = (box[:, 0] + box[:, 2]) / 2 / width, (box[:, 1] + box[:, 3]) / 2 / height
        return np.stack([across * down / width / height, across / down, *centres])

    shares = np.linspace(0.05, 0.95, 10)
    ours, theirs = (np.quantile(figures(box), shares, axis=1) for box in (boxes, found))
    assert np.abs(ours - theirs).max() < 0.03
    assert np.abs(figures(boxes).mean(1) - figures(found).mean(1)).max() < 0.01
    assert np.abs(np.corrcoef(figures(boxes)) - np.corrcoef(figures(found))).max() < 0.05


def test_what_shows_nothing_else_than_the_middle_is_the_image_itself(folder):
    images = load_images(folder, size=8)
    plain = images[[0, 1, 3]].images
    augment = Augment(ratio=(1 / 3, 3.0))
    assert not augment.is_on
    assert images.varied([0, 1, 3], variation(augment)).images.equal(plain)
    flipped = images.varied([0, 1, 3], variation(Augment(flip=True))).images
    assert [one.equal(two) or one.equal(two.flip(-1)) for one, two in zip(flipped, plain, strict=True)] == [True] * 3


def test_half_of_the_images_are_mirrored():
    found = [variation(Augment(flip=True)).view(index, 8, 8, (8, 8)).mirrored for index in range(2000)]
    assert 900 < sum(found) < 1100


def test_a_crop_is_one_resampling_of_the_whole_picture(tmp_path):
    """Of a picture that is not large, against Pillow's own resize of the box; and mirrored after that."""
    pixels = smooth(60, 90)
    save(tmp_path / "0.png", pixels)
    images = load_images(tmp_path, size=32)
    augment = Augment(crop=0.5, flip=True)
    assert augment.scale(90, 60, (32, 32)) > LARGE
    mirrored = []
    for epoch in range(8):
        now = variation(augment, epoch)
        view = now.view(0, 90, 60, (32, 32))
        expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC, box=view.box))
        expected = expected[:, ::-1] if view.mirrored else expected
        assert images.varied([0], now).images[0].equal(chw(np.ascontiguousarray(expected)))
        mirrored.append(view.mirrored)
    assert 0 < sum(mirrored) < 8


@pytest.mark.parametrize("size", [(32, 32), (24, 48), (48, 24)])
@pytest.mark.parametrize(("suffix", "picture"), [("png", (720, 1200)), ("jpg", (720, 1200)), ("png", (1200, 720))])
def test_a_large_picture_is_shrunk_first_and_its_crops_lose_nothing(tmp_path, size, suffix, picture):
    height, width = picture
    pixels = smooth(height, width, detail=120)
    save(tmp_path / f"0.{suffix}", pixels, **({"quality": 98, "subsampling": 0} if suffix == "jpg" else {}))
    images = load_images(tmp_path, size=32)
    images.shape = (3, *size)
    augment = Augment(crop=0.5)
    scale = augment.scale(width, height, size)
    assert scale <= LARGE
    assert images._picture(0, augment).shape == (round(height * scale), round(width * scale), 3)
    for epoch in range(6):
        view = variation(augment, epoch).view(0, width, height, size)
        direct = fit(Image.fromarray(pixels), size, 3, view)
        found = images.varied([0], variation(augment, epoch)).images[0]
        error = (direct.double() - found.double()).square().mean().item()
        assert 10 * math.log10(255**2 / max(error, 1e-9)) > 40, "the crop or its detail is another"
        # Even of the smallest crop every pixel of the image has one of the scaled picture at least.
        across, down = (view.box[2] - view.box[0]) * scale, (view.box[3] - view.box[1]) * scale
        assert across >= size[1] * MARGIN - 1e-6
        assert down >= size[0] * MARGIN - 1e-6


def test_a_picture_on_its_side_is_cropped_upright(tmp_path):
    """A JPEG with the camera's turn in its metadata shows what the same picture without one does."""
    pixels = smooth(400, 300)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = np.ascontiguousarray(np.rot90(pixels))
    save(tmp_path / "a" / "0.jpg", pixels, quality=98, subsampling=0)
    save(tmp_path / "b" / "0.jpg", lying, quality=98, subsampling=0, exif=exif)
    upright, turned = (load_images(tmp_path / name, size=16) for name in "ab")
    assert turned.original_size(0) == upright.original_size(0) == (400, 300)
    one, two = (images.varied([0], variation(PHOTO)).images.int() for images in (upright, turned))
    assert (one - two).abs().max() <= 6


def test_a_turn_moves_the_picture_counter_clockwise_and_shows_no_edge():
    pixels = np.full((64, 64, 3), 200, np.uint8)
    view = variation(Augment(rotate=45.0), 3).view(0, 64, 64, (32, 32))
    assert abs(view.degrees) > 20
    assert fit(Image.fromarray(pixels), (32, 32), 3, view).eq(200).all()
    bar = np.zeros((64, 64), np.uint8)
    bar[30:34] = 255
    turned = fit(Image.fromarray(bar), (32, 32), 1, View((0.0, 0.0, 64.0, 64.0), 20.0))[0].double()
    left, right = turned[:, 4], turned[:, 27]
    rows = torch.arange(32.0).double()
    assert (rows * left).sum() / left.sum() > (rows * right).sum() / right.sum() + 4


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1), (1, 1), (3, 2)])
@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_pictures_of_any_proportions_can_be_cropped(tmp_path, shape, augment):
    save(tmp_path / "0.png", noise(*shape, 3))
    images = load_images(tmp_path, size=16)
    for epoch in range(4):
        assert images.varied([0], variation(augment, epoch)).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_in_memory_are_cropped_channel_by_channel(channels):
    image = torch.from_numpy(noise(channels, 12, 20))
    view = View((3.0, 1.0, 15.5, 9.0), mirrored=True)
    found = refit(image, (6, 10), view)
    for plane, expected in zip(found, image, strict=True):
        want = Image.fromarray(expected.numpy()).resize((10, 6), Image.Resampling.BICUBIC, box=view.box)
        assert plane.numpy().tolist() == np.asarray(want)[:, ::-1].tolist()


# What it depends on


@pytest.mark.parametrize("augment", AUGMENTS.values(), ids=AUGMENTS)
def test_the_same_seed_shows_the_same_whatever_reads_and_wherever_it_starts(folder, augment):
    files = load_images(folder, size=8)
    for images in (files, in_memory()):
        whole = taken(images, augment)
        again = taken(images, augment, num_workers=2)
        assert [one.equal(two) for one, two in zip(whole, again, strict=True)] == [True] * 12
        for start in (1, 2, 5, 11):
            rest = taken(images, augment, num=12 - start, start=start, num_workers=start % 2)
            assert all(one.equal(two) for one, two in zip(whole[start:], rest, strict=True))
        plain = taken(images, Augment())
        assert not all(one.equal(two) for one, two in zip(whole, plain, strict=True))


def test_crops_are_cut_ahead_by_workers_where_there_is_something_to_cut():
    for augment, num in ((Augment(crop=0.5), 2), (Augment(flip=True), 0), (Augment(), 0)):
        stream = batches(in_memory(), 3, seed=0, num_workers=2, augment=augment)
        next(stream)
        assert len(multiprocessing.active_children()) == num
        stream.close()


def test_every_epoch_seed_and_image_shows_something_else():
    image = noise(1, 3, 32, 32)
    images = ImageTensors(torch.from_numpy(np.repeat(image, 5, 0)))
    found = set()
    for seed, epoch, index in itertools.product((0, 1, 2**70), range(3), range(5)):
        found.add(images.varied([index], variation(PHOTO, epoch, seed)).images.numpy().tobytes())
    assert len(found) == 45


def test_ranks_share_what_one_process_shows(folder):
    """An image is shown alike in an epoch, whichever rank has it and whatever the batch."""
    images = in_memory()

    def shown(batch_size: int, world: int) -> set[tuple[int, bytes]]:
        found = set()
        for rank in range(world):
            stream = batches(images, batch_size, seed=4, epochs=1, rank=rank, world_size=world, augment=PHOTO)
            for batch in stream:
                found |= {(int(label), image.numpy().tobytes()) for image, label in batch}
        return found

    assert shown(6, 1) == shown(3, 2) == shown(2, 3)


def test_broken_images_are_skipped_and_labels_stay(tmp_path):
    for name in ("cat/0", "cat/1", "dog/2"):
        save(tmp_path / "train" / f"{name}.png", noise(12, 12))
    save(tmp_path / "test" / "cat" / "0.png", noise(12, 12))
    (tmp_path / "train" / "cat" / "1.png").write_bytes(b"")
    batch = load_images(tmp_path, size=8).varied([2, 1, 0], variation(PHOTO))
    assert batch.labels.tolist() == [1, 0]
    assert batch.skipped == (("cat/1.png", "the file is empty"),)
    assert len(batch.images) == 2


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0.0}, "got crop=0; expected more than 0 and at most 1"),
        ({"crop": 1.5}, "got crop=1.5; expected more than 0 and at most 1"),
        ({"ratio": (1.2, 1.3)}, "got ratio=1.2 1.3; expected two numbers"),
        ({"ratio": (0.0, 1.0)}, "got ratio=0 1; expected two numbers"),
        ({"ratio": (1.0,)}, "got ratio=.* expected"),
        ({"rotate": -1.0}, "got rotate=-1; expected 0 to 45 degrees"),
        ({"rotate": 90.0}, "got rotate=90; expected 0 to 45 degrees"),
        ({"crop": math.nan}, "got crop=nan"),
        ({"zoom": 2}, "has no zoom"),
    ],
)
def test_what_no_picture_can_give_is_refused_in_a_sentence(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Augment(**options)
    assert "\n" not in str(caught.value)


def test_it_is_for_training_alone(folder):
    assert issubclass(Augment, Options)
    images = load_images(folder, size=8)
    with pytest.raises(ValueError, match="got augment without a seed; expected one"):
        batches(images, 2, augment=PHOTO)
    assert next(batches(images, 2, augment=Augment())).images.shape == (2, 3, 8, 8)
