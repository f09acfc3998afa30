import pytest
from errand_helpers import FOCUS

from egjax.experience.rollouts import errand_batches, load_worlds
from egjax.sim.household import home_graph


@pytest.fixture(scope="session")
def worlds():
    return load_worlds([home_graph("cottage"), home_graph("flat")])


@pytest.fixture(scope="session")
def batches(worlds):
    """(world, episodes, states) of one batch of errands per home."""
    return list(errand_batches(worlds, 64, seed=3, focus=FOCUS, batch=32))


@pytest.fixture(scope="session")
def errand_list(batches):
    return [episode for _, episodes, _ in batches for episode in episodes]
