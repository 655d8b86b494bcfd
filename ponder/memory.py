"""The allocator setting that makes training on CPU faster, taken before the process starts.

XLA asks malloc for its temporaries at every call, hundreds of MiB, and glibc serves them by a fresh mmap: each step
then pays some 200,000 page faults. `glibc.malloc.hugetlb=1` has malloc ask for huge pages, which leaves a few hundred,
at the same peak memory. glibc reads it when a process starts, so the only way to set it for the user is to start again.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

SETTING = "glibc.malloc.hugetlb=1"
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def helps(environment: Mapping[str, str]) -> bool:
    """Whether this machine gains by the setting, and its user has not said otherwise.

    Linux with glibc 2.35 or later and transparent huge pages on (`madvise` or `always`); GLIBC_TUNABLES is not set, and
    PONDER_MALLOC is not `default`.
    """
    if environment.get("PONDER_MALLOC") == "default" or "GLIBC_TUNABLES" in environment or sys.platform != "linux":
        return False
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        mode = _HUGE_PAGES.read_text()
    except (OSError, ValueError):  # another C library, or a kernel without huge pages
        return False
    return (
        name == "glibc"
        and tuple(int(part) for part in version.split(".")[:2]) >= (2, 35)
        and ("[madvise]" in mode or "[always]" in mode)
    )


def reexec() -> None:
    """Start this command once more with the setting, where that helps. For the mains alone.

    Does not return if it acts. Never acts in a test or an interactive session, whose process is not ours to replace.
    """
    if "pytest" in sys.modules or "ipykernel" in sys.modules or hasattr(sys, "ps1") or not helps(os.environ):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # `orig_argv` still says `-m ponder.train`, which `argv` does not.
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "GLIBC_TUNABLES": SETTING})
