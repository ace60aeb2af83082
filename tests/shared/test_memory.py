"""Letting go of files' pages: what is the process's own stays, what is dropped comes back."""

import subprocess
import sys

import pytest

from shared.memory import clean_mappings, keep_freed_memory, release_file_pages

SMAPS = """\
7f0000000000-7f0000004000 r-xp 00000000 08:01 77   /lib/code.so
Rss:                  16 kB
Anonymous:             0 kB
Swap:                  0 kB
SwapPss:               0 kB
7f0000004000-7f0000006000 r--p 00004000 08:01 77   /lib/code.so
Anonymous:             8 kB
Swap:                  0 kB
7f0000006000-7f0000008000 r--p 00006000 08:01 77   /lib/code.so
Anonymous:             0 kB
Swap:                  8 kB
7f0000008000-7f000000a000 rw-p 00008000 08:01 77   /lib/code.so
Anonymous:             0 kB
Swap:                  0 kB
7f000000a000-7f000000c000 r--p 00000000 00:00 0
Anonymous:             0 kB
Swap:                  0 kB
7f000000c000-7f000000d000 r--s 00000000 08:01 78   /usr/share/data
Anonymous:             0 kB
Swap:                  0 kB
"""
MEASURED = """
import re, sys
import numpy, torch
from shared.memory import release_file_pages

def held():
    text = open("/proc/self/status").read()
    return {name: int(re.search(name + r":\\s+(\\d+)", text)[1]) for name in ("RssAnon", "RssFile")}

square = torch.ones(300, 300) @ torch.ones(300, 300)
before, released, after = held(), release_file_pages(), held()
assert torch.equal(torch.ones(300, 300) @ torch.ones(300, 300), square)
assert numpy.linalg.svd(numpy.eye(5))[1].tolist() == [1] * 5
print(before["RssFile"], after["RssFile"], after["RssAnon"] - before["RssAnon"], released >> 10)
"""


def test_only_files_pages_that_nothing_wrote_to_are_let_go():
    assert clean_mappings(SMAPS) == [(0x7F0000000000, 0x4000), (0x7F000000C000, 0x1000)]


@pytest.mark.skipif(sys.platform != "linux", reason="there is a list of mappings on Linux only")
def test_a_process_works_on_with_a_fraction_of_the_files_pages():
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, own, released = map(int, done.stdout.split())
    assert after < 0.3 * before
    assert abs(own) < 8 << 10
    assert released > before - after


def test_where_there_is_no_list_of_mappings_nothing_happens(tmp_path):
    assert release_file_pages(tmp_path / "none") == 0


FAULTS = """
import resource, sys
import numpy
from shared.memory import keep_freed_memory

assert sys.argv[1] == "as it is" or keep_freed_memory()
for turn in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [numpy.ones(size << 20, numpy.uint8) for size in (1, 24, 3, 24, 8)]
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="malloc has settings in glibc only")
def test_the_next_frame_finds_the_memory_of_the_last_one():
    faults = {}
    for how in ("as it is", "kept"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        faults[how] = int(done.stdout)
    assert faults["kept"] < 100 < faults["as it is"]
