"""Checkpoints: bitwise on any mesh, damage never believed, the right ones kept, refusals of one line."""

from __future__ import annotations

import json
import logging
import resource
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ponder import checkpoint, checksum, sharding
from ponder.checkpoint import Checkpoints, load_params
from ponder.config import Mesh
from ponder.errors import UserError


class State(NamedTuple):
    step: Any
    params: Any
    optimizer: Any
    average: Any


AXES = {"embedding": ("vocab", "embed"), "layers": [{"up": ("layers", "embed", "mlp")}, {"bias": ("mlp",)}]}
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def values(seed: int) -> State:
    """Host arrays; `seed` tells steps apart."""
    draw = np.random.default_rng(seed).normal
    params = {
        "embedding": draw(size=(64, 32)).astype(np.float32),
        "layers": [{"up": draw(size=(2, 32, 4)).astype(np.float32)}, {"bias": draw(size=(4,)).astype(np.float32)}],
    }
    params["embedding"][0, :3] = [np.nan, -0.0, np.inf]
    moments = jax.tree.map(np.asarray, OPTIMIZER.init(params))
    return State(np.int32(seed), params, moments, jax.tree.map(lambda leaf: leaf * np.float32(0.5), params))


def placed(state: State, mesh: Mesh) -> State:
    """On devices, as training places it."""
    devices = sharding.make_mesh(mesh)
    params = sharding.shardings(state.params, AXES, devices)
    shardings = State(
        sharding.replicated(devices),
        params,
        sharding.optimizer_shardings(OPTIMIZER, state.optimizer, params, devices),
        params,
    )
    return jax.device_put(state, shardings)


