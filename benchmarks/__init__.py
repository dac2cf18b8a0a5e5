"""Benchmarks of the margin-softmax head against what people use. `pytest benchmarks` runs toy sizes; `--sizes full` the real ones.

The protocol: same process, same inputs, contenders interleaved in random order over >= 5 rounds, one thread, CPU time,
medians and p10/p90 of paired ratios; a time is reported only beside a passing gate against float64.
"""
