"""Where arrays live: one mesh ("data", "fsdp", "tensor"), one table from logical axis names to mesh axes.

Parameters and activations name their dimensions ("embed", "mlp", ...); `RULES` says which mesh axes split each. The
mesh axes are `Auto`: XLA places everything that is not pinned here. A dimension is left whole

- when a dimension to its left already uses its mesh axis (an activation's `embed`, whose batch is split over `fsdp`);
- when it is smaller than the mesh axis (the halting head's width of one, a single key head);
- when it is a vocabulary that the mesh axis does not divide: its size comes from the data, nobody can choose it.

Any other parameter dimension that its mesh axis does not divide is a UserError.
"""

from __future__ import annotations

import math
import os
import urllib.request
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ponder import config
from ponder.errors import UserError

Names = tuple[str | None, ...]
Tree = TypeVar("Tree")

MESH_AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "vocab": "tensor",
    "word": None,
    "head_dim": None,
    "length": None,
    "layers": None,
    "seeds": None,
}


def initialize_distributed() -> None:
    """Join the other processes of the run, where there are any. Must come before anything that asks for devices.

    Recognised are PONDER_COORDINATOR (host:port of process 0), PONDER_PROCESSES and PONDER_PROCESS (this one's index),
    Slurm steps (`srun`), and TPU slices of more than one host. On a single process nothing happens.

    Raises:
      UserError: only some of the three variables are set, or they are not a valid place in the run.
    """
    if jax.distributed.is_initialized():
        return
    names = ("PONDER_COORDINATOR", "PONDER_PROCESSES", "PONDER_PROCESS")
    given = [os.environ.get(name) for name in names]
    if any(given):
        coordinator, count, index = given
        if not coordinator or not (count or "").isdigit() or not (index or "").isdigit():
            raise UserError(
                f"{', '.join(names)} go together: host:port, number of processes, index from 0; got {given}"
            )
        processes, process = int(count or 0), int(index or 0)
        if not process < processes:
            raise UserError(
                f"PONDER_PROCESS={process} must be below PONDER_PROCESSES={processes}: indices count from 0"
            )
        if processes > 1:
            jax.distributed.initialize(coordinator, processes, process)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or _tpu_hosts() > 1:
        jax.distributed.initialize()  # finds its place from Slurm's or the TPU's own description


def _tpu_hosts() -> int:
    """Hosts of the TPU slice that this machine belongs to, as its environment (GKE) or metadata server (VM) says."""
    names = os.environ.get("TPU_WORKER_HOSTNAMES")
    if names is not None:
        return len(names.split(","))
    dev = Path("/dev")
    if not (any(dev.glob("accel[0-9]*")) or any(dev.glob("vfio/[0-9]*"))):
        return 1
    request = urllib.request.Request(
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return len(reply.read().decode().split(","))
    except OSError:  # no TPU VM, as in a notebook that is lent one host's chips; make_mesh checks what the runtime saw
        return 1


def make_mesh(mesh: config.Mesh) -> jax.sharding.Mesh:
    """The devices as ("data", "fsdp", "tensor"). A smaller mesh than the machine takes its first devices.

    Raises:
      UserError: a size below 1, more than one -1, more devices than there are, or sizes that do not divide them.
    """
    sizes: tuple[int, ...] = (mesh.data, mesh.fsdp, mesh.tensor)
    shown = "x".join(map(str, sizes))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"mesh {shown} (data x fsdp x tensor): sizes are at least 1, and at most one may be -1 (the rest)"
        )
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            "this host is one of several: start every process with PONDER_COORDINATOR, _PROCESSES and _PROCESS"
        )
    devices = jax.devices()
    asked = math.prod(size for size in sizes if size != -1)
    if asked > len(devices):
        kind = devices[0].platform
        raise UserError(
            f"mesh {shown} (data x fsdp x tensor) needs {asked} devices, but there are {len(devices)} ({kind})"
        )
    if -1 in sizes:
        if len(devices) % asked:
            raise UserError(f"mesh {shown} (data x fsdp x tensor): {asked} does not divide the {len(devices)} devices")
        sizes = tuple(len(devices) // asked if size == -1 else size for size in sizes)
    count = math.prod(sizes)
    if count < len(devices) and jax.process_count() > 1:
        raise UserError(f"mesh {shown} must use all {len(devices)} devices of the {jax.process_count()} processes")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:count])


def _mesh_axes(name: str | None, used: set[str]) -> tuple[str, ...]:
    """Mesh axes for a logical name that no dimension to the left has taken."""
    if name is None:
        return ()
    if name not in RULES:
        raise ValueError(f"unknown logical axis {name!r}: RULES has {', '.join(RULES)}")
    rule = RULES[name]
    axes = (rule,) if isinstance(rule, str) else rule or ()
    return tuple(axis for axis in axes if axis not in used)


