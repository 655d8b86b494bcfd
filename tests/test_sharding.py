"""Mesh, rules table, layouts of parameters, moments and batches, and the start of several processes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ponder import sharding
from ponder.config import Mesh
from ponder.errors import UserError

MESHES = [Mesh(1, 1, 1), Mesh(8, 1, 1), Mesh(2, 4, 1), Mesh(2, 2, 2)]


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        (Mesh(), (8, 1, 1)),
        (Mesh(1, 1, 1), (1, 1, 1)),
        (Mesh(2, 2, 2), (2, 2, 2)),
        (Mesh(2, -1, 1), (2, 4, 1)),
        (Mesh(1, 2, 1), (1, 2, 1)),
    ],
)
def test_mesh_sizes(asked: Mesh, shape: tuple[int, ...]) -> None:
    mesh = sharding.make_mesh(asked)
    assert mesh.devices.shape == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Mesh(16, 1, 1), "needs 16 devices, but there are 8"),
        (Mesh(-1, 3, 1), "3 does not divide the 8 devices"),
        (Mesh(-1, -1, 1), "at most one may be -1"),
        (Mesh(0, 1, 1), "at least 1"),
        (Mesh(-2, 1, 1), "at least 1"),
    ],
)
def test_bad_mesh(asked: Mesh, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        sharding.make_mesh(asked)
    assert "\n" not in str(error.value)


def test_spec_by_rules() -> None:
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    assert sharding.spec(("vocab", "embed"), (8, 4), mesh) == P("tensor", "fsdp")
    assert sharding.spec(("word", "embed"), (12, 4), mesh, "word_mask") == P(None, "fsdp")
    assert sharding.spec(("layers", "embed", "heads", "head_dim"), (3, 4, 2, 5), mesh) == P(
        None, "fsdp", "tensor", None
    )
    # The batch has taken fsdp, so an activation's embed stays whole.
    assert sharding.spec(("batch", "length", "embed"), (4, 3, 4), mesh) == P(("data", "fsdp"), None, None)
    assert sharding.spec((), (), mesh) == P()
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
        sharding.spec(("width",), (4,), mesh)
    with pytest.raises(ValueError, match="1 axis names"):
        sharding.spec(("embed",), (4, 4), mesh)


def test_indivisible_parameters() -> None:
    mesh = sharding.make_mesh(Mesh(1, 2, 4))
    leaf = jax.ShapeDtypeStruct((6, 10), jnp.float32)
    with pytest.raises(UserError, match=r"parameter core/up: its mlp dimension of 10 .* tensor size of 4"):
        sharding.shardings({"core": {"up": leaf}}, {"core": {"up": ("embed", "mlp")}}, mesh)
    # Left whole: a vocabulary of any size, a dimension smaller than the axis, an activation.
    assert sharding.spec(("vocab", "embed"), (13, 6), mesh, "embedding") == P(None, "fsdp")
    assert sharding.spec(("embed", "heads"), (6, 1), mesh, "key") == P("fsdp", None)
    assert sharding.spec(("length", "mlp"), (3, 10), mesh) == P(None, None)


def toy() -> tuple[dict, dict]:
    params = {"embedding": jnp.ones((16, 8)), "layers": [{"up": jnp.ones((3, 8, 16))}], "bias": jnp.ones(())}
    axes = {"embedding": ("vocab", "embed"), "layers": [{"up": ("layers", "embed", "mlp")}], "bias": ()}
    return params, axes


@pytest.mark.parametrize("seeds", [False, True])
def test_moments_lie_like_their_parameters(seeds: bool) -> None:
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    params, axes = toy()
    mask = {"embedding": False, "layers": [{"up": True}], "bias": False}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3), mask=mask))
    init = optimizer.init
    if seeds:
        params, init = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params), jax.vmap(init)
    placed = sharding.shardings(params, axes, mesh, seeds=seeds)
    lead = (None,) if seeds else ()
    assert placed["embedding"].spec == P(*lead, "tensor", "fsdp")
    assert placed["layers"][0]["up"].spec == P(*lead, None, "fsdp", "tensor")
    state = sharding.optimizer_shardings(optimizer, jax.eval_shape(init, params), placed, mesh)
    state = jax.jit(init, out_shardings=state)(jax.device_put(params, placed))
    adam = state[1][0]
    for moments in (adam.mu, adam.nu):
        jax.tree.map(lambda moment, want: moment.sharding.spec == want.spec or pytest.fail(), moments, placed)
        assert moments["embedding"].addressable_shards[0].data.shape == ((3, 8, 4) if seeds else (8, 4))
    assert adam.count.sharding.is_fully_replicated


def test_constrain() -> None:
    x = jnp.ones((8, 4))
    assert sharding.constrain(x, "batch", "embed") is x
    with jax.set_mesh(sharding.make_mesh(Mesh(2, 4, 1))):
        y = jax.jit(lambda x: sharding.constrain(x * 2.0, "batch", "embed"))(x)
    assert y.addressable_shards[0].data.shape == (1, 4)
    np.testing.assert_array_equal(y, 2.0)


def test_check_batch() -> None:
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    sharding.check_batch(24, mesh, accumulate=3)
    with pytest.raises(UserError, match=r"batch size 24 is not divisible by 20 .*5 micro-batches.* as 20"):
        sharding.check_batch(24, mesh, accumulate=5)
    with pytest.raises(UserError, match=r"batch size 1 is not divisible by 4 .* as 4"):
        sharding.check_batch(1, mesh)


@pytest.mark.parametrize("seeds", [False, True])
def test_put_batch(seeds: bool) -> None:
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    assert sharding.process_share(mesh) == (0, 1)
    host = {"inputs": np.arange(3 * 8 * 4).reshape(3, 8, 4).astype(np.int32)}
    if not seeds:
        host["weights"] = np.arange(3 * 8.0).reshape(8, 3)
        host["inputs"] = host["inputs"].reshape(8, 12)
    batch = sharding.put_batch(host, mesh, seeds=seeds)
    for name, leaf in batch.items():
        np.testing.assert_array_equal(leaf, host[name])
        assert leaf.sharding.spec == sharding.batch_sharding(mesh, seeds=seeds).spec
        rows = leaf.addressable_shards[0].data.shape[1 if seeds else 0]
        assert rows == 2


class Start:
    """Stands in for jax.distributed.initialize."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def __call__(self, *arguments: object) -> None:
        self.calls.append(arguments)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    for name in (
        "PONDER_COORDINATOR",
        "PONDER_PROCESSES",
        "PONDER_PROCESS",
        "SLURM_STEP_NUM_TASKS",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    start = Start()
    monkeypatch.setattr(jax.distributed, "initialize", start)
    return start


@pytest.mark.parametrize(
    ("environment", "calls"),
    [
        ({}, []),
        ({"PONDER_COORDINATOR": "h:1", "PONDER_PROCESSES": "2", "PONDER_PROCESS": "1"}, [("h:1", 2, 1)]),
        ({"PONDER_COORDINATOR": "h:1", "PONDER_PROCESSES": "1", "PONDER_PROCESS": "0"}, []),
        ({"SLURM_STEP_NUM_TASKS": "4"}, [()]),
        ({"SLURM_STEP_NUM_TASKS": "1"}, []),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, [()]),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, []),
    ],
)
def test_initialize_distributed(
    environment: dict[str, str], calls: list[tuple], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sharding.initialize_distributed()
    assert start.calls == calls


@pytest.mark.parametrize(
    "environment",
    [
        {"PONDER_COORDINATOR": "h:1"},
        {"PONDER_COORDINATOR": "h:1", "PONDER_PROCESSES": "two", "PONDER_PROCESS": "0"},
        {"PONDER_COORDINATOR": "h:1", "PONDER_PROCESSES": "2", "PONDER_PROCESS": "2"},
    ],
)
def test_bad_place(environment: dict[str, str], start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="PONDER_PROCESS"):
        sharding.initialize_distributed()
    assert not start.calls
