"""Every test runs on eight forced CPU devices, with shapes and dtypes checked and warnings as errors.

Subprocesses that a test starts get the compile cache and hurried compilation, and nothing else of this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Read when jax is first imported, here or in a subprocess.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time goes to compiling programs that run for milliseconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The annotations are checked in tests only. The hook must precede the first import of the package.
install_import_hook("ponder", "beartype.beartype")

settings.register_profile("ponder", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("ponder")


PLENTY = 3 * 2**30  # bytes of resident memory, beyond which programs of earlier tests are forgotten


@pytest.fixture(autouse=True, scope="module")
def forgetful() -> Iterator[None]:
    """Compiled programs of two thousand tests would take five gigabytes a process."""
    yield
    with contextlib.suppress(OSError):  # not every system says so
        if int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > PLENTY:
            jax.clear_caches()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real data sets (PONDER_DATA, or ../shared/data). The test is skipped where there is none."""
    named = os.environ.get("PONDER_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder.name}: set PONDER_DATA to their folder")
    return folder


@pytest.fixture
def optimised() -> Iterator[None]:
    """For tests that look at what the compiler made of a program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1")
