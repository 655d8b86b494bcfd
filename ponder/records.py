"""What a workdir remembers of its run: the resolved configuration, as JSON, and where it came from.

`config.json` holds the format version, the configuration, a hash of the data, the commit, versions and command that
began the run, and the same of every session that its steps come from. Workdirs may lie on `gs://`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath, epy

import ponder
from ponder import sweep
from ponder.config import MAY_CHANGE, Config
from ponder.errors import UserError
from ponder.serialization import from_json, to_json
from ponder.walkable import can_walk

with epy.lazy_imports():
    import jax

FORMAT = 1
RESULTS, TRACES = "results.json", "traces.jsonl"
_PACKAGE = Path(__file__).resolve().parent

# Modules that cannot change a number: how a run is started, kept, shown and compared.
_LOOKS = (
    *("ablate", "bench", "checkpoint", "checksum", "cli", "errors", "jobs", "lock", "memory"),
    *("metrics", "preemption", "profiling", "records", "report", "reporting", "runlog", "serialization", "statistics"),
    *("train", "writers"),
)
# Fields of the configuration that cannot change a number.
_LOOK_FIELDS = ("logging", "name", "checkpoint.every_steps", "checkpoint.keep_last")
# Nor can these of a run that has no walk: there they are refused now, and older runs were asked for them in vain.
_WALK_FIELDS = ("evaluation.walk", "evaluation.depths", "evaluation.readouts", "evaluation.risk")


# --- the workdir ------------------------------------------------------------------------------------------------------


def prepare(workdir: epath.PathLike) -> epath.Path:
    """The workdir, made if need be. Raises UserError if it is a file, cannot be made or needs a missing library."""
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"workdir {path} is a file, or lies under one: name a folder") from error
    except OSError as error:
        raise UserError(f"workdir {path} cannot be made ({error.strerror}): name a folder you may write to") from error
    except ImportError as error:
        raise _unreachable(path, error) from error
    return path


def settle(workdir: epath.PathLike, config: Config) -> Config:
    """The configuration to run in a workdir: a new run's own, or the one to go on with. Writes nothing.

    Raises UserError if the workdir holds another run, or its data have changed.
    """
    path = epath.Path(workdir)
    if not (path / "config.json").exists():
        return config
    check_same(path, config)
    return continued(read_config(path), config)


def begin(workdir: epath.PathLike, config: Config, argv: Sequence[str], first: int = 0) -> None:
    """Record that a session goes on from step `first`, and drop the results that its steps make stale.

    To be called when all that the user may have got wrong has been checked: from here on the workdir holds this run.
    Raises UserError if it cannot be written.
    """
    path = prepare(workdir)
    if jax.process_index() == 0:
        if first < config.training.steps:
            for name in (RESULTS, TRACES):
                (path / name).unlink(missing_ok=True)
        write_config(path, config, argv, first)


def write_config(workdir: epath.PathLike, config: Config, argv: Sequence[str], first: int = 0) -> None:
    """Write `config.json`, whole or not at all, with a session that trains from step `first`.

    Of the sessions before, those stay whose steps are in the run: all that began below `first`. Where nothing is left
    to train, this is no session. Raises UserError if the workdir cannot be written or the task's data are missing.
    """
    path = prepare(workdir)
    sessions = _sessions(path)
    if first < config.training.steps or not sessions:
        sessions = [session for session in sessions if session["first_step"] < first]
        origin = {"commit": commit(), "versions": versions(), "argv": list(argv), "hardware": hardware()}
        sessions.append({"first_step": first} | origin)
    record = {
        "format": FORMAT,
        "config": to_json(config),
        "data": data_key(config),
        **{name: sessions[0][name] for name in ("versions", "commit", "argv")},
        "sessions": sessions,
    }
    write_whole(path / "config.json", json.dumps(record, indent=2) + "\n")


def _sessions(workdir: epath.Path) -> list[dict[str, Any]]:
    if not (workdir / "config.json").exists():
        return []
    record = _read_record(workdir / "config.json")
    # Workdirs from before there were sessions say how the last one began.
    only = {"first_step": 0} | {name: record[name] for name in ("versions", "commit", "argv") if name in record}
    return record.get("sessions") or [only]


def trained_by(workdir: epath.PathLike) -> dict[str, Any]:
    """The commits that a run was trained by, as one text, and the versions and hardware of its last session."""
    sessions = _sessions(epath.Path(workdir))
    commits = dict.fromkeys(session["commit"] for session in sessions)
    last = sessions[-1]
    return {
        "commit": ", ".join(commits),
        "hardware": last.get("hardware") or hardware(),
        "versions": last["versions"],
    }


def read_results(workdir: epath.PathLike, config: Config) -> list[dict[str, Any]] | None:
    """The entries of `results.json`, where they are of this configuration and data; else None."""
    try:
        results = json.loads((epath.Path(workdir) / RESULTS).read_text())
        same = [entry["config"] for entry in results] == [to_json(member) for member in sweep.members(config)]
        same = same and all(entry["data"] == data_key(config) for entry in results)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return results if results and same else None


def read_finished(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The entries of `results.json`. Raises UserError where the training has not ended."""
    path = epath.Path(workdir) / RESULTS
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no {path}: the training of {workdir} has not ended") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): run the training's command again") from error


