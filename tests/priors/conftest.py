import pytest
from prior_worlds import CONTINUOUS, KINDS

from priors import ContinuousPrior, Prior


@pytest.fixture(params=KINDS)
def prior(request: pytest.FixtureRequest) -> Prior:
    return KINDS[request.param]()


@pytest.fixture(params=CONTINUOUS)
def density(request: pytest.FixtureRequest) -> ContinuousPrior:
    """A continuous prior of one channel at two positions, whose density can be integrated."""
    return CONTINUOUS[request.param](dim=1, grid=(2,))


@pytest.fixture(params=CONTINUOUS)
def grid_density(request: pytest.FixtureRequest) -> ContinuousPrior:
    """A continuous prior over a grid of vectors."""
    return CONTINUOUS[request.param](dim=3, grid=(2, 3))
