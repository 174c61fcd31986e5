"""Images to shards on a cluster, by Ray Data.

    tasks, wherever a CPU is free       actors, one to a device             the caller
    read, decode, pad               ──>   to the device, encode, back   ──>   collect, write, index

The shards are those of `vqvae.tokens.tokenize`, byte for byte: the same slices, each encoded alone, on as many threads
as the caller has. Nothing depends on the order in which slices come back, as a shard is written when it has all of its
own; so no slice waits for one that was lost.

What goes where. The model and the set go through Ray's object store, so nodes need not share a disk for them; only
the image files themselves must be at the same path on every node (or `open_images` opens what is there). A process
opens the set once and an actor loads the model once. The output folder is the caller's alone. Every process needs this
package.

What is lost. Tasks and actors that die are run again, by Ray, as often as it takes, on whatever node has room; what a
lost node had decoded is decoded again. An image that cannot be read is data and stops nothing. Where the caller dies,
the next call goes on from the shards that are there.

What fills memory. Decoded images wait in the object store for an encoder: of all nodes together at most
`_BLOCKS_AHEAD` blocks for each CPU and encoder, after which Ray starts no more tasks.

Needs the extra `ray`.
"""

import importlib
import math
import pickle
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vqvae.data import Images, ImageTensors
from vqvae.data.images import EncodedImages
from vqvae.tokens.jobs import one_job
from vqvae.tokens.layout import Plan, Tokenizer, Tokenizing, plan
from vqvae.tokens.pipeline import Decoded, Tokenized, encode_batch, read_batch
from vqvae.tokens.ray_session import RaySession, import_ray, quiet
from vqvae.tokens.shards import Encoded, finish, write_shard

# Of a task: enough that Ray's own work on it is small, few enough that little is done again when it is lost.
_SLICES_PER_TASK = 32
_TASKS_PER_CPU = 4
# Small slices travel together.
_MIN_BLOCK_BYTES = 1 << 20
_BLOCKS_AHEAD = 4
# A CPU always has room for one decoding task beside a few encoders. Were an encoder to hold a whole CPU, a cluster that
# loses nodes could end with encoders on all that is left, and nothing to decode on.
_DECODER_CPUS = 0.9
_ENCODER_CPUS = 0.01
# torch warns that it could write to arrays that lie read-only in the object store; nothing here does.
_READ_ONLY = "The given NumPy array is not writable"


@dataclass(frozen=True, kw_only=True)
class TokenizingOnRay(Tokenizing):
    """How images become shards of codes on a cluster, which decodes wherever a CPU is free, in one job."""

    address: str | None = None
    """of a running Ray cluster (HOST:PORT of its head node); none starts Ray here, or joins RAY_ADDRESS"""
    device: str | None = None
    """of the encoders, cuda or cpu; None is cuda where the cluster has GPUs"""
    num_encoders: int | None = None
    """None is one to a GPU; on CPUs, as many as the threads that `torch.get_num_threads()` says go into the cluster's
    CPUs"""

    def __post_init__(self) -> None:
        if self.num_workers or self.rank or self.world_size != 1:
            raise ValueError(
                f"got num_workers={self.num_workers}, rank={self.rank} and world_size={self.world_size}; expected "
                "none of them, as the cluster shares out the work"
            )
        if self.device not in (None, "cuda", "cpu"):
            raise ValueError(f"got device={self.device!r}; expected 'cuda', 'cpu', or None for what the cluster has")
        if self.num_encoders is not None and self.num_encoders < 1:
            raise ValueError(f"got num_encoders={self.num_encoders}; expected at least 1")