def spec(
    names: Names, shape: tuple[int, ...], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, of: str = ""
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions are called `names`.

    Args:
      names: one logical name (or None: whole) a dimension.
      shape: the dimensions, to see what divides.
      mesh: the mesh.
      of: name of the parameter. With it an indivisible dimension is an error; without it (activations) it stays whole.

    Raises:
      UserError: `of` is given and a dimension can neither be split nor, by the rules above, be left whole.
    """
    if len(names) != len(shape):
        raise ValueError(f"{of or 'array'} of shape {shape} has {len(names)} axis names: {names}")
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        axes = _mesh_axes(name, used)
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if size % parts:
            if of and name != "vocab" and size > parts:
                raise UserError(
                    f"parameter {of}: its {name} dimension of {size} is not divisible by the mesh's "
                    f"{'x'.join(axes)} size of {parts}; choose a multiple, or a smaller mesh"
                )
            axes = ()
        used.update(axes)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*entries)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(abstract_params: Any, axes: Any, mesh: jax.sharding.Mesh, *, seeds: bool = False) -> Any:
    """NamedSharding of each parameter.

    Args:
      abstract_params: pytree of arrays or ShapeDtypeStructs.
      axes: the same pytree with a tuple of logical names at each leaf.
      mesh: the mesh.
      seeds: every leaf has a leading axis of vmapped seeds, which `axes` does not name. It stays whole.

    Raises:
      UserError: a dimension that the mesh does not divide, named.
    """

    def one(path: Any, leaf: Any, names: Names) -> NamedSharding:
        of = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, spec(("seeds", *names) if seeds else names, leaf.shape, mesh, of))

    return jax.tree_util.tree_map_with_path(one, abstract_params, axes)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, abstract_state: Any, param_shardings: Any, mesh: jax.sharding.Mesh
) -> Any:
    """Shardings of an optimizer state: moments lie like their parameters, counters are replicated. Parameters that
    the optimizer masks out have none.

    Needed because `jax.jit(optimizer.init)` without out-shardings replicates the moments on an `Auto` mesh.
    `abstract_state` is `jax.eval_shape(optimizer.init, params)`, with the seeds axis where there is one.
    """
    return optax.tree.map_params(
        optimizer,
        lambda moment, sharding: moment if isinstance(moment, optax.MaskedNode) else sharding,
        abstract_state,
        param_shardings,
        transform_non_params=lambda _: replicated(mesh),
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),
    )


def constrain(x: Any, *names: str | None) -> Any:
    """Pin an activation's layout by the logical names of its dimensions. Without a mesh in context: `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))


def constrain_lanes(x: Any) -> Any:
    """Pin `[B, ..., D]`, and with it its gradient: split by batch, whole along D.

    To be called on what enters and leaves every block. Left to itself XLA's partitioner splits D over `tensor` and B
    over less than the batch's axes, and then forgets an all-reduce in the backward pass: with data, fsdp and tensor all
    above 1 the gradients of two plain matmuls come out wrong (jax 0.10 to 0.12, as in openxla/xla issue 40034).
    """
    return constrain(x, "batch", *(None,) * (x.ndim - 2), "embed")


def batch_sharding(mesh: jax.sharding.Mesh, *, seeds: bool = False) -> NamedSharding:
    """Of every leaf of a batch: its first axis (after the seeds, which stay whole) split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")) if seeds else PartitionSpec(("data", "fsdp")))


def check_batch(batch_size: int, mesh: jax.sharding.Mesh, accumulate: int = 1) -> None:
    """Raise UserError unless each micro-batch splits evenly over the data and fsdp axes."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    parts = data * fsdp * accumulate
    if batch_size % parts:
        micro = f" x {accumulate} micro-batches" if accumulate > 1 else ""
        nearest = max(1, round(batch_size / parts)) * parts
        raise UserError(
            f"batch size {batch_size} is not divisible by {parts} "
            f"(data {data} x fsdp {fsdp}{micro}): use a multiple of it, as {nearest}"
        )


def process_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """(index, count): this process loads the `index`-th of `count` equal contiguous blocks of each global batch.

    Processes that differ only along the tensor axis load the same block.
    """
    shards = mesh.devices.reshape(-1, mesh.shape["tensor"])  # [data * fsdp, tensor]
    owners = np.vectorize(lambda device: device.process_index)(shards)
    own = np.flatnonzero((owners == jax.process_index()).any(axis=1))
    count, ragged = divmod(len(shards), len(own))
    index = int(own[0]) // len(own)
    if ragged or not np.array_equal(own, np.arange(len(own)) + index * len(own)):
        raise UserError(
            f"mesh {dict(mesh.shape)}: a process must own one contiguous part of the batch; change its tensor size"
        )
    return index, count


def put_batch(batch: Tree, mesh: jax.sharding.Mesh, *, seeds: bool = False) -> Tree:
    """This process's numpy block of a batch (see `process_share`) to global arrays, split over data and fsdp."""
    sharding = batch_sharding(mesh, seeds=seeds)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch)
