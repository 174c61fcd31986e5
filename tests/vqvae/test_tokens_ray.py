"""The Ray engine makes the files of the engine of one machine, byte for byte, whatever dies on the way.

Starting Ray takes longer than all else here, so tests that need it are slow ones, and share it where they can.
"""

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
from ray_worlds import WatchedFiles, WatchedTokenizer, watched_by
from token_worlds import call, contents, loaded, photos, plan, refused, tokenize, tokenize_on_ray, tokenizer

from vqvae.data import ImageTensors, load_images
from vqvae.data.folder import ImageFiles, image_folder
from vqvae.tokens import ray_engine, ray_session
from vqvae.tokens.jobs import one_job
from vqvae.tokens.ray_session import RaySession
from vqvae.tokens.shards import missing

NUM_IMAGES = 203
BROKEN = (0, 70, 202)
STORE = 100_000_000
SIZES: dict[str, Any] = {"batch_size": 8, "shard_size": 30}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageFiles:
    return loaded(photos(tmp_path_factory.mktemp("photos"), num=NUM_IMAGES, broken=BROKEN))


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
def local(settings) -> Iterator[None]:
    ray = ray_session.import_ray()
    with ray_session.environment(ray_session.ENVIRONMENT):
        ray.init(num_cpus=2, object_store_memory=STORE, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield
    ray.shutdown()


@pytest.fixture
def watched(tmp_path) -> Path:
    """Where processes leave word of what they did."""
    (tmp_path / "watched").mkdir()
    return tmp_path / "watched"


def test_a_missing_extra_is_named(images, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refused(r"pip install 'vqvae-priors\[ray\]'"):
        tokenize_on_ray(images, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_encoders": 0}, "got num_encoders=0; expected at least 1"),
        ({"device": "tpu"}, "got device='tpu'"),
        ({"num_workers": 2}, "got num_workers=2, .* as the cluster shares out the work"),
        ({"address": "127.0.0.1:1"}, "no Ray at 127.0.0.1:1: .*refused.*HOST:PORT"),
        ({"address": "127.0.0.1:99999"}, "no Ray at 127.0.0.1:99999: .*HOST:PORT"),
        ({"address": "127.0.0.1:1", "session": RaySession()}, "and a session, which has an address of its own"),
    ],
)
def test_mistakes_are_told(images, tmp_path, options, message):
    with refused(message):
        tokenize_on_ray(images, tmp_path / "codes", **options)


def test_case_06_one_job_at_a_time(images, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(RaySession, "start", lambda self: pytest.fail("it started Ray"))
    with one_job(plan(images, tmp_path / "codes")), refused("is being written by another job"):
        tokenize_on_ray(images, tmp_path / "codes")


@pytest.mark.parametrize("per_task", [1, 3, 100])
def test_tasks_take_every_missing_slice_once(images, tmp_path, per_task, monkeypatch):
    """The steps of the workers, without Ray: shards of 30 in slices of 8, so some are short; two shards are there."""
    monkeypatch.setattr(ray_engine, "_open", lambda source, shape, num: images)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda ref: ref))
    todo = plan(images, tmp_path, **SIZES)
    shards = [shard for shard in missing(todo) if shard not in (0, 3)]
    expected = [(shard, part.start) for shard in shards for part in todo.slices(shard)]
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    encode = ray_engine._Encode(ray_engine._pack_model(tokenizer()), "cpu", threads, precision)
    rest = {"source": None, "todo": todo, "shards": shards, "per_task": per_task, "num_slices": len(expected)}
    found = []
    for task in range(-(-len(expected) // per_task)):
        for batch in ray_engine._decode({"id": np.array([task])}, **rest):
            (cell,) = encode(batch)["part"]
            shard, part = pickle.loads(cell)
            assert part.codes.dtype == todo.dtype
            found.append((shard, part.first))
    assert found == expected


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_same_bytes_though_processes_and_a_node_die(images, tmp_path, watched, monkeypatch):
    ray = ray_session.import_ray()
    from ray.cluster_utils import Cluster

    # Blocks of one slice, so that little is decoded ahead and a decoder is at work when it is killed.
    monkeypatch.setattr(ray_engine, "_MIN_BLOCK_BYTES", 1)
    # And larger images, of which few are decoded ahead.
    images = load_images(images.folder.parent, size=16)
    model = WatchedTokenizer(**{**vars(tokenizer().config), "image_size": 16}, watched=str(watched), seconds=0.05)
    expected = tokenize(images, tmp_path / "one", model, shard_size=30)
    mine = watched_by(watched, "encoded").keys()
    node = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=STORE)
        cluster.wait_for_nodes()
        done: list[str] = []

        def disturb(num: int, total: int) -> None:
            if num >= 8 and "encoder" not in done:
                os.kill(max(watched_by(watched, "encoded").keys() - mine), signal.SIGKILL)
                done.append("encoder")
            elif num >= 40 and "decoder" not in done:
                assert watched_by(watched, "read").total() < NUM_IMAGES, "all is decoded already"
                # Who has read most recently is still at work.
                newest = max(watched.glob("read.*"), key=lambda path: path.stat().st_mtime_ns)
                os.kill(int(newest.name.split(".")[1]), signal.SIGKILL)
                done.append("decoder")
            elif num >= 80 and "node" not in done:
                cluster.remove_node(second, allow_graceful=False)
                done.append("node")

        slow = WatchedFiles.of(images, watched, 0.05)
        sizes = {"shard_size": 30, "address": cluster.address}
        made = tokenize_on_ray(slow, tmp_path / "ray", model, **sizes, progress=disturb)
        assert done == ["encoder", "decoder", "node"]
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert (made.num_rows, made.unreadable, made.num_images) == (expected.num_rows, expected.unreadable, NUM_IMAGES)
    assert watched_by(watched, "read").total() > NUM_IMAGES, "nothing was decoded again"
    assert len(watched_by(watched, "encoded").keys() - mine) >= 2, "the encoder was not started again"


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_same_bytes_resumed_and_listed(images, tmp_path, capfd):
    expected = tokenize(images, tmp_path / "one", **SIZES)
    progress: list[tuple[int, int]] = []
    made = tokenize_on_ray(
        images, tmp_path / "ray", **SIZES, num_encoders=1, progress=lambda *each: progress.append(each)
    )
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert (made.whole, made.num_rows, made.num_shards, made.num_images) == (True, 200, 7, NUM_IMAGES)
    assert made.unreadable == expected.unreadable
    assert len(progress) == 6 * 4 + 3
    assert progress == sorted(progress)
    assert progress[-1] == (NUM_IMAGES, NUM_IMAGES)

    # Goes on where a run was stopped: of the shards only those that are not there, or are cut, are made.
    (tmp_path / "ray" / "codes-00001.safetensors").unlink()
    os.truncate(tmp_path / "ray" / "codes-00006.safetensors", 100)
    opener = partial(image_folder, images.folder.parent, "train", size=8, channels=3)
    again = tokenize_on_ray(images, tmp_path / "ray", **SIZES, num_encoders=1, open_images=opener)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert again.unreadable == expected.unreadable
    assert again.num_images == 30 + 23
    # Nothing to do.
    assert tokenize_on_ray(images, tmp_path / "ray", **SIZES).num_images == 0
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_sets_in_memory_and_an_interrupt(tmp_path):
    pixels = torch.randint(256, (50, 3, 8, 8)).byte()
    images = ImageTensors(pixels, torch.arange(50) % 3, ("a", "b", "c"), name="noise")
    tokenize(images, tmp_path / "one", **SIZES)

    def interrupt(done: int, total: int) -> None:
        if done > 30:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell started us with "&"
    try:
        with pytest.raises(KeyboardInterrupt):
            tokenize_on_ray(images, tmp_path / "ray", **SIZES, num_encoders=1, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert "index.json" not in contents(tmp_path / "ray")
    tokenize_on_ray(images, tmp_path / "ray", **SIZES, num_encoders=1)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_mistakes_of_workers_are_told(images, tmp_path):
    other = partial(image_folder, images.folder.parent, "test", size=8, channels=3)
    # A node without the files: an error, and not a set of which no image can be read.
    gone = WatchedFiles.of(images, tmp_path, folder=tmp_path / "elsewhere")
    # A file that is there no more, on a node that has the others.
    partly = WatchedFiles.of(images, tmp_path, folder=shutil.copytree(images.folder, tmp_path / "partly"))
    (partly.folder / partly.key(110)).unlink()
    # Of a module that is here alone.
    alone: Any = type("Alone", (ImageFiles,), {"__module__": "nowhere"})
    elsewhere = alone.__new__(alone)
    elsewhere.__dict__.update(images.__dict__)
    for source, options, message in (
        (images, {"open_images": other}, f"open_images gave 1 images .* expected {NUM_IMAGES}"),
        (images, {"open_images": gone.copy}, f"none of the {NUM_IMAGES} images .* can be read"),
        (images, {"open_images": partly.copy}, r"b/110\.png of .* cannot be read: No such file"),
        (images, {"device": "cuda", "num_encoders": 2}, r"2 CPUs and 0 GPUs; .* a GPU for each of 2"),
        (elsewhere, {}, r"the node .* lacks .*No module named 'nowhere'.*pip install"),
        (images, {"address": "127.0.0.1:1"}, "runs in this process already"),
    ):
        with refused(message):
            tokenize_on_ray(source, tmp_path / "codes", **SIZES, **options)
    assert not (tmp_path / "codes" / "index.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_the_command_gives_the_same_folder_and_starts_ray_once(images, tmp_path, capfd, monkeypatch):
    """With a Ray of its own: the last of these tests, as those before share one."""
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
        args = ("-o", tmp_path / engine, "--engine", engine, "--device", "cpu", "--shard-size", 64)
        assert call(tmp_path / "run", images.folder.parent, *args) == 1
    for split in ("train", "test"):
        assert contents(tmp_path / "ray" / split) == contents(tmp_path / "local" / split)
    out, errors = capfd.readouterr()
    lines = [line.partition("; ")[0].partition(": ")[2] for line in out.splitlines()]
    assert lines[:2] == lines[2:4] == lines[4:]
    assert out.count("all was there already") == 2
    assert all(line.startswith("skipped ") for line in errors.splitlines()), errors
    assert len(starts) == 1
    assert not ray.is_initialized()
