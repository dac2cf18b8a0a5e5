"""Bytes of a head in two planes, and of its step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recog_fast import native

_MEASURE = """
import resource, torch, recog_fast as rf
torch.set_num_threads(1)

def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()

def measure(classes, momentum):
    head = rf.MarginHead(classes, 128, weight_format='split')
    optimizer = rf.HeadSGD(head, 0.1, momentum_dtype=momentum)
    open('/proc/self/clear_refs', 'w').write('5')  # the peak counts from here
    before = resident()
    head(torch.randn(16, 128), torch.randint(classes, (16,))).backward()
    optimizer.step()
    peak = next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmHWM'))
    high, low, velocity = (t.numel() * t.element_size() for t in (head.weight, head.weight_low, optimizer.state[head.weight]['momentum_buffer']))
    print((high + low + velocity) / (classes * 128), (peak - before - velocity) / 2**20)

measure(100, torch.bfloat16)  # whatever a first call makes
measure(200_000, torch.float32)
measure(200_000, torch.bfloat16)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak resident set is read from Linux's /proc")
@pytest.mark.skipif(native.load()[0] is None, reason="of the compiled kernels")
def test_bytes_of_an_element_and_what_a_step_takes_beside_them() -> None:
    """8 and 6 bytes; beside them a few chunks of W whatever C is, where W in float32 has 98 MiB."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, and counts when it is taken again
    done = subprocess.run([sys.executable, "-c", _MEASURE], capture_output=True, text=True, env=environment)
    if "Permission" in done.stderr:
        pytest.skip("/proc/self/clear_refs may not be written here")
    assert done.returncode == 0, done.stderr
    found = [[float(word) for word in line.split()] for line in done.stdout.splitlines()[1:]]
    print(found)
    assert [held for held, _ in found] == [8, 6]
    for _, extra in found:
        assert extra <= 16  # a chunk joined, split, its velocity: 4 MiB each at most; a few of the kernels