def abstract(state: State) -> State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def same(one: Any, other: Any) -> bool:
    """Bit by bit, NaNs and signs of zero included."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def written(workdir: Path, steps: int = 2, **options: Any) -> State:
    """Saves steps 1 ... `steps` and gives back where a state belongs."""
    with Checkpoints(workdir, keep_last=steps, **options) as saves:
        for step in range(1, steps + 1):
            state = placed(values(step), Mesh(2, 2, 2))
            saves.save(step, state, {"position": step})
    return abstract(state)


@pytest.mark.parametrize("mesh", [Mesh(2, 2, 2), Mesh(8, 1, 1), Mesh(1, 4, 2), Mesh(1, 1, 1)], ids=str)
def test_restores_bitwise_on_any_mesh(tmp_path: Path, mesh: Mesh) -> None:
    written(tmp_path)
    target = abstract(placed(values(0), mesh))
    with Checkpoints(tmp_path) as saves:
        state, feed_state, step = saves.restore(target)
    assert (step, feed_state) == (2, {"position": 2})
    assert same(state, values(2))
    assert jax.tree.structure(state) == jax.tree.structure(values(2))
    jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding or pytest.fail(str(want)), state, target)


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).restore(abstract(placed(values(0), Mesh(1, 1, 1)))) is None
    assert Checkpoints(tmp_path).latest is None
    assert not list(tmp_path.iterdir())


def test_all_dtypes(tmp_path: Path) -> None:
    dtypes = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")
    state = {name: (jnp.arange(7) % 3).astype(name) for name in dtypes} | {"scalar": jnp.float32(3)}
    with Checkpoints(tmp_path) as saves:
        saves.save(1, state, {})
        assert same(saves.restore(abstract(state)).state, state)


def test_donated_buffers_do_not_reach_the_file(tmp_path: Path) -> None:
    """`save` returns before the bytes are on disk, and the next step overwrites the buffers."""
    change = jax.jit(lambda x: x * 1.5 + 1.0, donate_argnums=0)
    x = jnp.arange(2**20, dtype=jnp.float32)
    with Checkpoints(tmp_path, keep_last=9) as saves:
        want = []
        for step in range(3):
            want.append(np.array(x))
            saves.save(step, {"x": x}, {})
            x = change(x)
        saves.wait()
        for step in (2, 1, 0):
            assert same(saves.restore(jax.eval_shape(lambda: {"x": x})).state["x"], want[step])
            shutil.rmtree(tmp_path / "checkpoints" / str(step))


def oracle_sum(x: np.ndarray) -> int:
    """The checksum in arbitrary precision, word by word."""
    words = np.frombuffer(x.tobytes(), f"u{min(x.itemsize, 4)}")
    total = 0
    for place, word in enumerate(words.tolist()):
        bits = word ^ (place * 0x9E3779B9) % 2**32
        bits = (bits ^ bits >> 16) * 0x85EBCA6B % 2**32
        bits = (bits ^ bits >> 13) * 0xC2B2AE35 % 2**32
        total += bits ^ bits >> 16
    return total % 2**32


def test_checksums() -> None:
    host = [values(3).params["embedding"], np.arange(6, dtype=np.int8).reshape(2, 3), np.array([True, False])]
    want = [oracle_sum(x) for x in host]
    for mesh in (Mesh(1, 1, 1), Mesh(1, 4, 2)):
        devices = sharding.make_mesh(mesh)
        split = jax.NamedSharding(devices, jax.P("tensor", "fsdp"))
        arrays = [jax.device_put(host[0], split), *(jax.device_put(x, sharding.replicated(devices)) for x in host[1:])]
        assert checksum.checksums(arrays) == want
    swapped = host[0].copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    flipped = host[0].copy()
    flipped.view(np.uint32)[3, 3] ^= 1
    assert len({*checksum.checksums(map(jnp.asarray, (host[0], swapped, flipped, -host[0])))}) == 4


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "scores", "kept"),
    [
        (2, True, [0.1, 0.9, 0.3, 0.9, 0.5, 0.4], [2, 5, 6]),  # of equals the earlier
        (1, True, [0.1, 0.9, 0.3, 0.9, 0.5, 0.4], [2, 6]),
        (2, False, [0.1, 0.9, 0.3, 0.9, 0.5, 0.4], [5, 6]),
        (2, True, [None, float("nan"), None, -1.0, None, None, None], [4, 6, 7]),
        (3, True, [None] * 5, [3, 4, 5]),
    ],
)
def test_which_steps_stay(tmp_path: Path, keep_last: int, keep_best: bool, scores: list, kept: list[int]) -> None:
    state = {"x": jnp.zeros(2)}
    numbered, half = list(enumerate(scores, 1)), len(scores) // 2
    for part in (0, 1):  # the second half in another process, as it were
        with Checkpoints(tmp_path, keep_last, keep_best) as saves:
            for step, score in numbered[half:] if part else numbered[:half]:
                saves.save(step, state, {}, {"accuracy": 0.5}, score)
    assert saves.steps() == kept
    if keep_best and any(score is not None for score in scores):
        assert saves.best == kept[0]


def test_a_step_is_written_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as saves:
        saves.save(1, {"x": jnp.zeros(2)}, {})
        saves.save(1, {"x": jnp.ones(2)}, {})
        np.testing.assert_array_equal(saves.restore({"x": jnp.zeros(2)}).state["x"], 0.0)


def test_damage_is_never_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each file of the newest step in turn is removed, cut in half, or has one byte changed.

    The restored state is the newest, bit by bit, or the one before with a warning. Both happen.
    """
    target = written(tmp_path / "whole")
    files = [path for path in (tmp_path / "whole/checkpoints/2").rglob("*") if path.is_file()]
    outcomes: dict[str, list[str]] = {"kept": [], "went back": []}
    for number, path in enumerate(files):
        for harm in ("remove", "cut", "flip 1/8", "flip 1/2"):
            workdir = tmp_path / f"{number}-{harm}"
            shutil.copytree(tmp_path / "whole", workdir)
            victim = workdir / path.relative_to(tmp_path / "whole")
            content = victim.read_bytes()
            if harm != "remove" and not content:
                continue
            caplog.clear()
            with caplog.at_level(logging.WARNING, "ponder"):
                harm_file(victim, harm, content)
                state, feed_state, step = Checkpoints(workdir).restore(target)
            assert same(state, values(step)), (victim, harm)
            assert feed_state == {"position": step}
            outcomes["kept" if step == 2 else "went back"].append(f"{victim.relative_to(workdir)} {harm}")
            # A folder without its commit mark is no finished step; any other damage is told, and put out of the way.
            if step == 1:
                assert "step 2 is damaged" in caplog.text or "2 was never finished" in caplog.text
                assert not (workdir / "checkpoints/2").exists() or "never finished" in caplog.text
            shutil.rmtree(workdir)
    for part in ("record/metadata flip", "manifest.ocdbt remove", "ocdbt.process_0/d/", "state/d/"):
        assert any(part in name for name in outcomes["went back"]), part


