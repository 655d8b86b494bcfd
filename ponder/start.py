"""Starting from another run: whether its model fits, and this run's state at step 0 out of its parameters.

Three uses. A trained fixed-depth transformer is cut into prelude, core and coda, the core looped, and training goes on
(McLeish et al. 2025, arXiv 2511.07384). A trained model is frozen and its halting head alone is taught (the second
stage of Zhu et al. 2025, arXiv 2510.25741). Or training goes on, on another task or by another rule.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from ponder import checkpoint, models, records, sharding
from ponder.config import Config, Cut, check_origin
from ponder.errors import UserError
from ponder.models.layers import logical_axes
from ponder.program import Program
from ponder.step import TrainState, over_members

FOLDER = "start"  # of a workdir: that of the run that goes before
STACKS = ("prelude", "core", "coda")  # of layers, in order of application

Parameters = Any  # nested dict of arrays


class Origin(NamedTuple):
    """The run that another one starts from."""

    config: Config
    workdir: epath.Path
    finished: bool

    def spent(self) -> tuple[float, float]:
        """FLOPs of a seed and seconds of its training, all that went before it included."""
        entry = records.read_finished(self.workdir)[0]
        return entry["training_flops"], entry["train_seconds"]


def origin(config: Config, workdir: epath.PathLike) -> Origin | None:
    """The run that the run of `config` in `workdir` starts from; None where it starts afresh.

    Raises UserError where it cannot: `start.workdir` holds no run that has ended, or of other seeds; a cut or parameter
    that does not fit.
    """
    start = config.start
    if start is None:
        return None
    if start.run is not None:
        folder, earlier = epath.Path(workdir) / FOLDER, start.run
        found = Origin(earlier, folder, records.read_results(folder, earlier) is not None)
    else:
        folder = epath.Path(start.workdir or "")
        earlier = records.read_config(folder)
        records.read_finished(folder)
        found = Origin(earlier, folder, True)
        check_origin(config, earlier)
        if earlier.seeds != config.seeds:
            raise UserError(
                f"start.workdir {folder} has {earlier.seeds} seeds side by side and this run {config.seeds}: set seeds"
            )
    jax.eval_shape(functools.partial(take_over, start.cut), _abstract(config), _abstract(earlier))
    return found


def initial_state(run: Program, origin: Origin | None) -> TrainState:
    """The state before step 1: fresh, or with the last parameters of `origin`, which must have ended.

    Raises UserError where they cannot be read.
    """
    state = run.initial_state()
    if origin is None:
        return state
    earlier = checkpoint.load_params(origin.workdir, _abstract(origin.config, run.mesh), "last")
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract.params)
    start = run.config.start
    assert start is not None
    take = over_members(functools.partial(take_over, start.cut), run.config.seeds, (0, 0))
    params = jax.jit(take, out_shardings=shardings)(state.params, earlier)
    average = None if state.average is None else jax.tree.map(jnp.copy, params)
    return state._replace(params=params, average=average)


def take_over(cut: Cut | None, fresh: Parameters, earlier: Parameters) -> Parameters:
    """`fresh`, with every parameter that `earlier` has by that name; with a cut, its layers by their places.

    Raises UserError where one has another shape there, and names it.
    """
    own, found = flatten_dict(fresh), flatten_dict(earlier)
    if cut is not None:
        found = {path: leaf for path, leaf in found.items() if path[0] not in STACKS} | _layers(found, cut)
    for path, leaf in own.items():
        if path in found and found[path].shape != leaf.shape:
            raise UserError(
                f"start: {'/'.join(map(str, path))} is {found[path].shape} in the earlier model and {leaf.shape} in "
                "this one: what is taken over must have one shape"
            )
    return unflatten_dict({path: found.get(path, leaf) for path, leaf in own.items()})


def _layers(found: dict[Any, jax.Array], cut: Cut) -> dict[Any, jax.Array]:
    """The stacks of layers that a cut makes of those of a flat dict of parameters."""
    names = dict.fromkeys(path[1:] for path in found if path[0] in STACKS)
    made = {}
    for name in names:
        every = jnp.concatenate([found[stack, *name] for stack in STACKS if (stack, *name) in found])
        for stack in STACKS:
            if places := getattr(cut, stack):
                made[stack, *name] = every[jnp.asarray(places, jnp.int32)]
    return made


def _abstract(config: Config, mesh: jax.sharding.Mesh | None = None) -> Parameters:
    """Shapes of the parameters of one seed; with a mesh of all seeds, and where on it they lie."""
    model = nnx.eval_shape(lambda: models.build(config.model, config.task.shape, jax.random.key(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if mesh is None:
        return params
    several = config.seeds > 1
    if several:
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((config.seeds, *leaf.shape), leaf.dtype), params)
    placed = sharding.shardings(params, logical_axes(model), mesh, seeds=several)
    return jax.tree.map(lambda leaf, own: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=own), params, placed)
