"""What every test here starts with."""

import image_files
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def same_noise() -> None:
    """The same random pictures in a test, whichever tests ran before."""
    image_files.RNG = np.random.default_rng(0)
