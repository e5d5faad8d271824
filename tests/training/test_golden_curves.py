"""Training computes what it computed: see golden_curves.py."""

import json
import statistics

import pytest
from golden_curves import FILE, RUNS, STEPS, computed_on, curve

from training_runs import fresh_state

GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate allows one configuration a process; each test here is as in a process of its own."""
    fresh_state()


@pytest.mark.parametrize("name", RUNS)
def test_the_losses_are_those_that_were_kept(name, tmp_path):
    """To the last bit where they were computed, and to 1e-4 elsewhere."""
    found, kept = curve(name, tmp_path / "run"), GOLDEN["losses"][name]
    assert len(found) == len(kept) == STEPS
    assert statistics.mean(kept[-20:]) < statistics.mean(kept[:5])
    if GOLDEN["computed_on"] == computed_on():
        assert found == kept
    else:
        assert found == pytest.approx(kept, rel=1e-4)
