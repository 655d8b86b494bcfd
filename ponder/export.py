"""Parameters and configuration as one file, for other programs and for passing on.

    ponder.export("runs/addition", "addition.npz")

A NumPy `.npz`: one array a leaf by its name ("core/0/up"), and `ponder.json` (UTF-8 bytes) with the format version, the
run's configuration as `config.json` has it, and the dtypes. It needs nothing but NumPy to be read, and the zip's own
CRC-32 tells damage. Dtypes that NumPy lacks (bfloat16) are stored as their bits.
"""

from __future__ import annotations

import io
import json
import os
import sys
import types
import zipfile
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from ponder import records, serialization, sweep, train
from ponder.errors import UserError

FORMAT = 1
HEADER = "ponder.json"


def export(workdir: epath.PathLike, path: epath.PathLike, which: Literal["best", "last"] = "last") -> None:
    """Write the trained parameters of a workdir, and its configuration, to one file.

    Args:
      workdir: folder of the run. Of several members that trained together the first is taken.
      path: the file, `.npz`.
      which: as in `ponder.load`.

    Raises:
      UserError: no trained run there, or a file that cannot be written.
    """
    if epath.Path(path).suffix != ".npz":
        raise UserError(f"{path} is of another kind: name a file that ends in .npz")
    config = sweep.members(records.read_config(workdir))[0]
    params = nnx.to_pure_dict(nnx.state(train.load(workdir, which), nnx.Param))
    export_params(path, params, serialization.to_json(config))


def export_params(path: epath.PathLike, params: Any, config: dict[str, Any]) -> None:
    """Write `params` (a pytree of arrays) and `config` (JSON) to `path`, whole or not at all.

    In a run of several processes all call it, and process 0 writes. Raises UserError where it cannot.
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): _on_host(leaf) for path, leaf in paths}
    header = {"format": FORMAT, "config": config, "dtypes": {name: str(leaf.dtype) for name, leaf in leaves.items()}}
    arrays: dict[str, Any] = {
        name: leaf.view(f"u{leaf.itemsize}") if leaf.dtype.kind == "V" else leaf for name, leaf in leaves.items()
    }
    arrays[HEADER] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    if jax.process_index() == 0:
        path = epath.Path(path)
        part = path.parent / f"{path.name}.{os.getpid()}"
        try:
            part.write_bytes(buffer.getvalue())
            part.replace(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def read_params(path: epath.PathLike) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Leaves by name, on the first device, and the configuration. `placed` makes the tree of a model of them.

    Raises:
      UserError: no such file, damaged, or of another format.
    """
    try:
        with np.load(io.BytesIO(epath.Path(path).read_bytes())) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop(HEADER).tobytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there: give a file that export_params has written") from error
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged, or no export of parameters ({type(error).__name__})") from error
    if header["format"] != FORMAT:
        raise UserError(f"{path} is of export format {header['format']}, but this version reads format {FORMAT}")
    leaves = {name: jnp.asarray(array.view(jnp.dtype(header["dtypes"][name]))) for name, array in arrays.items()}
    return leaves, header["config"]


def placed(leaves: dict[str, jax.Array], abstract_params: Any) -> Any:
    """The leaves as a tree like `abstract_params`. Raises UserError that names the first leaf of another shape."""
    paths, tree = jax.tree_util.tree_flatten_with_path(abstract_params)
    wanted = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    for name in [*wanted, *(name for name in leaves if name not in wanted)]:
        here, there = (
            f"{tuple(each[name].shape)} {each[name].dtype}" if name in each else "absent" for each in (wanted, leaves)
        )
        if here != there:
            raise UserError(f"the export is of another model: {name} is {there} in the file and {here} in this model")
    return jax.tree_util.tree_unflatten(tree, [leaves[name] for name in wanted])


def _on_host(leaf: jax.Array) -> np.ndarray:
    if not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


class _Callable(types.ModuleType):
    """`ponder.export` is this module; calling it exports."""

    def __call__(self, *arguments: Any, **keywords: Any) -> None:
        export(*arguments, **keywords)


sys.modules[__name__].__class__ = _Callable
