"""How threads wait for each other; set before torch is imported, which reads it once."""

from __future__ import annotations

import os

SPINS = 1000  # some microseconds: the usual wait within a decomposition


def wait_briefly() -> None:
    """Let threads that wait spin for some microseconds, then sleep; what the user set stays.

    GNU OpenMP, which torch's Linux packages bring, lets them spin for long unless told otherwise: on two cores that
    another process wants too, small products then take up to tens of times as long. Told to sleep at once
    (``OMP_WAIT_POLICY=PASSIVE``), an eigenvalue decomposition of 384 x 384 takes four times as long on free cores,
    because it has thousands of short steps. ``python -m benchmarks.run --only threads`` measures both.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
