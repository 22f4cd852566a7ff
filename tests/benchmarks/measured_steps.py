"""Steps that children of the tests measure."""

import time

import numpy as np

MB = 1_000_000


def fill(megabytes):
    """Memory that is really resident."""
    return np.ones(megabytes * MB, dtype=np.uint8)


def grows(before, during):
    """Building the inputs peaks at `before` megabytes and frees them; the step peaks at `during`."""
    fill(before)
    fill(10)  # so that numpy's own first-use costs are over

    def step():
        size = len(fill(during))
        return {"filled": size}

    return step


def sleeps(seconds):
    return lambda: time.sleep(seconds)


def raises():
    raise ValueError("no such input")
