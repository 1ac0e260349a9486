"""Time and memory of scans, layers and training steps against baselines, all contenders of a table in one run.

Every contender of ours is first held to the float64 loop on a small version of the shape. Then each round times every
contender once, and the next round starts with the next one, so that a machine that slows down slows all of them. Ratios
are of medians; their range is the interquartile range of the ratios within a round.
"""

from statemix.benchmark.commands import BENCHMARKS, Benchmark, run

__all__ = ["BENCHMARKS", "Benchmark", "run"]
