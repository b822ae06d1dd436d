"""Benchmarks: ratios measured in pairs, and comparisons on real data; see docs/benchmarks.md."""

from ranksure.openmp import wait_briefly

wait_briefly()  # before any module here loads torch: as the command line does
