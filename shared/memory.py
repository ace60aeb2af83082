"""What a service does about its memory: giving back what start-up left, and keeping what frames use again.

Linking a process against torch reads through all of its libraries, CUDA's among them where the build has them, and on a
CPU most of that is never looked at again: of an edge's 780 MiB after a frame, 390 are pages of files that nothing
changed. The kernel holds those files' pages anyway and may drop them whenever it needs room, so a process may let go of
them at any time; what it does use comes back from the file cache, in 20 ms for all that coding a frame needs.

glibc gives a large block back to the kernel as soon as it is free, and the next frame asks for as much again, which the
kernel then hands out zeroed page by page: 10,000 pages, and a sixth of the time that decoding 1920x1080 pixels takes.
"""

import ctypes
import re
import sys
from pathlib import Path

_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)")
_MADV_DONTNEED = 4
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST_KEPT = 32 << 20  # bytes of a block that is kept for the next frame
MOST_KEPT = 64 << 20  # free bytes that are kept, in each of malloc's arenas


def keep_freed_memory() -> bool:
    """Let malloc keep what a frame freed for the next one; whether it does. Only glibc's has such settings."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_M_TRIM_THRESHOLD, MOST_KEPT))


def release_file_pages(smaps: Path = Path("/proc/self/smaps")) -> int:
    """Let go of mapped files' pages that this process cannot write to and never wrote; returns the mappings' bytes.

    Those that the linker wrote to and then made read-only stay, and so does all that is the process's own. Does nothing
    where there is no such list of mappings (anything but Linux).
    """
    if sys.platform != "linux" or not smaps.exists():
        return 0
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    released = 0
    for start, size in clean_mappings(smaps.read_text()):
        if madvise(start, size, _MADV_DONTNEED) == 0:  # locked pages refuse, and stay
            released += size
    return released


def clean_mappings(smaps: str) -> list[tuple[int, int]]:
    """Address and bytes of each mapping in the text of `smaps` that is of a file, read-only and without own pages."""
    found: list[tuple[int, int]] = []
    mapping, own_kb = (0, 0), 0
    for line in smaps.splitlines():
        if head := _MAPPING.match(line):
            start, end = int(head[1], 16), int(head[2], 16)
            mapping, own_kb = (start, end - start), 0 if head[4] != "0" and "w" not in head[3] else 1
        elif line.startswith(("Anonymous:", "Swap:")):  # a page of its own may be on disk by now
            own_kb += int(line.split()[1])
            if line.startswith("Swap:") and own_kb == 0:
                found.append(mapping)
    return found
