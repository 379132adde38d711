"""That the allocator is told what to keep, unless somebody has tuned it."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from experiments.allocator import keep_freed_memory

said = keep_freed_memory()
faults = []
for _ in range(6):
    block = bytearray(2**24)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(said, faults[-1] - faults[1])
"""


def told(**environment):
    """What it said, and the page faults of taking and freeing 16 MiB four times."""
    tuned = ("MALLOC_", "GLIBC_TUNABLES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    command = [sys.executable, "-c", PROGRAM]
    out = subprocess.run(
        command, env=kept | environment, capture_output=True, check=True, text=True
    )
    said, faults = out.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not run: needs glibc")
def test_freed_memory_is_kept_unless_the_environment_tunes_it():
    said, faults = told()
    assert said == "True"
    assert faults < 100
    said, faults = told(MALLOC_MMAP_THRESHOLD_="131072")
    assert said == "False"
    assert faults >= 4 * 2**24 // 2**16  # pages may be large
