from __future__ import annotations

import pytest

from egjax.sim.graph import encode, sizes_of
from egjax.sim.household import home_graph, home_programs
from egjax.sim.robothow import find_dataset


@pytest.fixture(scope="session")
def robothow():
    """The installed RobotHow folder."""
    folder = find_dataset()
    if folder is None:
        pytest.skip("the RobotHow data is not installed")
    return folder


@pytest.fixture(scope="session")
def home():
    """The cottage: scene, state, names."""
    return encode(home_graph("cottage"), where="cottage")


@pytest.fixture(scope="session")
def homes():
    """The embedded programs and the sizes that hold both homes."""
    programs = home_programs()
    return programs, sizes_of(program.init for program in programs)
