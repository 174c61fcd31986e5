"""WebDataset archives: found by their headers, read at random, and never half."""

import io
import json
import pickle
import re
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import chw, noise, save
from PIL import Image

from vqvae.data import batches, load_images
from vqvae.data.tars import ImageArchives, image_archives


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write(path: Path, samples: list[dict]) -> Path:
    """An archive as the `webdataset` package writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        webdataset = pytest.importorskip("webdataset")
    with path.open("wb") as file:  # its own open leaves the file to the garbage collector
        writer = webdataset.TarWriter(file)
        for sample in samples:
            writer.write(sample)
        writer.close()
    return path


def plain_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


PIXELS = [noise(6, 9, 3) for _ in range(40)]


def samples(numbers: range) -> list[dict]:
    return [{"__key__": f"deep/{i:04}", "png": encoded(PIXELS[i]), "cls": i % 3} for i in numbers]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "train-0000.tar", samples(range(20)))
    write(tmp_path / "set" / "train-0001.tar", samples(range(20, 31)))
    write(tmp_path / "set" / "val-0000.tar", samples(range(31, 40)))
    return tmp_path / "set"


def test_a_folder_as_webdataset_writes_it(folder: Path):
    train, test = (load_images(folder, split) for split in ("train", "test"))
    assert isinstance(train, ImageArchives)
    assert (len(train), len(test)) == (31, 9)
    assert train.shape == (3, 6, 9)
    assert (train.num_classes, test.num_classes) == (3, 3)
    batch = train.__getitems__([25, 3, 30])
    assert batch.images.equal(torch.stack([chw(PIXELS[i]) for i in (25, 3, 30)]))
    assert batch.labels.tolist() == [1, 0, 0]
    assert test[0][0].equal(chw(PIXELS[31]))
    assert train.key(25) == "train-0001.tar/deep/0025.png"
    assert pickle.loads(pickle.dumps(train))[7][0].equal(train[7][0])
    assert load_images(folder, size=4, channels=1)[0][0].shape == (1, 4, 4)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_read_them_too(folder: Path):
    images = load_images(folder)
    here, ahead = (list(batches(images, 4, seed=0, epochs=1, num_workers=num)) for num in (0, 2))
    assert all(a.images.equal(b.images) for a, b in zip(here, ahead, strict=True))


def test_a_pattern_is_expanded_and_a_tenth_held_out(folder: Path, tmp_path: Path):
    train, test = (load_images(folder / "train-{0000..0001}.tar", split) for split in ("train", "test"))
    assert len(train) + len(test) == 31
    assert 1 <= len(test) <= 10
    names = {images.key(i) for images in (train, test) for i in range(len(images))}
    assert names == {f"train-000{int(i >= 20)}.tar/deep/{i:04}.png" for i in range(31)}
    for number in range(8, 12):
        write(tmp_path / "plain" / f"a{number}b0.tar", samples(range(number, number + 1)))
    plain = tmp_path / "plain"
    assert len(load_images(plain / "a{8..11}b{0..0}.tar")) + len(load_images(plain, "test")) == 4
    with pytest.raises(ValueError, match=r"train-0002\.tar does not exist; expected a \.tar file"):
        load_images(folder / "train-{0000..0002}.tar")


def test_a_single_archive_and_a_folder_without_train(tmp_path: Path):
    path = write(tmp_path / "photos.tar", samples(range(30)))
    for split in ("train", "test"):
        alone, within = load_images(path, split), load_images(tmp_path, split)
        assert [alone.key(i) for i in range(len(alone))] == [within.key(i) for i in range(len(within))]


def test_labels_in_json_or_none(tmp_path: Path):
    image = encoded(PIXELS[0])
    path = write(tmp_path / "a.tar", [{"__key__": str(i), "png": image, "json": {"label": i}} for i in range(9)])
    images = load_images(path)
    assert images.num_classes == 9
    assert [images[i][1] for i in range(len(images))] == [int(images.key(i)[6:-4]) for i in range(len(images))]
    for other in ({"text": "a cat"}, {"label": "cat"}, {"label": None}, {"label": -1}, {"label": True}, [1]):
        part = {"__key__": "x", "png": image, "json": other}
        assert load_images(write(tmp_path / "b.tar", [part, *samples(range(5))])).num_classes is None


def test_the_first_image_of_a_sample_wherever_its_parts_lie(tmp_path: Path):
    image, other = encoded(PIXELS[0]), encoded(PIXELS[1], "JPEG")
    members = [
        ("./a.seg.png", image),
        ("./b.cls", b"1\n"),
        ("./a.jpg", other),
        ("./.hidden.png", b"no"),
        ("./a.cls", b"0"),
        ("./only.txt", b"text"),
        ("./noending", b"?"),
        ("./b.JPG", other),
        ("./" + "long/" * 60 + "c.webp", encoded(PIXELS[2], "WEBP")),
        ("./" + "long/" * 60 + "c.cls", b"2"),
    ]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        train, test = (load_images(plain_tar(tmp_path / "a.tar", members, format=kind), each) for each in SPLITS)
        found = {images.key(i)[6:]: images[i][1] for images in (train, test) for i in range(len(images))}
        assert found == {"./a.jpg": 0, "./b.JPG": 1, "./" + "long/" * 60 + "c.webp": 2}


SPLITS = ("train", "test")


def test_links_are_followed_or_named(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(20):
            data = encoded(PIXELS[i])
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "4.png"
            archive.addfile(member)
    sets = [load_images(tmp_path / "a.tar", split) for split in SPLITS]
    by_name = {images.key(i): (images, i) for images in sets for i in range(len(images))}
    assert len(by_name) == 22
    images, at = by_name["a.tar/hard.png"]
    assert images[at][0].equal(chw(PIXELS[4]))
    images, at = by_name["a.tar/soft.png"]
    assert images.__getitems__([at]).skipped == (("a.tar/soft.png", "the member is a link or a sparse file"),)


def test_a_broken_image_is_named_and_skipped(tmp_path: Path):
    parts = samples(range(8))
    parts[5]["png"] = parts[5]["png"][:60]
    write(tmp_path / "train.tar", parts)
    write(tmp_path / "test.tar", samples(range(2)))
    batch = load_images(tmp_path).__getitems__(range(8))
    assert [name for name, _ in batch.skipped] == ["train.tar/deep/0005.png"]
    assert batch.images.equal(torch.stack([chw(PIXELS[i]) for i in (0, 1, 2, 3, 4, 6, 7)]))
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 0, 1]


def test_a_cut_archive_is_refused_wherever_it_was_cut(tmp_path: Path):
    path = write(tmp_path / "a.tar", samples(range(3)))
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        last = members[-1]
        end = last.offset_data + 512  # of the last member's only block
    assert data[end : end + 1024].count(0) == 1024
    cuts = sorted({*range(0, end, 97), *(member.offset for member in members), end, end + 100})
    for number, cut in enumerate(cuts):
        part = tmp_path / f"cut{number}.tar"
        part.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"is cut, damaged, or no plain tar file") as caught:
            load_images(part)
        assert "\n" not in str(caught.value)
    whole = tmp_path / "whole.tar"
    whole.write_bytes(data[: end + 512])
    assert load_images(whole).num_classes is not None


def test_damaged_headers_and_what_follows_the_end_are_refused(tmp_path: Path):
    path = write(tmp_path / "a.tar", samples(range(3)))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        offsets = [member.offset for member in archive.getmembers()]
    for offset in offsets:
        spoiled = data.copy()
        spoiled[offset + 130] ^= 4
        path.write_bytes(spoiled)
        with pytest.raises(ValueError, match="is cut, damaged, or no plain tar file"):
            load_images(path)
    path.write_bytes(data + data)
    with pytest.raises(ValueError, match="there is no header, but there is data"):
        load_images(path)
    plain_tar(path, [])
    with pytest.raises(ValueError, match="hold no images; expected members that end in"):
        load_images(path)
    plain_tar(path, [("a.png", b"broken")])
    with pytest.raises(ValueError, match="no readable image among its first"):
        load_images(path)


IMAGE = encoded(PIXELS[0])


def test_labels_that_can_be_none_are_named(tmp_path: Path):
    above = "labels go up to {} (1 of 2 are above 1,048,575, and no numbers of classes)"
    most = f"{(1 << 63) - 1:,}"
    cases = [(".cls", b"9" * number, above.format(most)) for number in (30, 1000)]
    unusable = "1 of 2 labels can't be used (the first is that of b.cls in a.tar)"
    cases += [(".cls", data, unusable) for data in (b"", b" \n", b"\xff\xfe", b"a\x00b", b"x" * 1024, b"7" * 5000)]
    cases += [(".cls", b"4000000000", above.format("4,000,000,000"))]
    cases += [(".json", b'{"label": 2147483648}', above.format("2,147,483,648"))]
    cases += [(".json", json.dumps({"label": 10**30}).encode(), above.format(most))]
    for ending, data, note in cases:
        members = [("a.png", IMAGE), ("a.cls", b"0"), ("b.png", IMAGE), ("b" + ending, data)]
        images = load_images(plain_tar(tmp_path / "a.tar", members))
        assert images.num_classes is None
        assert images.label_note.startswith(f"{note}, so none are used")
    members = [("a.png", IMAGE), ("a.cls", b"1048575"), ("b.png", IMAGE), ("b.cls", b"+0\n")]
    assert load_images(plain_tar(tmp_path / "a.tar", members)).num_classes == 1 << 20


def test_json_that_is_no_label_is_none(tmp_path: Path):
    for data in (b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b"9" * 5000, b'{"label": ' + b"9" * 5000 + b"}", b'"cat"'):
        members = [(f"{i}.png", IMAGE) for i in range(12)] + [(f"{i}.json", b'{"label": 1}') for i in range(11)]
        images = load_images(plain_tar(tmp_path / "a.tar", [*members, ("11.json", data)]))
        assert images.num_classes is None
        assert images.label_note == "1 of 12 images has no label, so none are used"


def test_names_of_classes_are_numbered_by_their_letters(tmp_path: Path):
    names = ["cat", "ant", "bee", "ant", " cat \n", "Ääl"]
    for number, some in enumerate((range(3), range(3, 6))):
        members = [(f"{i}.{each}", data) for i in some for each, data in (("png", IMAGE), ("cls", names[i].encode()))]
        plain_tar(tmp_path / f"train-{number}.tar", members)
    plain_tar(tmp_path / "test.tar", [("x.png", IMAGE), ("x.cls", b"dog")])
    train, test = (load_images(tmp_path, split) for split in SPLITS)
    assert train.class_names == test.class_names == ("ant", "bee", "cat", "dog", "Ääl")
    assert train.num_classes == 5
    assert train.__getitems__(range(6)).labels.tolist() == [2, 0, 1, 0, 2, 4]
    assert test[0][1] == 3
    plain_tar(tmp_path / "test.tar", [("x.png", IMAGE)])
    assert load_images(tmp_path).class_names is None
    assert load_images(tmp_path).label_note == "1 of 7 images has no label, so none are used"
    plain_tar(tmp_path / "test.tar", [("x.png", IMAGE), ("x.cls", b"3")])
    images = load_images(tmp_path)
    assert images.class_names is images.labels is None
    assert images.label_note == "6 of 7 labels are names and 1 are numbers, so none are used"
    members = [("x.png", IMAGE), ("x.cls", b"3"), ("y.png", IMAGE), ("y.cls", b"bee")]
    assert "1 of 2 labels are names" in load_images(plain_tar(tmp_path / "test.tar", members)).label_note


def test_archives_beside_images_are_refused_and_folders_named_so_are_folders(tmp_path: Path):
    for number in range(4):
        save(tmp_path / "set" / "a" / f"{number}.png", PIXELS[number])
    (tmp_path / "set" / "b.tar").mkdir()
    (tmp_path / "set" / "a").rename(tmp_path / "set" / "b.tar" / "a")
    assert len(load_images(tmp_path / "set", size=4)) == 3
    assert len(load_images(tmp_path / "set" / "b.tar", size=4)) == 3
    backup = plain_tar(tmp_path / "set" / "backup.tar", [("x.png", IMAGE), ("y.png", IMAGE)])
    with pytest.raises(
        ValueError, match=r"holds archives \(backup\.tar\) and images \(b\.tar/a/\d\.png\); expected"
    ) as caught:
        load_images(tmp_path / "set")
    assert str(backup) in str(caught.value)
    assert len(load_images(backup)) == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no archives; expected files that end in \.tar"):
        image_archives(tmp_path / "none")


def test_an_archive_that_shrank_since_is_named(tmp_path: Path):
    images = load_images(write(tmp_path / "train.tar", samples(range(12))).parent)
    data = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "train.tar").write_bytes(data[:600])
    (_, reason), *_ = images.__getitems__([len(images) - 1]).skipped
    assert reason == "the archive has become shorter"


def test_json_with_labels_larger_than_any_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vqvae.data.tar_index._MAX_JSON", 100)
    image = encoded(PIXELS[0])
    text = json.dumps({"label": 3, "caption": "x" * 200}).encode()
    path = plain_tar(tmp_path / "a.tar", [("a.png", image), ("a.json", text), ("b.png", image)])
    assert load_images(path).num_classes is None


# Case 3: which images are taken


def found_in(path: Path) -> dict[str, int | None]:
    """The names of all images that are taken, and their labels."""
    sets = [load_images(path, split, size=4) for split in SPLITS]
    return {
        images.key(i).partition("/")[2]: images[i][1] if images.num_classes else None
        for images in sets
        for i in range(len(images))
    }


def named(folder: Path, *names: str, **labels: str) -> Path:
    """An archive of one image under these names, and labels by theirs."""
    members = [(name, IMAGE) for name in names]
    return plain_tar(folder / "a.tar", [*members, *((name, text.encode()) for name, text in labels.items())])


def test_case_03_dots_in_names_lose_no_image(tmp_path: Path):
    names = [f"vid{i}.frame{j}.png" for i in range(3) for j in range(10)]
    assert set(found_in(named(tmp_path, *names))) == set(names)
    days = [f"2021.{month:02}.{day:02}.JPG" for month in (5, 12) for day in (1, 2, 30)]
    assert set(found_in(named(tmp_path, *days))) == set(days)
    alone = ["a.rgb.png", "b.depth.png", "c.png", "v1.2.3.webp", "deep.folder/d.e.png"]
    assert set(found_in(named(tmp_path, *alone))) == set(alone)


def test_case_03_such_images_have_labels_of_their_own_or_of_their_sample(tmp_path: Path):
    labels = {"a.frame0.cls": "3", "a.cls": "1", "b.frame1.json": '{"label": 2}', "b.json": '{"label": 0}'}
    path = named(tmp_path, *(f"{name}.frame{i}.png" for name in "ab" for i in range(2)), **labels)
    assert found_in(path) == {"a.frame0.png": 3, "a.frame1.png": 1, "b.frame0.png": 0, "b.frame1.png": 2}
    path = named(tmp_path, "x.rgb.png", "y.rgb.png", **{"x.cls": "cat", "y.rgb.cls": "ant"})
    assert found_in(path) == {"x.rgb.png": 1, "y.rgb.png": 0}
    path = named(
        tmp_path, "x.png", "y.png", **{"x.cls": "cat", "x.json": '{"label": "no"}', "y.json": '{"label": "ant"}'}
    )
    assert found_in(path) == {"x.png": 1, "y.png": 0}


def test_of_several_images_of_a_sample_the_plain_one_is_taken(tmp_path: Path):
    path = named(
        tmp_path, "0.depth.png", "0.png", "1.png", "1.depth.png", "1.mask.0.png", "2.jpg", "3.PNG", "3.seg.png"
    )
    assert set(found_in(path)) == {"0.png", "1.png", "2.jpg", "3.PNG"}
    plain_tar(tmp_path / "b.tar", [("4.rgb.png", IMAGE), ("5.webp", IMAGE)])
    assert len(found_in(tmp_path)) == 6


@pytest.mark.parametrize(
    ("names", "one", "other"),
    [
        (["0.depth.png", "0.rgb.png"], "0.depth.png", "0.rgb.png"),
        (["0.input.png", "0.target.png", "1.input.png", "1.target.png"], "0.input.png", "0.target.png"),
        (["0.jpg", "0.png"], "0.jpg", "0.png"),
        (["0.png", "0.depth.png", "0.PNG"], "0.png", "0.PNG"),
        (["v1.png", "v1.0.png"], "v1.png", "v1.0.png"),
        (["a.frame0.png", "a.frame1.jpg"], "a.frame0.png", "a.frame1.jpg"),
        (["a.frame0.png", "a.frame1.png", "a.poster.png"], "a.frame0.png", "a.poster.png"),
    ],
)
def test_case_03_images_of_which_none_is_meant_are_an_error(tmp_path: Path, names: list[str], one: str, other: str):
    with pytest.raises(
        ValueError, match=rf"a\.tar: {one} and {other} are both images of one sample; expected"
    ) as caught:
        load_images(named(tmp_path, "x.png", *names))
    assert "rename the others" in str(caught.value)


def test_what_belongs_to_an_image_in_one_sample_is_none_in_another(tmp_path: Path):
    message = r"the image 0\.depth\.png belongs to another of its sample, 1\.depth\.png is alone in its own; expected"
    with pytest.raises(ValueError, match=message):
        load_images(named(tmp_path, "0.png", "0.depth.png", "1.depth.png"))
    (tmp_path / "set").mkdir()
    plain_tar(tmp_path / "set" / "train.tar", [("0.png", IMAGE), ("0.depth.png", IMAGE)])
    plain_tar(tmp_path / "set" / "test.tar", [("1.depth.png", IMAGE)])
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path / "set")


def test_case_03_members_of_one_name_are_an_error_with_their_count(tmp_path: Path):
    names = [f"{i}.png" for i in range(10)] * 2
    with pytest.raises(ValueError, match=r"10 of its 20 members have the name of one before, as 0\.png; expected"):
        load_images(named(tmp_path, *names))
    path = plain_tar(tmp_path / "a.tar", [("a.png", IMAGE), ("a.cls", b"0"), ("b.png", IMAGE), ("a.cls", b"1")])
    with pytest.raises(ValueError, match=r"1 of its 4 members have the name of one before, as a\.cls"):
        load_images(path)


PARTS = st.lists(
    st.sampled_from(["a", "b", "rgb", "depth", "0", "7", "12", "frame3", "frame4"]), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.tuples(PARTS.map(tuple), st.sampled_from(["png", "jpg"])), min_size=1, max_size=6))
def test_an_image_is_taken_or_belongs_to_another_or_the_archive_is_refused(tmp_path: Path, images: set):
    names = {".".join((*parts, ending)) for parts, ending in images}
    path = named(tmp_path, *sorted(names), "other.png")
    try:
        load_images(path, size=4)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "rename the others" in refused
        return
    taken = set(found_in(path)) - {"other.png"}
    for name in names - taken:
        key, _, ending = name.partition(".")
        (plain,) = (each for each in taken if each.partition(".")[0] == key)
        assert plain.count(".") == 1
        assert re.search(r"[a-z]", ending.rpartition(".")[0])


# Case 19: patterns


def test_case_19_a_pattern_stands_for_a_bounded_number_of_archives(tmp_path: Path):
    for pattern, message in (
        (
            "x-{0..999999999}{0..999999999}.tar",
            r"stands for 1,000,000,000,000,000,000 archives; expected at most 100,000",
        ),
        ("{0..1}" * 40 + ".tar", r"stands for 1,099,511,627,776 archives; expected at most 100,000"),
        ("x-{0..100000}.tar", r"stands for 100,001 archives; expected at most 100,000"),
        ("x-{5..3}.tar", r"got \{5\.\.3\} in the name of archives; expected the lower number first, of at most 18"),
        ("x-{0.." + "9" * 5000 + "}.tar", r"got \{0\.\.9+\.\.\.\} in the name of archives; expected"),
        ("x-{a..c}.tar", r"x-\{a\.\.c\}\.tar does not exist"),
        ("x-{0..99999}.tar", r"x-0\.tar does not exist; expected a \.tar file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_images(str(tmp_path / pattern))
        assert len(str(caught.value)) < 800


def test_a_pattern_of_several_ranges_and_folders(tmp_path: Path):
    for name in ("a1/x-08", "a1/x-09", "a1/x-10", "a2/x-08", "a2/x-09", "a2/x-10"):
        write(tmp_path / f"{name}.tar", samples(range(1)))
    sets = [load_images(tmp_path / "a{1..2}" / "x-{08..10}.tar", split) for split in SPLITS]
    keys = {images.key(i) for images in sets for i in range(len(images))}
    assert keys == {f"a{a}/x-{x}.tar/deep/0000.png" for a in (1, 2) for x in ("08", "09", "10")}
    assert (
        load_images(tmp_path / "a1" / "x-{10..10}{8..8}.tar".replace("{8..8}", "")).key(0) == "x-10.tar/deep/0000.png"
    )


# Case 22: sizes that headers claim


def with_size(data: bytes, offset: int, size: int) -> bytes:
    """An archive whose header at `offset` says another size, as GNU tar writes large ones; and its checksum."""
    header = bytearray(data[offset : offset + 512])
    header[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size & (1 << 88) - 1).to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:offset] + bytes(header) + data[offset + 512 :]


@pytest.mark.parametrize(
    "size", [1 << 33, 1 << 62, (1 << 63) - 512, 1 << 63, 1 << 80, -1, -512, -(1 << 40), -(1 << 80)]
)
@pytest.mark.parametrize("kind", ["plain", "pax", "gnu long name", "gnu long link", "folder", "unknown"])
def test_case_22_no_size_that_a_header_claims_is_believed(tmp_path: Path, size: int, kind: str):
    path = plain_tar(tmp_path / "a.tar", [("0.png", IMAGE), ("1.png", IMAGE), ("2.png", IMAGE)])
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    types = {"pax": b"x", "gnu long name": b"L", "gnu long link": b"K", "folder": b"5", "unknown": b"Z"}
    data[offset + 156 : offset + 157] = types.get(kind, b"0")
    path.write_bytes(with_size(bytes(data), offset, size))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is cut, damaged, or no plain tar file"):
            load_images(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_case_22_a_chain_of_headers_is_refused(tmp_path: Path):
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 5
    block = long.tobuf() + b"a.png".ljust(512, b"\0")
    path = plain_tar(tmp_path / "a.tar", [("0.png", IMAGE)])
    path.write_bytes(block * 5000 + path.read_bytes())
    with pytest.raises(ValueError, match="is cut, damaged, or no plain tar file"):
        load_images(path)


def test_a_member_larger_than_any_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = plain_tar(tmp_path / "train.tar", [("0.png", IMAGE), ("1.bmp", b"BM" + bytes(5000))])
    plain_tar(tmp_path / "test.tar", [("2.png", IMAGE)])
    monkeypatch.setattr("vqvae.data.tars.MAX_BYTES", 5000)
    batch = load_images(path.parent)[:]
    assert batch.skipped == (("train.tar/1.bmp", "the member has 5,002 bytes; expected at most 5,000"),)
