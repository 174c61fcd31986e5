"""Transforms of a set, as torchvision's v2 has them; the split that it is; and sizes at the source."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from image_files import both, encoded, noise, save, write_parquet, write_tar
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from vqvae.data import Images, ImageTensors, batches, load_images
from vqvae.data.augmentation import Augment
from vqvae.data.cache import Cache
from vqvae.data.transformed import TransformedImages

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(7):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", noise(12, 20, 3))
    (tmp_path / "train" / "a" / "broken.png").write_bytes(b"broken")
    save(tmp_path / "test" / "a" / "0.png", noise(12, 20, 3))
    return tmp_path


RANDOM = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(6), v2.ColorJitter(0.5, 0.5)])


def taken(images: Images, num: int = 8, **options: object) -> list[torch.Tensor]:
    stream = batches(images, 3, seed=5, **options)
    found = [batch.images for batch in itertools.islice(stream, num)]
    stream.close()
    return found


def test_a_transform_gives_each_image_and_the_shape_of_the_set(folder):
    plain = load_images(folder, size=10)
    images = load_images(folder, size=10, transform=v2.Compose([v2.CenterCrop(6), v2.RandomVerticalFlip(1.0)]))
    assert images.shape == (3, 6, 6)
    expected = plain[:].images[:, :, 2:8, 2:8].flip(-2)
    assert images[:].images.equal(expected)
    assert images[:].labels.equal(plain[:].labels)
    assert images[:].skipped == plain[:].skipped
    assert images[1:].images.equal(expected[1:])
    assert images[-1][0].equal(expected[-1])
    assert images[-1][1] == plain[-1][1]
    assert images[[]].images.shape == (0, 3, 6, 6)
    assert (len(images), images.split, images.num_classes, images.class_names, images.name) == (
        len(plain), "train", 2, ("a", "b"), plain.name,
    )  # fmt: skip
    assert images.key(3) == plain.key(3)
    assert images.original_size(0) == (12, 20)
    (folder / "train" / "a" / "broken.png").unlink()
    whole = load_images(folder, size=10, transform=v2.CenterCrop(6))
    (pixels, labels), *_ = DataLoader(whole, batch_size=3)
    assert pixels.equal(whole[:3].images)
    assert labels.tolist() == whole[:3].labels.tolist()
    assert images.read([0]).images.equal(expected[:1])


@pytest.mark.parametrize("augment", [None, Augment(crop=0.5)])
def test_what_a_transform_samples_depends_on_seed_epoch_and_image_alone(folder, tmp_path, augment):
    images = load_images(folder, size=8, transform=RANDOM)
    memory = TransformedImages(ImageTensors(torch.from_numpy(noise(7, 3, 8, 8))), RANDOM)
    for each in (images, memory, images.cached(Cache(tmp_path / "cache", 10**9))):
        torch.manual_seed(0)
        whole = taken(each, augment=augment)
        for start, num_workers in ((0, 2), (1, 0), (3, 2)):
            torch.manual_seed(start + 1)
            rest = taken(each, 8 - start, start=start, num_workers=num_workers, augment=augment)
            assert all(one.equal(two) for one, two in zip(whole[start:], rest, strict=True))
    shown = {image.numpy().tobytes() for batch in taken(memory, 20) for image in batch}
    assert len(shown) > 30, "of seven images, in ten epochs"
    in_order = [batch.images for batch in batches(images, 3)]
    assert all(one.equal(two) for one, two in zip(in_order, (b.images for b in batches(images, 3)), strict=True))


def test_workers_do_what_is_asked_for_where_it_takes_time(folder, tmp_path):
    """Other processes read files and transform ahead, also images in memory; of those alone there is nothing to do."""
    memory = ImageTensors(torch.from_numpy(noise(7, 3, 8, 8)))

    def note(image: torch.Tensor) -> torch.Tensor:
        (tmp_path / f"{os.getpid()}.pid").touch()
        return image

    for images in (memory, load_images(folder, size=8)):
        transformed = TransformedImages(images, note)
        for path in tmp_path.glob("*.pid"):
            path.unlink()
        taken(transformed, num_workers=2)
        found = {path.stem for path in tmp_path.glob("*.pid")}
        assert found
        assert str(os.getpid()) not in found
    assert [each.uses_workers for each in (memory, load_images(folder, size=8), transformed)] == [False, True, True]


def test_the_generator_of_the_program_goes_on_as_without(folder):
    torch.manual_seed(3)
    images = load_images(folder, size=8, transform=RANDOM)
    taken(images)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert after.equal(torch.rand(1))
    torch.manual_seed(3)
    one = images[[0]].images
    torch.manual_seed(3)
    assert one.equal(images[[0]].images), "by its index an image is sampled by torch's own generator"


def fails(image: torch.Tensor) -> torch.Tensor:
    raise KeyError("no\nsuch thing")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (v2.ToDtype(torch.float32, scale=True), r"got torch.float32 \(3, 8, 8\) from the transform .* uint8 c"),
        (lambda image: image.numpy(), "got ndarray from the transform of "),
        (lambda image: image[0], r"got torch.uint8 \(8, 8\) from the transform"),
        (fails, r"the transform failed on a/0.png, a tensor of uint8 \(3, 8, 8\) \(KeyError: .*such thing"),
        ("flip", "got transform='flip'; expected a function of a tensor"),
    ],
)  # fmt: skip
def test_what_gives_no_images_of_one_shape_is_refused_in_a_sentence(folder, untyped, transform, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_images(folder, size=8, transform=transform)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_another_shape_later_on_is_named(folder, num_workers):
    images = load_images(folder, size=8)

    def grown(image: torch.Tensor) -> torch.Tensor:
        return image if image.equal(images[0][0]) else image[:, :5]

    changing = TransformedImages(images, grown)
    stream = batches(changing, 7, num_workers=num_workers)
    with pytest.raises(
        ValueError, match=r"got torch.uint8 \(3, 5, 8\) .*; expected uint8 \(3, 8, 8\), as of the first"
    ):
        list(stream)


def test_the_digest_tells_transforms_apart(folder):
    found = {
        load_images(folder, size=8, transform=each).digest(range(7))
        for each in (
            None,
            v2.RandomHorizontalFlip(),
            v2.RandomHorizontalFlip(0.3),
            v2.RandomVerticalFlip(),
            torch.clone,
        )
    }
    assert len(found) == 5
    again = (load_images(folder, size=8, transform=v2.RandomHorizontalFlip()).digest(range(7)) for _ in range(2))
    assert len(set(again)) == 1


def test_a_set_without_a_readable_image_says_so(folder):
    images = load_images(folder, size=8)
    for number in range(7):
        (folder / "train" / "ab"[number % 2] / f"{number}.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the first 64 images of .* can be read"):
        TransformedImages(images, RANDOM)


# What a set says of itself


def test_sets_say_which_split_they_are(tmp_path, folder):
    data = [(f"{number}.png", encoded(noise(4, 6, 3))) for number in range(30)]
    tar = write_tar(tmp_path / "others" / "all.tar", data)
    table = write_parquet(tmp_path / "others" / "all.parquet", image=[{"bytes": each} for _, each in data])
    for source in ("fashion-mini", folder / "train", tar, table):
        assert [images.split for images in both(source)] == ["train", "test"]
        assert load_images(source, "test", size=5, channels=1).split == "test"
    assert ImageTensors(torch.zeros(1, 1, 2, 2, dtype=torch.uint8)).split is None


def test_sizes_at_the_source_are_told_by_headers(tmp_path):
    pixels = noise(5, 9, 3)
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        save(tmp_path / "train" / f"0.{suffix}", pixels)
    data = encoded(noise(300, 200, 3))
    (tmp_path / "train" / "cut.png").write_bytes(data[: len(data) // 3])
    (tmp_path / "train" / "text.png").write_bytes(b"text")
    (tmp_path / "train" / "gone.png").symlink_to("nowhere")
    images = load_images(tmp_path / "train", size=4)
    sizes = {}
    for index in range(len(images)):
        try:
            sizes[images.key(index)] = images.original_size(index)
        except (ValueError, OSError) as error:
            sizes[images.key(index)] = type(error)
    known = {"cut.png": (300, 200), "text.png": ValueError, "gone.png": FileNotFoundError}
    assert all(sizes[key] == known.get(key, (5, 9)) for key in sizes)
    assert len({*sizes} & {*known}) >= 2
    with pytest.raises(IndexError):
        images.original_size(len(images))
    in_memory = load_images("fashion-mini")
    assert in_memory.original_size(5) == (28, 28)
    with pytest.raises(IndexError):
        in_memory.original_size(20_000)
    tar = write_tar(tmp_path / "a.tar", [("0.png", encoded(pixels)), ("1.png", encoded(pixels))])
    assert load_images(tar, size=3).original_size(0) == (5, 9)


def test_a_named_pipe_has_no_size(tmp_path):
    save(tmp_path / "train" / "0.png", noise(4, 4))
    os.mkfifo(tmp_path / "train" / "1.png")
    save(tmp_path / "test" / "0.png", noise(4, 4))
    with pytest.raises(ValueError, match="named pipe"):
        load_images(tmp_path, size=4).original_size(1)


def test_images_are_uint8_as_v2_takes_them(folder):
    images = load_images(
        folder, size=8, transform=lambda image: v2.functional.horizontal_flip(v2.functional.to_image(image))
    )
    assert type(images[0][0]) is torch.Tensor
    plain = load_images(folder, size=8)
    assert images[0][0].equal(plain[0][0].flip(-1))
