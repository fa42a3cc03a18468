"""Runs of recipes, made once for the tests of all processes."""

import forked
import pytest
from recipe_runs import LAUNCHED, RUNS, argv


@pytest.fixture(scope="session")
def out(shared):
    """out(run) -> its folder; a run is made when the first test asks for it."""

    def finished(name):
        place = name.replace(" ", "-")

        def make(folder):
            failure = forked.main(RUNS[name][0], argv(name, folder / place), LAUNCHED.get(name, {}))
            assert not failure, failure

        return shared(f"run-{place}", make) / place

    return finished
