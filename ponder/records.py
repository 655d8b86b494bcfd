"""What a workdir remembers of its run: the resolved configuration, as JSON, and where it came from.

`config.json` holds the format version, the configuration, versions, commit and command. Workdirs may lie on `gs://`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from etils import epath, epy

import ponder
from ponder.config import MAY_CHANGE, Config
from ponder.errors import UserError

with epy.lazy_imports():
    import jax

FORMAT = 1
_PACKAGE = Path(__file__).resolve().parent

# Modules that cannot change a number: how a run is started, kept, shown and compared.
_LOOKS = (
    "ablate",
    "bench",
    "checkpoint",
    "cli",
    "errors",
    "lock",
    "memory",
    "profiling",
    "records",
    "report",
    "reporting",
    "statistics",
    "writers",
)
# Fields of the configuration that cannot change a number.
_LOOK_FIELDS = ("logging", "name", "checkpoint.every_steps", "checkpoint.keep_last")


# --- configuration <-> JSON -------------------------------------------------------------------------------------------


def to_json(config: Config) -> dict[str, Any]:
    """The configuration as JSON values. An instance of a subclass carries {"type": "module:Class"}."""
    return _encode(config, Config)


def from_json(values: dict[str, Any]) -> Config:
    """The configuration back. Raises UserError on an unknown key, a missing one, a bad value or an unknown class."""
    return _decode(values, Config, "config")


def hints(cls: type) -> dict[str, Any]:
    """Types of a dataclass's fields, resolved."""
    types_ = typing.get_type_hints(cls, include_extras=True)
    return {field.name: types_[field.name] for field in dataclasses.fields(cls) if field.init}


def _encode(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        kind = {} if cls is hint else {"type": _tag(cls)}
        return kind | {name: _encode(getattr(value, name), inner) for name, inner in hints(cls).items()}
    if isinstance(value, tuple):
        return [_encode(item, None) for item in value]
    return value


def _decode(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, dict):
        cls = _untag(value["type"], where) if "type" in value else hint
        if not dataclasses.is_dataclass(cls):
            raise UserError(f"{where} is a group, expected {describe(hint)}")
        fields, given = hints(typing.cast(type, cls)), {name: v for name, v in value.items() if name != "type"}
        for name in given:
            if name not in fields:
                raise UserError(f"unknown {where}.{name}{nearest(name, fields)}")
        decoded = {name: _decode(inner, fields[name], f"{where}.{name}") for name, inner in given.items()}
        try:
            return typing.cast(Any, cls)(**decoded)
        except TypeError as error:  # a field without default is missing
            raise UserError(f"{where} is incomplete: {error}") from error
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(hint):
            return None
        for choice in get_args(hint):
            if choice is not type(None):
                try:
                    return _decode(value, choice, where)
                except UserError:
                    continue
    elif origin is Literal:
        if value in get_args(hint):
            return value
    elif origin is tuple and isinstance(value, list):
        inner = get_args(hint)
        each = [inner[0]] * len(value) if inner[-1:] == (Ellipsis,) else list(inner)
        if len(each) == len(value):
            return tuple(_decode(item, type_, where) for item, type_ in zip(value, each, strict=True))
    elif hint is Any or (isinstance(hint, type) and type(value) is hint):
        return value
    elif hint is float and type(value) is int:
        return float(value)
    raise UserError(f"{where} is {json.dumps(value)}, expected {describe(hint)}")


def describe(hint: Any) -> str:
    """A type, in words for a message."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return describe(inner[0])
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in inner)
    if origin is tuple:
        items = (describe(inner[0]), "...") if inner[-1:] == (Ellipsis,) else map(describe, inner)
        return f"a list ({', '.join(items)})"
    if hint is type(None):
        return "None"
    words: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return words.get(hint) or str(getattr(hint, "__name__", hint))


def nearest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`; nearest: a, b`, or all names where none is near and they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3)
    near += [other for other in known if other.rpartition(".")[2] == name.rpartition(".")[2] and other not in near]
    if not near and len(known) > 12:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
    return f"; {'nearest' if near else 'known'}: {', '.join(prefix + other for other in near or known)}"


def _tag(cls: type) -> str:
    """`module:Class`. A class from an experiment file has that file for its module, as seen from the project."""
    module = cls.__module__
    if module.endswith(".py") and Path(module).is_relative_to(_PACKAGE.parent):
        module = Path(module).relative_to(_PACKAGE.parent).as_posix()
    return f"{module}:{cls.__qualname__}"


def _untag(tag: str, where: str) -> type:
    module_name, _, name = tag.rpartition(":")
    try:
        if module_name.endswith(".py"):
            file = Path(module_name)
            file = file if file.exists() else _PACKAGE.parent / file
            module = sys.modules.get(str(file.resolve())) or load_file(file)
        else:
            module = importlib.import_module(module_name)
        return functools.reduce(getattr, name.split("."), module)  # type: ignore[return-value]
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{where}.type is {tag!r}, which is not to be found here") from error


def load_file(file: Path) -> types.ModuleType:
    """Run a Python file as a module whose name is its full path, so that its classes can be found again."""
    file = file.resolve()
    if not file.is_file():
        raise UserError(f"no experiment file {file}")
    spec = importlib.util.spec_from_file_location(str(file), file)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[str(file)] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[str(file)]
        raise
    return module


# --- the workdir ------------------------------------------------------------------------------------------------------


def prepare(workdir: epath.PathLike) -> epath.Path:
    """The workdir, made if need be. Raises UserError if it is a file or cannot be made."""
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"workdir {path} is a file, or lies under one: name a folder") from error
    except OSError as error:
        raise UserError(f"workdir {path} cannot be made ({error.strerror}): name a folder you may write to") from error
    return path


def write_config(workdir: epath.PathLike, config: Config, argv: Sequence[str]) -> None:
    """Write `config.json`, whole or not at all. Raises UserError if the workdir cannot be written."""
    path = prepare(workdir)
    record = {
        "format": FORMAT,
        "config": to_json(config),
        "versions": versions(),
        "commit": commit(),
        "argv": list(argv),
    }
    whole, part = path / "config.json", path / f"config.json.{os.getpid()}"
    try:
        part.write_text(json.dumps(record, indent=2) + "\n")
        part.replace(whole)
    except OSError as error:
        raise UserError(f"workdir {path} cannot be written ({error.strerror})") from error


def read_config(workdir: epath.PathLike) -> Config:
    """The configuration of a workdir. Raises UserError where there is none, or it is damaged or of a newer format."""
    return read_file(epath.Path(workdir) / "config.json")


def read_file(path: epath.PathLike) -> Config:
    """The configuration in a `config.json`, as `read_config`."""
    path = epath.Path(path)
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {path}: name a workdir that `python -m ponder.train` made") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(f"{path} has no configuration: it is not a workdir's config.json")
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has format {record.get('format')}; this version of ponder reads format {FORMAT}")
    return from_json(record["config"])


def difference(old: Config, new: Config) -> list[str]:
    """What differs, as `training.batch_size: 64 -> 128`, save for what `ponder.config.MAY_CHANGE` lists."""
    before, after = dict(_flat(to_json(old))), dict(_flat(to_json(new)))
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in {**before, **after}
        if before.get(name, _flat) != after.get(name, _flat) and not _under(name, MAY_CHANGE)
    ]


def check_same(workdir: epath.PathLike, config: Config) -> None:
    """Whether a run of `config` may go on in `workdir`. Raises UserError with the difference where not."""
    stored = read_config(workdir)
    changes = difference(_with_decay(stored), _with_decay(continued(stored, config)))
    if changes:
        raise UserError(
            f"workdir {workdir} holds another run ({'; '.join(changes)}): keep its settings or name another"
        )


def continued(stored: Config, new: Config) -> Config:
    """The new configuration, for going on with the stored run.

    A schedule whose length is the run's total steps keeps the length that the run began with: were it stretched to a
    new total, the learning rate would jump.
    """
    if new.optim.schedule == "constant" or new.optim.decay_steps is not None:
        return new
    if stored.optim.decay_steps is None and stored.training.steps == new.training.steps:
        return new
    decay_steps = stored.optim.decay_steps or stored.training.steps
    return dataclasses.replace(new, optim=dataclasses.replace(new.optim, decay_steps=decay_steps))


def _with_decay(config: Config) -> Config:
    if config.optim.schedule == "constant" or config.optim.decay_steps is not None:
        return config
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_steps=config.training.steps))


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _under(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


# --- where a number came from -----------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Of Python and of the libraries that compute."""
    found = {"python": platform.python_version(), "ponder": ponder.__version__}
    return found | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}


