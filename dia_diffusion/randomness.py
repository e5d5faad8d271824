"""Seeds as a function of position: the random numbers of a step do not depend on the steps before."""

import numpy as np


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """Return a seed for a stream of random numbers of a step, from the seed of the run."""
    return int(np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)[0])