def write_whole(path: epath.PathLike, text: str) -> None:
    """Write a file of the workdir so that it is there whole or not at all. Raises UserError if it cannot be written."""
    path = epath.Path(path)
    part = path.parent / f"{path.name}.{os.getpid()}"
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        raise UserError(f"workdir {path.parent} cannot be written ({error.strerror})") from error


def workdirs(folder: epath.PathLike) -> list[epath.Path]:
    """The folder itself where it is a run's, else the runs in it, by name, as `ponder.ablate` leaves them there.

    Raises UserError where there is none, or where one of several has not been trained to its end."""
    folder = epath.Path(folder)
    if (folder / "config.json").exists():
        return [folder]
    found = sorted(path.parent for path in folder.glob("*/config.json"))
    if not found:
        raise UserError(f"{folder} is no workdir, and there is none in it: name runs of ponder.train or ponder.ablate")
    for path in found:
        if not (path / RESULTS).exists():
            raise UserError(f"{path} has not been trained to its end: train it, or name the runs one by one")
    return found


def read_config(workdir: epath.PathLike) -> Config:
    """The configuration of a workdir. Raises UserError where there is none, or it is damaged or of a newer format."""
    return read_file(epath.Path(workdir) / "config.json")


def read_file(path: epath.PathLike) -> Config:
    """The configuration in a `config.json`, as `read_config`."""
    return from_json(_read_record(epath.Path(path))["config"])


def _read_record(path: epath.Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no {path}: name a workdir that `python -m ponder.train` made") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    except ImportError as error:
        raise _unreachable(path, error) from error
    if not isinstance(record, dict) or "config" not in record:
        raise UserError(f"{path} has no configuration: it is not a workdir's config.json")
    if record.get("format") != FORMAT:
        raise UserError(f"{path} has format {record.get('format')}; this version of ponder reads format {FORMAT}")
    return record


def _unreachable(path: epath.Path, error: ImportError) -> UserError:
    """Of object stores whose library is not installed."""
    return UserError(f"{path} cannot be reached ({error}): pip install 'ponder[gcs]', or name a local folder")


def difference(old: Config, new: Config) -> list[str]:
    """What differs, as `training.batch_size: 64 -> 128`, save for what `ponder.config.MAY_CHANGE` lists."""
    before, after = dict(_flat(to_json(old))), dict(_flat(to_json(new)))
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in {**before, **after}
        if before.get(name, _flat) != after.get(name, _flat) and not _may_change(name)
    ]


def _may_change(name: str) -> bool:
    own = _own(name)
    return _under(own, MAY_CHANGE) and (own == name or not _under(own, ("training",)))


def _own(name: str) -> str:
    """A field's name in its own run, where that is one that goes before."""
    return name.rpartition("start.run.")[2]


