"""Randomness as a function of position: what is random about a step does not depend on what came before."""

import numpy as np


def step_seed(seed: int, step: int, stream: int = 0) -> int:
    """A seed that depends on the seed of the run, the step and the number of a stream of random numbers alone."""
    return int(np.random.SeedSequence((seed, step, stream)).generate_state(1, np.uint64)[0])
