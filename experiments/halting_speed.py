"""Halting that saves seconds: answers a second, and how many are right, of a trained gate and of fixed depths.

Sums written a token at a time, from the last digit on, or with `plain` from the first, where carries come from far. A
decoder of up to 16 steps whose tokens stop by a PonderNet stands beside fixed depths that were trained as such for as
many FLOPs. Then all of them answer the same questions through the same slots, in turns: the gate by every executor
(docs/decoding.md), and once with all its 16 steps. It has not been run yet; its arguments are for pilots.

Run:    python -m ponder.train  --config=experiments/halting_speed.py --workdir=runs/halting_speed_run
Table:  python -m ponder.ablate --config=experiments/halting_speed.py --output=experiments/results/halting_speed
        --jobs=2
Quick:  python -m ponder.train  --config=experiments/halting_speed.py:smoke --workdir=runs/halting_speed_smoke
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.roads import Roads

ARMS = ("fixed16", "pondernet", "fixed1", "fixed2", "fixed4")
SEEDS = 3
STEPS = 16  # K of the arm that halts


def get_config(
    arm: str = "pondernet",
    seed: int = 0,
    blocks: bool = False,
    smoke: bool = False,
    hops: int = 6,
    lr: float = 1e-3,
    batch: int = 16,
    steps: int = 3600,
) -> Config:
    """`arm`: fixedK or pondernet. `blocks`: with a prelude and a coda block. All train for the FLOPs of pondernet."""
    a, b = (of_arm(each, seed, blocks, smoke, hops, lr, batch, steps) for each in (arm, "pondernet"))
    return compute.matched(a, b)


def of_arm(arm, seed, blocks, smoke, hops, lr, batch, steps) -> Config:
    halts = {"pondernet": PonderNet(prior=0.25, beta=0.01)}
    return Config(
        name=f"halting-speed-{arm}",
        task=Roads(hops=hops, train_rows=20_000 if smoke else 500_000),
        model=Transformer(
            steps=STEPS if arm in halts else int(arm.removeprefix("fixed")),
            d_model=32 if smoke else 256,
            heads=4,
            prelude_layers=int(blocks),
            coda_layers=int(blocks),
            kv="first",
            halting_head=arm in halts,
        ),
        rule=halts.get(arm, Fixed()),
        optim=Optim(lr=lr, warmup_steps=30, weight_decay=0.01),
        training=Training(batch_size=batch, steps=60 if smoke else steps),
        evaluation=Evaluation(every_steps=30 if smoke else 600, rows=512),
        checkpoint=Checkpointing(every_steps=30 if smoke else 100),
        logging=Logging(every_steps=10),
        seed=seed,
    )
