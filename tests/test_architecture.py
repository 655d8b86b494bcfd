"""The house stands: imports go down, light parts import light, importing does nothing, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ponder"

# From the ground up. A module imports only from its own floor and those below; a name covers what lies under it.
FLOORS = (
    # what all others are written against: no jax code of ours, no data
    "config config_updates errors models.config models.sizes protocols sweep tasks.checksums tasks.sources tasks.task"
    " walkable",
    "checkpoint checksum compute data.batch frontier lock memory metrics preemption records risk serialization"
    " sharding statistics writers",
    "data tasks",
    "halting models",
    "engine",
    "objectives",
    "deep_supervision evaluation optim peers profiling program refilling step",
    "recipes",
    "runlog start walks",
    "cli jobs reporting",
    "ablate bench bench_decode bench_depth bench_forward bench_halting evaluate export report think thinking train",
)
LEVELS = {name: level for level, names in enumerate(FLOORS) for name in names.split()}
APART = ("models", "halting")  # neither imports the other


def level(module: str) -> tuple[str, int]:
    """The longest entry of FLOORS that covers a module, and its floor."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in LEVELS:
            return name, LEVELS[name]
    raise AssertionError(f"give ponder.{module} a floor in tests/test_architecture.py")


def modules() -> dict[str, Path]:
    """Names below `ponder.`; the package itself, which imports lazily by name, is left out."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def imported(source: str, known: set[str]) -> set[str]:
    """Modules of ours that a source imports, wherever in it: lazily and inside functions, too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner.removeprefix("ponder.") in known else str(node.module))
    return {name.removeprefix("ponder.") for name in names if name.startswith("ponder.")}


def climbs(importer: str, others: set[str]) -> list[str]:
    """What is wrong with a module's imports."""
    name, own = level(importer)
    wrong = []
    for other in sorted(others):
        other_name, below = level(other)
        if below > own:
            wrong.append(f"ponder.{importer} (floor of {name}) imports ponder.{other} (higher floor of {other_name})")
        if {name, other_name} == set(APART):
            wrong.append(f"ponder.{importer} imports ponder.{other}: {' and '.join(APART)} stand apart")
    return wrong


def test_imports_go_down() -> None:
    found = modules()
    assert found
    wrong = [line for name, path in found.items() for line in climbs(name, imported(path.read_text(), set(found)))]
    assert wrong == []


@pytest.mark.parametrize(
    "importer, source",
    [
        ("models.layers", "import ponder.halting.act"),
        ("halting.act", "from ponder.models import layers"),
        ("engine.masked", "def f():\n    from ponder import train"),
        ("step", "from ponder import records, cli"),
        ("tasks.parity", "from ponder.models.transformer import Transformer"),
        ("config", "from ponder.sharding import make_mesh"),
    ],
)
def test_a_climbing_import_is_seen(importer: str, source: str) -> None:
    assert climbs(importer, imported(source, set(modules()) | {"halting.act", "models.layers", "train", "cli"}))


def test_a_module_without_a_floor_is_seen() -> None:
    with pytest.raises(AssertionError, match=r"give ponder\.novelty\.part a floor"):
        level("novelty.part")


def python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIGHT = {
    "ponder": ("jax", "numpy", "tyro"),
    "config protocols models.config tasks.task": ("jax", "tyro"),
    "cli records compute halting bench think": ("jax", "flax"),
    "models halting engine objectives bench": (),
}
DATA = ("tensorflow_datasets", "grain", "orbax", "tensorflow")


@pytest.mark.parametrize("packages", LIGHT)
def test_light_parts_import_light(packages: str, tmp_path: Path) -> None:
    wanted = () if packages == "ponder" else packages.split()
    below = [name for name in modules() if any(name == part or name.startswith(f"{part}.") for part in wanted)]
    assert len(below) >= len(wanted)
    code = f"import importlib, ponder\nfor name in {below!r}: importlib.import_module('ponder.' + name)\n"
    code += f"print(*{{*{LIGHT[packages] + DATA!r}}} & set(sys.modules))"
    assert python(code, tmp_path) == ""


def test_importing_does_nothing(tmp_path: Path) -> None:
    code = f"""
import importlib, os, threading
environment, threads, path = dict(os.environ), threading.active_count(), list(sys.path)
import jax
set_by_jax = dict(os.environ)
for name in {sorted(modules())!r}:
    importlib.import_module("ponder." + name)
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a device was asked for"
assert threading.active_count() == threads, threading.enumerate()
assert sys.path == path
changed = {{name for name in os.environ.keys() | set_by_jax.keys() if os.environ.get(name) != set_by_jax.get(name)}}
print(*sorted(name for name in changed if "PONDER" in name or "JAX" in name or "XLA" in name or "MALLOC" in name))
"""
    assert python(code, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_files_stay_small() -> None:
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    files += [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tpu").glob("*.sh")]
    long = {path.relative_to(ROOT).as_posix(): n for path in files if (n := path.read_text().count("\n")) > 500}
    assert long == {}


def test_the_version_is_written_once_more_only() -> None:
    import tomllib

    import ponder

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == ponder.__version__
