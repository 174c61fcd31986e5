"""Shapes and dtypes of every public signature are checked while tests run, by jaxtyping and beartype."""

from collections.abc import Iterator

import jaxtyping
import pytest

HOOK = jaxtyping.install_import_hook(["vqvae", "priors"], "type_checker.signature")


@pytest.fixture
def untyped() -> Iterator[None]:
    """Annotations are not checked, so that a wrong argument reaches the library's own checks."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