def tokenize_on_ray(
    model: Tokenizer,
    images: Images,
    folder: str | Path,
    options: TokenizingOnRay = TokenizingOnRay(),
    *,
    session: RaySession | None = None,
    open_images: Callable[[], Images] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """Encode images to shards of codes in `folder`, as `tokenize` does, on a cluster.

        tokenize_on_ray(model, load_images("photos", size=256), "codes/train")      # this machine
        tokenize_on_ray(model, load_images("photos", size=256), "codes/train", TokenizingOnRay(address="10.0.0.1:6379"))

    A Ray that runs in this process already is used and left running; else one is joined or started, and ended after.
    To start takes Ray some ten seconds: for several sets, give them one `RaySession`.

    Args:
        model: on any device; encoders load a copy of it.
        session: that Ray runs in; None is one of this call's own, at the address of the options.
        open_images: how a process opens the same set itself, for nodes that have it elsewhere, or in a cache of their
            own: `partial(load_images, source, split=split, size=..., channels=...)`. None sends `images`.
        progress: called with the images that are done, and those that this call has to do, as codes come back.

    Raises:
        ValueError: as `tokenize`; the extra is missing; no cluster at `address`; it has not the GPUs; a node where not
            one image of the set can be read; the work came to a stop, as the cluster has lost what it needs.
    """
    start = time.perf_counter()
    ray = import_ray()
    todo = plan(model, images, folder, options)
    if session is not None and options.address is not None:
        raise ValueError(
            f"got address={options.address!r} and a session, which has an address of its own; expected one of them"
        )
    num_images = 0
    with one_job(todo) as shards:
        total = sum(len(todo.images(shard)) for shard in shards)
        if shards:
            arrived: dict[int, dict[int, Encoded]] = defaultdict(dict)
            with ExitStack() as stack:
                running = stack.enter_context(RaySession(options.address)) if session is None else session
                running.start()
                stack.enter_context(quiet(ray))
                stream = _encoded(ray, model, images, open_images, todo, shards, options)
                stack.enter_context(closing(stream))
                for shard, part in stream:
                    # By its first image: a slice that was made twice counts once.
                    parts = arrived[shard]
                    if part.first not in parts:
                        parts[part.first] = part
                        num_images += len(part.codes) + len(part.skipped)
                        if progress is not None:
                            progress(num_images, total)
                    if len(parts) == len(list(todo.slices(shard))):
                        write_shard(todo, shard, list(arrived.pop(shard).values()))
            assert not arrived, "slices are missing"
        summary = finish(todo)
    if summary is None:
        raise ValueError(
            f"shards of {todo.folder} are gone again; expected that nobody else changes it while it is made"
        )
    return Tokenized(**vars(summary), whole=True, num_images=num_images, seconds=time.perf_counter() - start)


def _encoded(
    ray: Any,
    model: Tokenizer,
    images: Images,
    open_images: Callable[[], Images] | None,
    todo: Plan,
    shards: list[int],
    options: TokenizingOnRay,
) -> Generator[tuple[int, Encoded], None, None]:
    """Shard and codes of each slice, in the order in which they come back."""
    has = ray.cluster_resources()
    num_cpus, num_gpus = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    device, num_encoders = options.device or ("cuda" if num_gpus else "cpu"), options.num_encoders
    if num_encoders is None:
        num_encoders = max(1, num_gpus if device == "cuda" else num_cpus // torch.get_num_threads())
    if num_cpus < 1 or (device == "cuda" and num_gpus < num_encoders):
        raise ValueError(
            f"the cluster has {num_cpus} CPUs and {num_gpus} GPUs; expected at least 1 CPU"
            + (f" and a GPU for each of {num_encoders} encoders" if device == "cuda" else "")
        )
    num_slices = sum(len(list(todo.slices(shard))) for shard in shards)
    num_encoders = min(num_encoders, num_slices)
    per_task = min(_SLICES_PER_TASK, math.ceil(num_slices / (_TASKS_PER_CPU * num_cpus)))
    num_tasks = math.ceil(num_slices / per_task)
    block_bytes = max(_MIN_BLOCK_BYTES, todo.batch_size * math.prod(todo.image_shape))

    with warnings.catch_warnings():
        # A copy sets every option, and Ray warns of those that are to go.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data\.context")
        context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = block_bytes
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(
        object_store_memory=_BLOCKS_AHEAD * (num_cpus + num_encoders) * block_bytes
    )
    _check_nodes(ray, {__name__, type(model).__module__, type(images).__module__})
    source = ray.put(_pack(images) if open_images is None else open_images)
    packed = ray.put(_pack_model(model))
    with ray.data.DataContext.current(context):
        encoded = (
            # Not `range`: its tasks want a whole CPU each, which a node of one CPU and an encoder has not.
            ray.data.from_items([{"id": task} for task in range(num_tasks)], override_num_blocks=num_tasks)
            .map_batches(
                partial(_decode, source=source, todo=todo, shards=shards, per_task=per_task, num_slices=num_slices),
                batch_size=None,
                batch_format="numpy",
                num_cpus=_DECODER_CPUS,
            )
            .map_batches(
                _Encode,
                fn_constructor_args=(packed, device, torch.get_num_threads(), torch.get_float32_matmul_precision()),
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=num_encoders),
                num_cpus=_ENCODER_CPUS,
                num_gpus=1 if device == "cuda" else 0,
            )
        )
        try:
            with closing(iter(encoded.iter_batches(batch_size=None, batch_format="numpy"))) as batches:
                for batch in batches:
                    for part in batch["part"]:
                        yield pickle.loads(part)
        except ray.exceptions.RayError as error:
            raise _plain(error) from error


def _check_nodes(ray: Any, modules: set[str]) -> None:
    """Raise ValueError where a node lacks one of these: Ray Data would try there without end."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    # A lambda, as that travels as code and not as a name in a module that may not be there.
    probe = ray.remote(num_cpus=_DECODER_CPUS)(
        lambda: [importlib.import_module(name).__name__ for name in sorted(modules)]
    )
    for node in nodes:
        try:
            ray.get(probe.options(scheduling_strategy=strategy(node["NodeID"], soft=True)).remote())
        except ImportError as error:
            reason = getattr(error, "cause", error)
            raise ValueError(
                f"the node {node['NodeManagerAddress']} lacks what is here ({reason}); expected the same packages "
                "on all nodes: pip install 'vqvae-priors[ray]' there"
            ) from error


def _plain(error: Exception) -> Exception:
    """The ValueError that a process raised, in place of Ray's account of where."""
    each: BaseException | None = error
    while each is not None:
        if type(each) is ValueError:
            # Ray Data adds lines to it, on how to try again.
            return ValueError(str(each).splitlines()[0])
        each = getattr(each, "cause", None) or each.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ValueError(f"the work on Ray came to a stop: {(lines or [type(error).__name__])[-1]}; run it again to go on")


def _pack_model(model: Tokenizer) -> tuple[Any, dict[str, Tensor]]:
    """A model as its options and its weights, which are copies on the CPU."""
    assert isinstance(model, nn.Module)
    return model.config, {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _pack(images: Images) -> Any:
    """A set for the object store. Of arrays, unlike tensors, all processes of a node share one copy there."""
    if type(images) is not ImageTensors:
        return images
    return (
        images.images.numpy(),
        None if images.labels is None else images.labels.numpy(),
        images.class_names,
        images.name,
    )


# What follows runs in Ray's processes.


@lru_cache(maxsize=1)
def _open(source: Any, shape: tuple[int, int, int], num_images: int) -> Images:
    """The set, opened once in a process."""
    import ray

    found = ray.get(source)
    if isinstance(found, tuple):
        pixels, labels, class_names, name = found
        labels = None if labels is None else torch.from_numpy(labels)
        return ImageTensors(torch.from_numpy(pixels), labels, class_names, name=name)
    images = found if isinstance(found, Images) else found()
    if images.shape != shape or len(images) != num_images:
        raise ValueError(
            f"open_images gave {len(images)} images of shape {images.shape}, expected {num_images} of {shape}; "
            "every node must have the same set"
        )
    if isinstance(images, EncodedImages):
        # On a node without the files every image would be one that cannot be read, and no error.
        images.check_readable()
    return images


def _decode(
    batch: dict[str, np.ndarray], *, source: Any, todo: Plan, shards: list[int], per_task: int, num_slices: int
) -> Iterator[dict[str, np.ndarray]]:
    """The slices of a task, one by one, so that no more than a few are here at once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _READ_ONLY)
        images = _open(source, todo.image_shape, todo.num_images)
        # All shards have as many slices but the last of the set, behind which there is none.
        per_shard = math.ceil(todo.shard_size / todo.batch_size)
        for task in batch["id"].tolist():
            for at in range(task * per_task, min((task + 1) * per_task, num_slices)):
                shard = shards[at // per_shard]
                indices = list(todo.slices(shard))[at % per_shard]
                decoded = read_batch(images, indices, todo.batch_size)
                rest = replace(decoded, images=np.empty(0, np.uint8))
                yield {"images": decoded.images[None], "rest": _cell((shard, str(todo.dtype), todo.tile, rest))}


class _Encode:
    """An encoder: the model, on one device."""

    def __init__(self, packed: Any, device: str, num_threads: int, precision: str):
        import ray

        # As the caller has them: with other numbers of threads sums are cut elsewhere, and round differently.
        torch.set_num_threads(num_threads)
        torch.set_float32_matmul_precision(precision)
        warnings.filterwarnings("ignore", _READ_ONLY)
        config, weights = ray.get(packed)
        # As the caller's, which may be of another precision than a fresh one.
        dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        self.model = config.build().to(device, dtype)
        self.model.load_state_dict(weights)
        self.model.eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        shard, dtype, tile, rest = pickle.loads(batch["rest"][0])
        decoded: Decoded = replace(rest, images=batch["images"][0])
        part = encode_batch(self.model, decoded, tile)
        return {"part": _cell((shard, replace(part, codes=part.codes.astype(dtype))))}


def _cell(value: Any) -> np.ndarray:
    """A column of one row that holds any value."""
    return np.array([pickle.dumps(value)], object)