def check_same(workdir: epath.PathLike, config: Config) -> None:
    """Whether a run of `config` may go on in `workdir`. Raises UserError with the difference where not."""
    record = _read_record(epath.Path(workdir) / "config.json")
    stored = from_json(record["config"])
    changes = difference(_with_decay(stored), _with_decay(continued(stored, config)))
    if changes:
        raise UserError(
            f"workdir {workdir} holds another run ({'; '.join(changes)}): keep its settings or name another"
        )
    if record.get("data", data := data_key(config)) != data:
        raise UserError(
            f"workdir {workdir} was trained on other data (hash {record['data']}, now {data}): "
            "restore the task's files or name another workdir"
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
    """Names a run by all that can change its numbers: the resolved configuration, the code and the files it reads."""
    files = {
        Path(module)
        for part in (config.task, config.model, config.rule)
        if (module := type(part).__module__).endswith(".py")
    }
    parts = [settings_key(config), code_of(config), [_hash_file(file) for file in sorted(files)]]
    try:
        if config.task.sources():
            parts.append(data_key(config))
    except UserError:  # a run will say what is missing; until then its data are no other run's
        parts.append("missing")
    if config.start is not None and config.start.run is not None:
        parts.append(run_key(config.start.run))
    elif config.start is not None:
        results = epath.Path(config.start.workdir or "") / RESULTS
        parts.append(hashlib.sha256(results.read_bytes()).hexdigest() if results.exists() else "missing")
    text = json.dumps(parts)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_key(config: Config) -> str:
    """Names a run by its configuration alone, whatever the code."""
    walked = can_walk(config.rule, config.model, config.task)
    looks = _LOOK_FIELDS if walked else (*_LOOK_FIELDS, *_WALK_FIELDS)
    settings = sorted((name, value) for name, value in _flat(to_json(config)) if not _under(_own(name), looks))
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def data_key(config: Config) -> str:
    """Names the data of a run: the task's settings and what its source files hold, zipped or not.

    Raises UserError where a file is missing or damaged.
    """
    text = json.dumps([to_json(config)["task"], config.task.contents()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def code_of(config: Config) -> str:
    """Hash of the modules that can change the numbers of this run: steps, evaluation and batches with all that they
    import, and its own task, model and rule. Another rule or task beside them leaves it as it is."""
    names = {type(part).__module__ for part in (config.task, config.model, config.rule)}
    names |= {"ponder.program", "ponder.evaluation", "ponder.data.feed", config.model.trajectory.partition(":")[0]}
    names |= {"ponder.start"} if config.start is not None else set()
    return _hash_modules(frozenset(name for name in names if name.split(".")[0] == "ponder"))


def look_again() -> None:
    """Let the next `run_key` see edits of the code that were made since the last one."""
    _hash_modules.cache_clear()


@functools.cache
def _hash_modules(names: frozenset[str]) -> str:
    waiting, found = set(names), dict[str, Path]()
    while waiting:
        name = waiting.pop()
        inside = name.split(".")[1:]
        path = _PACKAGE.joinpath(*inside)
        file = path.with_suffix(".py") if inside and path.with_suffix(".py").exists() else path / "__init__.py"
        if name in found or not file.exists() or (inside and inside[0] in _LOOKS):
            continue
        found[name] = file
        waiting |= {".".join(["ponder", *inside[:i]]) for i in range(len(inside))} | _imported(file)
    text = "".join(f"{name} {_hash_file(file)}\n" for name, file in sorted(found.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == "ponder"}


def _hash_file(file: Path) -> str:
    """An experiment's arms and settings are left out: the configuration that they make is hashed itself."""
    tree = ast.parse(file.read_text())
    tree.body = [node for node in tree.body if not _is_settings(node)]
    return hashlib.sha256(_canonical(tree).encode()).hexdigest()


def _is_settings(node: ast.stmt) -> bool:
    names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
    names += [node.target.id] if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else []
    return getattr(node, "name", None) in ("get_config", "arms") or any(name in ("ARMS", "SEEDS") for name in names)


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
