"""WebDataset archives: found by their headers, read at random, and never half."""

import json
import pickle
import re
import tarfile
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from image_files import both, chw, encoded, noise, save, write_tar

from vqvae.data import batches, load_images
from vqvae.data.tars import ImageArchives, image_archives

PIXELS = [noise(6, 9, 3) for _ in range(40)]
IMAGE = encoded(PIXELS[0])
DAMAGED = "is cut, damaged, or no plain tar file"


def members(numbers: range) -> list[tuple[str, bytes]]:
    """Images, with labels from 0 to 2."""
    samples = [(f"deep/{i:04}", {"png": encoded(PIXELS[i]), "cls": b"%d" % (i % 3)}) for i in numbers]
    return [(f"{key}.{ending}", data) for key, sample in samples for ending, data in sample.items()]


def keys(*sets: ImageArchives) -> set[str]:
    return {images.key(i) for images in sets for i in range(len(images))}


def found_in(path: Path) -> dict[str, int | None]:
    """The names of all images that are taken, and their labels."""
    return {
        images.key(i).partition("/")[2]: images[i][1] if images.num_classes else None
        for images in both(path, size=4)
        for i in range(len(images))
    }


def named(folder: Path, *names: str, **labels: str) -> Path:
    """An archive of one image under these names, and labels by theirs."""
    texts = [(name, text.encode()) for name, text in labels.items()]
    return write_tar(folder / "a.tar", [*((name, IMAGE) for name in names), *texts])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_folder_as_webdataset_writes_it(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        webdataset = pytest.importorskip("webdataset")
    for name, numbers in (("train-0", range(20)), ("train-1", range(20, 31)), ("val-0", range(31, 40))):
        with (tmp_path / f"{name}.tar").open("wb") as file:  # its own open leaves the file to the garbage collector
            writer = webdataset.TarWriter(file)
            for i in numbers:
                writer.write({"__key__": f"deep/{i:04}", "png": encoded(PIXELS[i]), "cls": i % 3})
            writer.close()
    train, test = both(tmp_path)
    assert isinstance(train, ImageArchives)
    assert (len(train), len(test), train.shape) == (31, 9, (3, 6, 9))
    assert (train.num_classes, test.num_classes) == (3, 3)
    batch = train.__getitems__([25, 3, 30])
    assert batch.images.equal(torch.stack([chw(PIXELS[i]) for i in (25, 3, 30)]))
    assert batch.labels.tolist() == [1, 0, 0]
    assert test[0][0].equal(chw(PIXELS[31]))
    assert train.key(25) == "train-1.tar/deep/0025.png"
    assert pickle.loads(pickle.dumps(train))[7][0].equal(train[7][0])
    assert load_images(tmp_path, size=4, channels=1)[0][0].shape == (1, 4, 4)
    here, ahead = (list(batches(train, 9, seed=0, epochs=1, num_workers=num)) for num in (0, 2))
    assert all(a.images.equal(b.images) for a, b in zip(here, ahead, strict=True))


def test_a_tenth_of_an_archive_a_folder_or_a_pattern_is_held_out(tmp_path: Path):
    path = write_tar(tmp_path / "one" / "photos.tar", members(range(30)))
    assert [keys(images) for images in both(path)] == [keys(images) for images in both(path.parent)]
    names = [f"a{a}/x-{x}.tar" for a in (9, 10) for x in ("08", "09", "10")]
    for name in names:
        write_tar(tmp_path / name, members(range(2)))
    train, test = both(tmp_path / "a{9..10}" / "x-{08..10}.tar")
    assert len(train) > len(test) > 0
    assert keys(train, test) == {f"{name}/deep/000{i}.png" for name in names for i in (0, 1)}
    assert keys(*both(tmp_path / "a9" / "x-{10..10}.tar")) == {f"x-10.tar/deep/000{i}.png" for i in (0, 1)}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("x-{0..999999999}{0..999999999}.tar", "stands for 1,000,000,000,000,000,000 archives; expected at most"),
        ("x-{5..3}.tar", r"got \{5\.\.3\} in the name of archives; expected the lower number first, of at most 18"),
        ("x-{0.." + "9" * 5000 + "}.tar", r"got \{0\.\.9+\.\.\.\} in the name of archives; expected"),
        ("x-{a..c}.tar", r"x-\{a\.\.c\}\.tar does not exist"),
        ("x-{0..99999}.tar", r"x-0\.tar does not exist; expected a \.tar file"),
    ],
    ids=range(5),
)
def test_a_pattern_stands_for_a_bounded_number_of_archives(tmp_path: Path, pattern: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        load_images(str(tmp_path / pattern))
    assert len(str(caught.value)) < 800


def test_the_first_image_of_a_sample_wherever_its_parts_lie(tmp_path: Path):
    other, long = encoded(PIXELS[1], "JPEG"), "./" + "long/" * 60
    parts = [
        ("./a.seg.png", IMAGE),
        ("./b.cls", b"1\n"),
        ("./a.jpg", other),
        ("./.hidden.png", b"no"),
        ("./a.CLS", b"0"),
        ("./only.txt", b"text"),
        ("./noending", b"?"),
        ("./b.JPG", other),
        (f"{long}c.webp", encoded(PIXELS[2], "WEBP")),
        (f"{long}c.JSON", b'{"label": 2}'),
    ]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = write_tar(tmp_path / "a.tar", parts, format=kind)
        assert found_in(path) == {"./a.jpg": 0, "./b.JPG": 1, f"{long}c.webp": 2}


def test_links_are_followed_and_what_is_no_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vqvae.data.tars.MAX_BYTES", 5000)
    path = write_tar(tmp_path / "train.tar", [*members(range(2)), ("c.png", IMAGE[:60]), ("d.bmp", bytes(5001))])
    write_tar(tmp_path / "test.tar", members(range(2)))
    with tarfile.open(path, "a") as archive:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "deep/0001.png"
            archive.addfile(member)
    images = load_images(tmp_path)
    batch = images[:]
    assert batch.images.equal(torch.stack([chw(PIXELS[i]) for i in (0, 1, 1)]))
    (cut, _), *others = batch.skipped
    assert cut == "train.tar/c.png"
    assert others == [
        ("train.tar/d.bmp", "the member has 5,001 bytes; expected at most 5,000"),
        ("train.tar/soft.png", "the member is a link or a sparse file"),
    ]
    path.write_bytes(path.read_bytes()[:600])
    (_, reason), *_ = images.__getitems__([1]).skipped
    assert reason == "the archive has become shorter"


def test_cut_and_damaged_archives_are_refused(tmp_path: Path):
    path = write_tar(tmp_path / "whole.tar", members(range(3)))
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive.getmembers()]
        end = archive.getmembers()[-1].offset_data + 512  # of the last member's only block
    assert data[end : end + 1024].count(0) == 1024
    spoiled = [data[:cut] for cut in sorted({*range(0, end, 197), *headers, end, end + 100})]
    for header in headers:
        spoiled.append(data[: header + 130] + bytes([data[header + 130] ^ 4]) + data[header + 131 :])
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 5
    spoiled.append((long.tobuf() + b"a.png".ljust(512, b"\0")) * 5000 + data)
    for number, some in enumerate(spoiled):
        part = tmp_path / f"{number}.tar"
        part.write_bytes(some)
        with pytest.raises(ValueError, match=DAMAGED) as caught:
            load_images(part)
        assert "\n" not in str(caught.value)
    path.write_bytes(data + data)
    with pytest.raises(ValueError, match="there is no header, but there is data"):
        load_images(path)
    path.write_bytes(data[: end + 512])  # of a real end one of the two empty blocks
    assert load_images(path).num_classes is not None