def commit() -> str:
    """The commit of the running code, `+dirty` where a tracked file differs, `unknown` outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the checkout around us is another project's
        # Tables are written by the runs themselves: they do not make the code another.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/experiments/results")
        return git("rev-parse", "HEAD") + ("+dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def hardware() -> str:
    """`NVIDIA H100 x 1`, or the CPU's model and cores."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{devices[0].device_kind} x {len(devices)}"
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found[1] if found else platform.processor() or platform.machine()
    return f"{model}, {os.cpu_count()} cores"


def run_key(config: Config) -> str:
    """Names a run by all that can change its numbers: the resolved configuration and the code."""
    values = to_json(config)
    settings = sorted((name, value) for name, value in _flat(values) if not _under(name, _LOOK_FIELDS))
    files = {
        Path(module)
        for part in (config.task, config.model, config.rule)
        if (module := type(part).__module__).endswith(".py")
    }
    text = json.dumps([settings, code_hash(), [_hash_file(file) for file in sorted(files)]])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_hash() -> str:
    """Of the modules that can change a number, without comments, docstrings and layout."""
    whole = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        name = file.relative_to(_PACKAGE).as_posix()
        if name.removesuffix(".py").split("/")[0] not in _LOOKS:
            whole.update(f"{name} {_hash_file(file)}\n".encode())
    return whole.hexdigest()[:16]


def _hash_file(file: Path) -> str:
    """An experiment's arms and settings are left out: the configuration that they make is hashed itself."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if not _is_settings(node)]
    return hashlib.sha256(_canonical(tree).encode()).hexdigest()


def _is_settings(node: ast.stmt) -> bool:
    names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
    names += [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []
    return getattr(node, "name", None) == "get_config" or any(name in ("ARMS", "SEEDS") for name in names)


def _canonical(node: Any) -> str:
    """The syntax tree as text. Unlike `ast.dump`, the same on every Python version: empty fields are left out."""
    if isinstance(node, list):
        return "[" + ",".join(_canonical(item) for item in node if not _is_docstring(item)) + "]"
    if isinstance(node, ast.AST):
        fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
        return f"{type(node).__name__}({','.join(f'{name}={_canonical(value)}' for name, value in fields)})"
    return repr(node)


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
