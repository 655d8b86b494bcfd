"""One file with parameters and configuration."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import as_users_run  # noqa: F401

import ponder
from ponder import records, sharding
from ponder.config import Mesh
from ponder.errors import UserError
from ponder.export import HEADER, export_params, placed, read_params
from ponder.serialization import from_json

PARAMS = {
    "embedding": np.arange(32, dtype=np.float32).reshape(8, 4),
    "layers": [{"up": np.array([np.nan, -0.0], np.float32)}, {"half": jnp.arange(3, dtype=jnp.bfloat16)}],
}
CONFIG = {"name": "run", "model": {"steps": 4}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    split = jax.device_put(PARAMS["embedding"], jax.NamedSharding(mesh, jax.P("tensor", "fsdp")))
    export_params(tmp_path / "params.npz", jax.tree.map(jnp.asarray, PARAMS) | {"embedding": split}, CONFIG)
    return tmp_path / "params.npz"


def test_round_trip_is_bitwise(file: Path) -> None:
    leaves, config = read_params(file)
    params = placed(leaves, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS)))
    assert config == CONFIG
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        assert got.dtype == want.dtype and np.asarray(got).tobytes() == np.asarray(want).tobytes()
    assert [path.name for path in file.parent.iterdir()] == ["params.npz"]


def test_numpy_alone_reads_it(file: Path) -> None:
    with np.load(file) as archive:
        np.testing.assert_array_equal(archive["embedding"], PARAMS["embedding"])
        assert json.loads(archive[HEADER].tobytes())["config"] == CONFIG


def test_a_workdir_in_one_file(tmp_path: Path) -> None:
    """`ponder.export`: the file makes the model that `ponder.load` makes, and says of which run it is."""
    config = tiny.config(training__steps=2)
    ponder.train(config, tmp_path / "w")
    ponder.export(tmp_path / "w", tmp_path / "params.npz")
    leaves, stored = read_params(tmp_path / "params.npz")
    assert from_json(stored) == records.read_config(tmp_path / "w")
    model = ponder.load(tmp_path / "w")
    want = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, placed(leaves, want), want)
    with pytest.raises(UserError, match=r"no .*nowhere.config.json: name a workdir"):
        ponder.export(tmp_path / "nowhere", tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"is of another kind: name a file that ends in \.npz"):
        ponder.export(tmp_path / "w", tmp_path / "params.safetensors")


def test_other_model(file: Path) -> None:
    leaves, _ = read_params(file)
    wanted = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, PARAMS))
    with pytest.raises(UserError, match=r"embedding is \(8, 4\) float32 in the file and \(9, 4\) float32 in this"):
        placed(leaves, wanted | {"embedding": jax.ShapeDtypeStruct((9, 4), jnp.float32)})
    with pytest.raises(UserError, match=r"layers/0/up is \(2,\) float32 in the file and absent in this model"):
        placed(leaves, {"embedding": wanted["embedding"]})


def test_bad_files(file: Path) -> None:
    content = file.read_bytes()
    for damage in (content[: len(content) // 2], b"", b"text", content.replace(b"\x00\x00\x80?", b"\x00\x00\x81?", 1)):
        file.write_bytes(damage)
        with pytest.raises(UserError, match="damaged"):
            read_params(file)
    with pytest.raises(UserError, match="is not there"):
        read_params(file.parent / "other.npz")
    with pytest.raises(UserError, match="cannot write"):
        export_params(file.parent / "nowhere" / "params.npz", {"x": jnp.zeros(2)}, {})
