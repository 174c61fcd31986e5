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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cuda", help="where `-m cuda` runs; cpu tries the lane itself without a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU what needs one is skipped, and says so."""
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU of tests that are marked `cuda`."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def untyped() -> Iterator[None]:
    """Annotations are not checked, so that a wrong argument reaches the library's own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
