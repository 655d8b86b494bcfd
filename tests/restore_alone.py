"""One of two processes: saves steps 1 and 2, finds a part of step 2 damaged where PART names it, and restores.

Run by test_multiprocess with PONDER_COORDINATOR, _PROCESSES and _PROCESS. Prints the step that it came back with.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from ponder import checkpoint, sharding


def main(workdir: str, part: str) -> None:
    sharding.initialize_distributed()
    mesh = jax.make_mesh((2,), ("data",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    state = {"w": jax.device_put(jnp.arange(8.0), placed)}
    intact = getattr(checkpoint, part)

    def damaged(folder, *arguments):
        if folder.name == "2" and jax.process_index() == 1:
            raise checkpoint._Damaged("unreadable here alone")
        return intact(folder, *arguments)

    with checkpoint.Checkpoints(workdir) as saves:
        for step in (1, 2):
            saves.save(step, state, {})
        saves.wait()
        setattr(checkpoint, part, damaged)
        print("came back with", saves.restore(state).step)


if __name__ == "__main__":
    main(*sys.argv[1:])
