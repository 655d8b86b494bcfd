"""Search on graphs: mazes with cycles, or breadth-first search of CLRS-30. What do looping, and halting, buy there?

All arms are one transformer that sees the whole graph, its one core layer applied up to eight times, and halt by
example. `supervised` is trained at every step and stopped by readouts at a risk of 1 %; `correctness` and `pondernet`
learn when to stop; `fixedK` take K steps, `deep` eight with a layer of their own each. All train for equal FLOPs.

Run:    python -m ponder.train  --config=experiments/graphs.py:arm=supervised --workdir=runs/graphs
Table:  python -m ponder.ablate --config=experiments/graphs.py --output=experiments/results/maze --jobs=2
        python -m ponder.ablate --config=experiments/graphs.py:task=clrs --output=experiments/results/clrs --jobs=2
Quick:  python -m ponder.train  --config=experiments/graphs.py:smoke --workdir=runs/graphs_smoke

CLRS's splits are small (some 250 training graphs under 256 namings each, 64 nodes in extrapolation).

Cost of the tables: 24 runs each on a busy AMD EPYC, 0.96 core-hours (mazes of 7 x 7) and 0.89. They gave (three seeds):
mazes whole, fixed4 0.9577, deep 0.9323, pondernet 0.9030 at 6.03 steps, margin on `supervised` 0.8737 at 5.91, no exit
above fixed depth; CLRS, nodes right, fixed1 0.7628 and less the deeper: too few batches for the others.
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.errors import UserError
from ponder.halting import named
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer, heads
from ponder.tasks.clrs import Clrs
from ponder.tasks.maze import Maze

ARMS = ("fixed8", "supervised", "correctness", "pondernet", "deep", "fixed1", "fixed2", "fixed4")
SEEDS = 3
STEPS = 8
READOUTS = ("margin", "entropy", "entropy_change", "kl", "state_change", "acceleration", "unstable")


def get_config(
    arm: str = "supervised", seed: int = 0, task: str = "maze", algorithm: str = "bfs", smoke: bool = False
) -> Config:
    """`arm`: one of ARMS; `task`: maze or clrs, `algorithm` of which. All train for the FLOPs that supervised needs."""
    return compute.matched(*(of_arm(each, seed, task, algorithm, smoke) for each in (arm, "supervised")))


def of_arm(arm: str, seed: int, task: str, algorithm: str, smoke: bool) -> Config:
    if task not in ("maze", "clrs"):
        raise UserError(f"there is no task {task!r}: there are maze and clrs")
    fixed = arm.startswith("fixed") or arm == "deep"
    rule = Fixed() if fixed else named(arm)
    rows = {"train_rows": 500, "evaluation_rows": 50} if smoke else {"train_rows": 20_000, "evaluation_rows": 1_000}
    size = 5 if smoke else 7
    return Config(
        name=f"{task}-{arm}",
        task=Maze(height=size, width=size, **rows) if task == "maze" else Clrs(algorithm=algorithm, namings=256),
        model=Transformer(
            steps=int(arm.removeprefix("fixed")) if arm.startswith("fixed") else STEPS,
            d_model=64,
            heads=4,
            prelude_layers=1,
            core_layers=1,
            causal=False,
            halts="example",
            tied=arm != "deep",
            inject=arm != "deep",
            **heads(rule.needs),
        ),
        rule=rule,
        optim=Optim(lr=3e-3 if task == "maze" else 1e-3, warmup_steps=100, weight_decay=0.01),
        training=Training(batch_size=16 if smoke else 64, steps=20 if smoke else 600),
        evaluation=Evaluation(
            every_steps=10 if smoke else 200,
            rows=50 if smoke else 500,
            batch_size=48 if smoke else 250,
            readouts=READOUTS if arm == "supervised" else (),
        ),
        checkpoint=Checkpointing(every_steps=10 if smoke else 300),
        logging=Logging(every_steps=5 if smoke else 25),
        seed=seed,
    )
