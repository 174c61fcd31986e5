"""Shapes and dtypes of every public signature are checked while tests run, by jaxtyping and beartype."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import jaxtyping
import pytest
import torch

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # As many threads as there are cores to each of pytest's processes, and to what it starts.
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What sampling measures of this machine goes to a folder of the session's own, which its processes share.
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

HOOK = jaxtyping.install_import_hook(["vqvae", "priors"], "type_checker.signature")


@pytest.fixture
def untyped() -> Iterator[None]:
    """Annotations are not checked, so that a wrong argument reaches the library's own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The lane for a GPU has one process: more would each hold a context on it, and compile the same kernels."""
    if config.option.markexpr == "cuda" and hasattr(config.option, "numprocesses"):
        config.option.numprocesses = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False here"))