def harm_file(path: Path, harm: str, content: bytes) -> None:
    if harm == "remove":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        at = len(content) // int(harm[-1])
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def test_wrong_values_that_read_well_are_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system that gives back older bytes: everything decodes, only the checksum knows."""
    target = written(tmp_path)
    newest = tmp_path / "checkpoints/2"
    shutil.rmtree(newest / "state")
    shutil.copytree(tmp_path / "checkpoints/1/state", newest / "state")
    with caplog.at_level(logging.WARNING, "ponder"):
        assert Checkpoints(tmp_path).restore(target).step == 1
    assert "does not match its checksum" in caplog.text


def test_goes_on_after_damage(tmp_path: Path) -> None:
    target = written(tmp_path, steps=3)
    for step in (2, 3):
        (tmp_path / f"checkpoints/{step}/record/metadata").write_text("{")
    with Checkpoints(tmp_path, keep_last=2) as saves:
        restored = saves.restore(target)
        assert restored.step == 1
        for step in (2, 3):
            saves.save(step, placed(values(step), Mesh(2, 2, 2)), {"position": step})
    assert saves.steps() == [2, 3]
    assert same(Checkpoints(tmp_path).restore(target).state, values(3))
    assert sorted(path.name for path in (tmp_path / "checkpoints/damaged").iterdir()) == ["2", "3"]


def test_all_damaged(tmp_path: Path) -> None:
    target = written(tmp_path)
    for step in (1, 2):
        (tmp_path / f"checkpoints/{step}/record/metadata").unlink()
    for load in (lambda: Checkpoints(tmp_path).restore(target), lambda: load_params(tmp_path, target.params)):
        with pytest.raises(UserError, match="can be read") as error:
            load()
        assert "\n" not in str(error.value)
    assert Checkpoints(tmp_path).steps() == [1, 2], "nothing is moved where there is nothing to go back to"


def test_unfinished_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = written(tmp_path)
    unfinished = tmp_path / "checkpoints/3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints/2/state", unfinished / "state.orbax-checkpoint-tmp")
    with Checkpoints(tmp_path) as saves:
        with caplog.at_level(logging.WARNING, "ponder"):
            assert saves.restore(target).step == 2
        assert "3.orbax-checkpoint-tmp was never finished" in caplog.text
        saves.save(3, placed(values(3), Mesh(2, 2, 2)), {})
    assert not unfinished.exists()
    assert saves.steps() == [2, 3]


def rewrite_record(folder: Path, **changes: Any) -> None:
    path = folder / "record/metadata"
    record = json.loads(path.read_text())
    del record["checksum"]
    record |= changes
    path.write_text(json.dumps(record | {"checksum": checkpoint._digest(record)}))


def test_other_format(tmp_path: Path) -> None:
    target = written(tmp_path)
    rewrite_record(tmp_path / "checkpoints/2", format=99)
    with pytest.raises(UserError, match="is of checkpoint format 99, but this version reads format 1"):
        Checkpoints(tmp_path).restore(target)


@pytest.mark.parametrize(
    ("name", "leaf", "says"),
    [
        (
            "embedding",
            jnp.zeros((64, 9)),
            r"params/embedding is \(64, 32\) float32 in the checkpoint and \(64, 9\) float32",
        ),
        (
            "embedding",
            jnp.zeros((64, 32), jnp.bfloat16),
            r"\(64, 32\) float32 in the checkpoint and \(64, 32\) bfloat16",
        ),
        ("embedding", None, r"params/embedding is \(64, 32\) float32 in the checkpoint and absent in this model"),
        ("head", jnp.zeros(3), r"params/head is absent in the checkpoint and \(3,\) float32 in this model"),
    ],
)
def test_other_model(tmp_path: Path, name: str, leaf: Any, says: str) -> None:
    target = written(tmp_path)
    params = target.params | {name: leaf}
    with pytest.raises(UserError, match=says) as error:
        Checkpoints(tmp_path).restore(target._replace(params=params))
    assert "\n" not in str(error.value)
    assert Checkpoints(tmp_path).steps() == [1, 2]


def test_load_params(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    with Checkpoints(plain, keep_last=3) as saves:
        for step, score in ((1, 0.1), (2, 0.7), (3, 0.2)):
            saves.save(step, placed(values(step), Mesh(2, 2, 2))._replace(average=None), {}, score=score)
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), values(0).params)
    loaded = load_params(plain, wanted)
    assert same(loaded, values(2).params)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(loaded))
    assert same(load_params(plain, wanted, "last"), values(3).params)
    (plain / "checkpoints/2/record/metadata").write_text("")
    assert same(load_params(plain, wanted), values(3).params)

    written(tmp_path / "averaged")
    assert same(load_params(tmp_path / "averaged", wanted), values(2).average)
    with pytest.raises(UserError, match="of another model"):
        load_params(plain, {"embedding": jnp.zeros(3)})
    with pytest.raises(UserError, match="no checkpoint in"):
        load_params(tmp_path / "nowhere", wanted)


def test_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the end of the disk: the same call fails, with another number."""
    written(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    saves = Checkpoints(tmp_path)
    target = placed(values(0), Mesh(1, 1, 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(UserError, match="File too large; earlier checkpoints are untouched") as error:
            saves.save(3, {"x": jax.random.normal(jax.random.key(0), (2**18,))}, {})
            saves.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        saves.close()
    assert "\n" not in str(error.value)
    assert saves.steps() == [1, 2]
    assert same(Checkpoints(tmp_path).restore(abstract(target)).state, values(2))


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 1 in .*Not a directory"):
        Checkpoints(tmp_path / "file").save(1, {"x": jnp.zeros(2)}, {})
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot write the checkpoint of step 1 in .*read-only"):
        Checkpoints(tmp_path).save(1, {"x": jnp.zeros(2)}, {})


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="keep_last is 0"):
        Checkpoints(tmp_path, keep_last=0)
    with Checkpoints(tmp_path) as saves, pytest.raises(TypeError, match="must survive JSON"):
        saves.save(1, {"x": jnp.zeros(2)}, {"position": (1, 2)})