@pytest.mark.parametrize("kind", ["plain", "pax", "gnu long name", "gnu long link", "folder", "unknown"])
def test_no_size_that_a_header_claims_is_believed(tmp_path: Path, kind: str):
    types = {"pax": b"x", "gnu long name": b"L", "gnu long link": b"K", "folder": b"5", "unknown": b"Z"}
    path = write_tar(tmp_path / "a.tar", [("0.png", IMAGE), ("1.png", IMAGE), ("2.png", IMAGE)])
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        start = archive.getmembers()[1].offset
    for size in (1 << 33, (1 << 63) - 512, 1 << 80, -512, -(1 << 80)):
        header = bytearray(data[start : start + 512])
        header[156:157] = types.get(kind, b"0")
        # As GNU tar writes large ones; and the header's checksum.
        header[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size & (1 << 88) - 1).to_bytes(11)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        path.write_bytes(data[:start] + bytes(header) + data[start + 512 :])
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=DAMAGED):
                load_images(path)
            assert tracemalloc.get_traced_memory()[1] < 1 << 24
        finally:
            tracemalloc.stop()


def test_archives_without_images_are_refused(tmp_path: Path):
    for name, data, message in (
        ("a.txt", b"text", "hold no images; expected members that end in"),
        ("a.png", b"broken", "no readable image among its first"),
        ("a.png", IMAGE, "none of them for split='test'"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(write_tar(tmp_path / "a.tar", [(name, data)]), "test")
    with pytest.raises(ValueError, match=r"holds no archives; expected files that end in \.tar"):
        image_archives(save(tmp_path / "none" / "0.png", PIXELS[0]).parent)


# Labels

ABOVE = "labels go up to {:,} (1 of 2 are above 1,048,575, and no numbers of classes)"
BESIDE = "1 of 2 labels are names and 1 are numbers"
LACKING = "1 of 2 images has no label"
UNUSABLE = "1 of 2 labels can't be used (the first is that of b.{} in a.tar)"
MOST = (1 << 63) - 1


def test_labels_that_can_not_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cls = {b"9" * 1000: ABOVE.format(MOST), b"4000000000": ABOVE.format(4 * 10**9), b"-1": LACKING, b"bee": BESIDE}
    cls |= dict.fromkeys((b"", b" \n", b"\xff\xfe", b"a\x00b", b"x" * 1024, b"-3"), UNUSABLE.format("cls"))
    json_ = dict.fromkeys((b"", b"{", b"\xff\xfe\x00", b"[" * 200_000, b'{"label": ' + b"9" * 5000 + b"}"), LACKING)
    json_ |= dict.fromkeys((b'"cat"', b"[1]", b'{"text": "a cat"}', b'{"label": null}', b'{"label": -1}'), LACKING)
    json_ |= dict.fromkeys((b'{"label": true}', b'{"label": -3}', b'{"label": [1]}'), UNUSABLE.format("json"))
    json_ |= {json.dumps({"label": 10**30}).encode(): ABOVE.format(MOST), b'{"label": "cat"}': BESIDE}
    for ending, cases in (("cls", cls), ("json", json_)):
        for data, note in cases.items():
            parts = [("a.png", IMAGE), ("a.cls", b"0"), ("b.png", IMAGE), (f"b.{ending}", data)]
            images = load_images(write_tar(tmp_path / "a.tar", parts))
            assert images.num_classes is None
            assert images.label_note.startswith(f"{note}, so none are used")
    monkeypatch.setattr("vqvae.data.tar_index._MAX_JSON", 100)
    large = json.dumps({"label": 3, "caption": "x" * 200}).encode()
    images = load_images(write_tar(tmp_path / "a.tar", [("a.png", IMAGE), ("a.json", large), ("b.png", IMAGE)]))
    assert images.num_classes is None
    parts = [("a.png", IMAGE), ("a.cls", b"1048575"), ("b.png", IMAGE), ("b.cls", b"+0\n")]
    assert load_images(write_tar(tmp_path / "a.tar", parts)).num_classes == 1 << 20


def test_labels_of_no_image_are_named(tmp_path: Path):
    labels = {"a.label.cls": "1", "c.cls": "1"}
    note = load_images(named(tmp_path, "a.png", "b.png", **labels)).label_note
    assert note == "2 labels belong to no image by their names, as a.label.cls, so none are used"
    note = load_images(named(tmp_path, "a.png", "b.png", **{"a.cls": "1", "a.CLS": "2", "b.cls": "0"})).label_note
    assert note.startswith("1 of 2 labels can't be used (the first is that of a.cls in a.tar)")


# Which images are taken


@pytest.mark.parametrize(
    ("names", "labels", "taken"),
    [
        # Dots in names lose no image.
        ([f"vid{i}.frame{j}.png" for i in range(3) for j in range(10)], {}, None),
        ([f"2021.{month:02}.{day:02}.JPG" for month in (5, 12) for day in (1, 2, 30)], {}, None),
        (["a.rgb.png", "b.depth.png", "c.png", "v1.2.3.webp", "deep.folder/d.e.png"], {}, None),
        # Such images have labels of their own, or those of their sample.
        (
            [f"{name}.frame{i}.png" for name in "ab" for i in range(2)],
            {"a.frame0.cls": "3", "a.cls": "1", "b.frame1.json": '{"label": 2}', "b.json": '{"label": 0}'},
            {"a.frame0.png": 3, "a.frame1.png": 1, "b.frame0.png": 0, "b.frame1.png": 2},
        ),
        (["x.rgb.png", "y.rgb.png"], {"x.cls": "cat", "y.rgb.cls": "ant"}, {"x.rgb.png": 1, "y.rgb.png": 0}),
        (
            ["x.png", "y.png"],
            {"x.cls": "cat", "x.json": '{"label": "no"}', "y.json": '{"label": "ant"}'},
            {"x.png": 1, "y.png": 0},
        ),
        # Of several the plain one is taken.
        (
            ["0.depth.png", "0.png", "1.png", "1.depth.png", "1.mask.0.png", "2.jpg", "3.PNG", "3.seg.png"],
            {},
            dict.fromkeys(["0.png", "1.png", "2.jpg", "3.PNG"]),
        ),
    ],
    ids=range(7),
)
def test_images_that_are_taken(tmp_path: Path, names: list[str], labels: dict[str, str], taken: dict | None):
    assert found_in(named(tmp_path, *names, **labels)) == (dict.fromkeys(names) if taken is None else taken)


@pytest.mark.parametrize(
    "names",
    [
        "0.depth.png 0.rgb.png",
        "0.input.png 0.target.png 1.input.png 1.target.png",
        "0.jpg 0.png",
        "0.png 0.PNG 0.depth.png",
        "v1.png v1.0.png",
        "a.frame0.png a.frame1.jpg",
        "a.frame0.png a.poster.png a.frame1.png",
    ],
)
def test_images_of_which_none_is_meant_are_an_error(tmp_path: Path, names: str):
    one, other, *_ = names.split()
    with pytest.raises(ValueError, match=rf"a\.tar: {one} and {other} are both images .* rename the others"):
        load_images(named(tmp_path, "x.png", *names.split()))


def test_what_belongs_to_an_image_in_one_sample_is_none_in_another(tmp_path: Path):
    path = named(tmp_path, "0.png", "0.depth.png", "1.depth.png")
    write_tar(tmp_path / "set" / "train.tar", [("0.png", IMAGE), ("0.depth.png", IMAGE)])
    write_tar(tmp_path / "set" / "test.tar", [("1.depth.png", IMAGE)])
    for source in (path, tmp_path / "set"):
        with pytest.raises(ValueError, match=r"0\.depth\.png belongs to another .*, 1\.depth\.png is alone in its own"):
            load_images(source)


def test_members_of_one_name_are_an_error_with_their_count(tmp_path: Path):
    for names, message in (
        ([f"{i}.png" for i in range(10)] * 2, r"10 of its 20 members have the name of one before, as 0\.png"),
        (["a.png", "a.cls", "b.png", "a.cls"], r"1 of its 4 members have the name of one before, as a\.cls"),
    ):
        with pytest.raises(ValueError, match=message):
            load_images(named(tmp_path, *names))


WORDS = st.sampled_from(["a", "b", "rgb", "depth", "0", "7", "12", "frame3", "frame4"])
NAMES = st.tuples(st.lists(WORDS, min_size=1, max_size=3).map(".".join), st.sampled_from(["png", "jpg"])).map(".".join)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(NAMES, min_size=1, max_size=6))
def test_an_image_is_taken_or_belongs_to_another_or_the_archive_is_refused(tmp_path: Path, names: set[str]):
    path = named(tmp_path, *sorted(names), "other.png")
    try:
        taken = set(found_in(path)) - {"other.png"}
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "rename the others" in refused
        return
    for name in names - taken:
        key, _, ending = name.partition(".")
        (plain,) = (each for each in taken if each.partition(".")[0] == key)
        assert plain.count(".") == 1
        assert re.search(r"[a-z]", ending.rpartition(".")[0])
