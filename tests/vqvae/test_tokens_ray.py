"""The Ray engine makes the files of the engine of one machine, byte for byte, whatever dies on the way.

Starting Ray takes longer than all else here, so tests that need it are slow ones, and share it where they can.
"""

import builtins
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ray_worlds import BROKEN, NUM_IMAGES, WatchedFiles, WatchedTokenizer, photos, tokenizer, watched_by
from token_worlds import plan, tokenize, tokenize_on_ray

from vqvae.cli.tokenizing import Engine, TokenizingFlags
from vqvae.cli.tokenizing import tokenize as tokenize_command
from vqvae.data import ImageTensors
from vqvae.data.folder import ImageFiles, image_folder
from vqvae.tokens import Tokenized, ray_engine, ray_session
from vqvae.tokens.ray_session import RaySession
from vqvae.tokens.shards import missing

STORE = 100_000_000
SIZES: dict[str, Any] = {"batch_size": 8, "shard_size": 30}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same(one: Tokenized, other: Tokenized) -> bool:
    return (one.whole, one.num_rows, one.num_shards, one.unreadable) == (
        other.whole,
        other.num_rows,
        other.num_shards,
        other.unreadable,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    return photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def settings() -> Iterator[None]:
    """Ray without files in the home folder or messages to its makers; its processes find the modules of tests."""
    with pytest.MonkeyPatch.context() as patch:
        here = Path(__file__).parent
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (here, here.parents[1]))))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def local(settings: None) -> Iterator[None]:
    ray = ray_session.import_ray()
    with ray_session.environment(ray_session.ENVIRONMENT):
        ray.init(num_cpus=2, object_store_memory=STORE, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield
    ray.shutdown()


def test_missing_extra_is_named(images: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"No module named 'ray'.*pip install 'vqvae-priors\[ray\]'") as caught:
        tokenize_on_ray(tokenizer(), images, tmp_path / "codes")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_encoders": 0}, "got num_encoders=0; expected at least 1"),
        ({"device": "tpu"}, "got device='tpu'"),
        ({"batch_size": 0}, "got batch_size=0"),
        ({"num_workers": 2}, "got num_workers=2, .* as the cluster shares out the work"),
        ({"address": "127.0.0.1:1"}, "no Ray at 127.0.0.1:1: .*refused.*HOST:PORT"),
        ({"address": "127.0.0.1:99999"}, "no Ray at 127.0.0.1:99999: .*HOST:PORT"),
    ],
)
def test_mistakes_are_told(images: ImageFiles, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        tokenize_on_ray(tokenizer(), images, tmp_path / "codes", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("per_task", [1, 3, 100])
def test_tasks_take_every_missing_slice_once(
    images: ImageFiles, tmp_path: Path, per_task: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of the workers, without Ray: shards of 30 in slices of 8, so some are short; two shards are there."""
    monkeypatch.setattr(ray_engine, "_open", lambda source, shape, num: images)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda ref: ref))
    model = tokenizer()
    todo = plan(model, images, tmp_path, **SIZES)
    shards = [shard for shard in missing(todo) if shard not in (0, 3)]
    expected = [(shard, part.start) for shard in shards for part in todo.slices(shard)]
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    encode = ray_engine._Encode(ray_engine._pack_model(model), "cpu", threads, precision)
    found = []
    for task in range(-(-len(expected) // per_task)):
        ids = {"id": np.array([task])}
        for batch in ray_engine._decode(
            ids, source=None, todo=todo, shards=shards, per_task=per_task, num_slices=len(expected)
        ):
            (cell,) = encode(batch)["part"]
            shard, part = pickle.loads(cell)
            assert part.codes.dtype == todo.dtype
            found.append((shard, part.first))
    assert found == expected


@pytest.mark.slow
def test_same_bytes_though_processes_and_a_node_die(
    settings: None, images: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = ray_session.import_ray()
    from ray.cluster_utils import Cluster

    # Blocks of one slice, so that little is decoded ahead and a decoder is at work when it is killed.
    monkeypatch.setattr(ray_engine, "_MIN_BLOCK_BYTES", 1)
    sizes: dict[str, Any] = {"batch_size": 4, "shard_size": 30}
    watched = tmp_path / "watched"
    watched.mkdir()
    model = WatchedTokenizer.of(watched, 0.05)
    expected = tokenize(model, images, tmp_path / "one", **sizes)
    mine = watched_by(watched, "encoded").keys()
    node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.wait_for_nodes()
        done: list[str] = []

        def disturb(num: int, total: int) -> None:
            if num >= 8 and "encoder" not in done:
                pid = max(watched_by(watched, "encoded").keys() - mine)
                os.kill(pid, signal.SIGKILL)
                done.append("encoder")
            elif num >= 40 and "decoder" not in done:
                assert sum(watched_by(watched, "read").values()) < NUM_IMAGES, "all is decoded already"
                # Who has read most recently is still at work.
                newest = max(watched.glob("read.*"), key=lambda path: path.stat().st_mtime_ns)
                os.kill(int(newest.name.split(".")[1]), signal.SIGKILL)
                done.append("decoder")
            elif num >= 80 and "node" not in done:
                cluster.remove_node(second, allow_graceful=False)
                done.append("node")

        slow = WatchedFiles.of(images, watched, 0.05)
        made = tokenize_on_ray(model, slow, tmp_path / "ray", **sizes, address=cluster.address, progress=disturb)
        assert done == ["encoder", "decoder", "node"]
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
    assert files(tmp_path / "ray") == files(tmp_path / "one")
    assert same(made, expected)
    assert made.num_images == NUM_IMAGES
    assert sum(watched_by(watched, "read").values()) > NUM_IMAGES, "nothing was decoded again"
    assert len(watched_by(watched, "encoded").keys() - mine) >= 2, "the encoder was not started again"


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_same_bytes_resumed_and_listed(images: ImageFiles, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tokenizer()
    expected = tokenize(model, images, tmp_path / "one", **SIZES)
    progress: list[tuple[int, int]] = []
    made = tokenize_on_ray(
        model,
        images,
        tmp_path / "ray",
        **SIZES,
        num_encoders=1,
        progress=lambda *each: progress.append((each[0], each[1])),
    )
    assert files(tmp_path / "ray") == files(tmp_path / "one")
    assert same(made, expected)
    assert [key for key, _ in made.unreadable] == [images.key(index) for index in BROKEN]
    assert made.num_images == NUM_IMAGES
    assert [total for _, total in progress] == [NUM_IMAGES] * (6 * 4 + 3)
    assert sorted(done for done, _ in progress) == [done for done, _ in progress]
    assert progress[-1] == (NUM_IMAGES, NUM_IMAGES)

    # Goes on where a run was stopped: of the shards only those that are not there, or are cut, are made.
    (tmp_path / "ray" / "codes-00001.safetensors").unlink()
    last = tmp_path / "ray" / "codes-00006.safetensors"
    last.write_bytes(last.read_bytes()[:-1])
    opener = partial(image_folder, images.folder.parent, "train", size=16, channels=3)
    again = tokenize_on_ray(model, images, tmp_path / "ray", **SIZES, num_encoders=1, open_images=opener)
    assert files(tmp_path / "ray") == files(tmp_path / "one")
    assert same(again, expected)
    assert again.num_images == 30 + 23
    # Nothing to do.
    assert tokenize_on_ray(model, images, tmp_path / "ray", **SIZES).num_images == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_sets_in_memory_and_an_interrupt(tmp_path: Path) -> None:
    torch.manual_seed(1)
    images = ImageTensors(
        torch.randint(256, (50, 3, 16, 16)).byte(), torch.arange(50) % 3, ("a", "b", "c"), name="noise"
    )
    tokenize(tokenizer(), images, tmp_path / "one", **SIZES)

    def interrupt(done: int, total: int) -> None:
        if done > 30:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started us with "&"
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenize_on_ray(tokenizer(), images, tmp_path / "ray", **SIZES, num_encoders=1, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "index.json" not in files(tmp_path / "ray")
    tokenize_on_ray(tokenizer(), images, tmp_path / "ray", **SIZES, num_encoders=1)
    assert files(tmp_path / "ray") == files(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_mistakes_of_workers_are_told(images: ImageFiles, tmp_path: Path) -> None:
    other = partial(image_folder, images.folder.parent, "test", size=16, channels=3)
    with pytest.raises(ValueError, match=f"open_images gave 1 images .* expected {NUM_IMAGES}") as caught:
        tokenize_on_ray(tokenizer(), images, tmp_path / "codes", **SIZES, open_images=other)
    assert "\n" not in str(caught.value)
    # A node without the files: an error, and not a set of which no image can be read.
    gone = WatchedFiles.of(images, tmp_path, 0.0)
    gone.folder = tmp_path / "elsewhere"
    with pytest.raises(ValueError, match=f"none of the {NUM_IMAGES} images .* can be read") as caught:
        tokenize_on_ray(tokenizer(), images, tmp_path / "codes", **SIZES, open_images=partial(WatchedFiles.copy, gone))
    assert "\n" not in str(caught.value)
    # A file that is there no more, on a node that has the others.
    shutil.copytree(images.folder, tmp_path / "partly")
    partly = WatchedFiles.of(images, tmp_path, 0.0)
    partly.folder = tmp_path / "partly"
    (partly.folder / partly.key(100)).unlink()
    with pytest.raises(ValueError, match=r"odd/100\.png of .* cannot be read: No such file") as caught:
        tokenize_on_ray(tokenizer(), images, tmp_path / "lost", **SIZES, open_images=partial(WatchedFiles.copy, partly))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"2 CPUs and 0 GPUs; .* a GPU for each of 2"):
        tokenize_on_ray(tokenizer(), images, tmp_path / "codes", **SIZES, device="cuda", num_encoders=2)
    # Of a module that is here alone.
    alone: Any = type("Alone", (ImageFiles,), {"__module__": "nowhere"})
    elsewhere = alone.__new__(alone)
    elsewhere.__dict__.update(images.__dict__)
    with pytest.raises(ValueError, match=r"the node .* lacks .*No module named 'nowhere'.*pip install") as caught:
        tokenize_on_ray(tokenizer(), elsewhere, tmp_path / "codes", **SIZES)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="runs in this process already"):
        tokenize_on_ray(tokenizer(), images, tmp_path / "codes", **SIZES, address="127.0.0.1:1")
    with pytest.raises(ValueError, match="and a session, which has an address of its own"):
        tokenize_on_ray(
            tokenizer(), images, tmp_path / "codes", **SIZES, address="127.0.0.1:1", session=RaySession("127.0.0.1:1")
        )
    assert not list(tmp_path.glob("codes/*"))


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_images_do_not_pile_up(images: ImageFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding is fast and encoding slow; what is decoded ahead is bounded by blocks, of which each here is a slice."""
    monkeypatch.setattr(ray_engine, "_MIN_BLOCK_BYTES", 1)
    watched = tmp_path / "watched"
    watched.mkdir()
    model = WatchedTokenizer.of(watched, 0.05)
    sizes: dict[str, Any] = {"batch_size": 2, "shard_size": 60}
    ahead = []

    def count(done: int, total: int) -> None:
        read = sum(watched_by(watched, "read").values())
        ahead.append(read - done)

    tokenize_on_ray(
        model,
        WatchedFiles.of(images, watched, 0.0),
        tmp_path / "codes",
        **sizes,
        num_encoders=1,
        progress=count,
    )
    # Two CPUs and one encoder; besides what waits, some are being decoded, encoded, or on their way to the caller.
    limit = (ray_engine._BLOCKS_AHEAD * 3 + 8) * 2
    assert max(ahead) <= limit < NUM_IMAGES // 3, (max(ahead), limit)


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_the_command_gives_the_same_folder_and_starts_ray_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a Ray of its own: the last of these tests, as those before share one."""
    source = tmp_path / "photos"
    photos(source)
    tokenizer().save_pretrained(tmp_path / "run" / "codebook")
    ray = ray_session.import_ray()
    ray.shutdown()
    starts: list[dict[str, Any]] = []
    init = ray.init

    def counted(**options: Any) -> None:
        starts.append(options)
        init(**options, num_cpus=2, object_store_memory=STORE)

    monkeypatch.setattr(ray, "init", counted)
    for engine in ("local", "ray", "ray"):
        where = Engine(engine=engine, device="cpu")
        sizes = TokenizingFlags(batch_size=8, shard_size=32)
        run, output = str(tmp_path / "run"), tmp_path / engine
        assert tokenize_command(run, str(source), output=output, tokenizing=sizes, engine=where) == 1
    for split in ("train", "test"):
        assert files(tmp_path / "ray" / split) == files(tmp_path / "local" / split)
    out, errors = capfd.readouterr()
    lines = [line.partition("; ")[0].partition(": ")[2] for line in out.splitlines()]
    assert lines[:2] == lines[2:4] == lines[4:]
    assert out.count("all was there already") == 2
    assert all(line.startswith("skipped ") for line in errors.splitlines()), errors
    assert len(starts) == 1
    assert not ray.is_initialized()
