import pytest
from prior_worlds import KINDS

from priors import Prior


@pytest.fixture(params=KINDS)
def prior(request: pytest.FixtureRequest) -> Prior:
    return KINDS[request.param]()
