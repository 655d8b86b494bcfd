"""Halting that saves seconds: answers a second, and how many are right, of a trained gate and of fixed depths.

Walks on a map, of one to three roads each (`ponder.tasks.roads`): followed road by road, a walk needs as many steps as
it has roads, and the question says how many. A decoder of one block, up to 16 steps, whose tokens stop by a PonderNet,
stands beside fixed depths that were trained as such for as many FLOPs. The PonderNet begins as a fixed depth of four,
which is cheaper, and is then trained to halt. All of them answer the same questions through the same slots, in turns:
the gate by every executor (docs/decoding.md), and once with all its 16 steps.

Run:    python -m ponder.train  --config=experiments/halting_speed.py --workdir=runs/halting_speed_run
Table:  python -m ponder.ablate --config=experiments/halting_speed.py --output=experiments/results/halting_speed
        --workdir=runs/halting_speed --jobs=2
Clock:  python -m ponder.bench halting --workdir=runs/halting_speed --slots=64 --requests=8
        --output=experiments/results/halting_speed/clock.json
Quick:  python -m ponder.train  --config=experiments/halting_speed.py:smoke --workdir=runs/halting_speed_smoke
"""

import dataclasses

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Start, Training
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.roads import Roads

ARMS = ("pondernet", "fixed4", "fixed2", "fixed1")
SEEDS = 3
STEPS, FEWER = 16, 4  # K of the arm that halts, and of the fixed depth that it begins as
FLOPS = {False: 7e13, True: 2.2e10}  # of every arm; of a smoke run


def get_config(arm: str = "pondernet", seed: int = 0, blocks: bool = False, smoke: bool = False) -> Config:
    """`arm`: fixedK or pondernet. `blocks`: with a prelude and a coda block. All train for the same FLOPs."""
    config = of_arm(arm, seed, blocks, smoke)
    before = 0 if config.start is None else compute.training_flops(config.start.run)
    return dataclasses.replace(config, training=dataclasses.replace(config.training, flops=FLOPS[smoke] - before))


def of_arm(arm, seed, blocks, smoke) -> Config:
    if arm != "pondernet":
        return of_depth(int(arm.removeprefix("fixed")), Fixed(), seed, blocks, smoke)
    first = of_depth(FEWER, Fixed(), seed, blocks, smoke, steps=30 if smoke else 4000)
    whole = of_depth(STEPS, PonderNet(prior=0.3, beta=0.05), seed, blocks, smoke)
    return dataclasses.replace(whole, start=Start(run=first))


def of_depth(depth, rule, seed, blocks, smoke, steps=1) -> Config:
    return Config(
        name="halting-speed-" + (f"fixed{depth}" if rule == Fixed() else "pondernet"),
        task=Roads(
            towns=8,
            walks=8,
            hops=3,
            train_rows=20_000 if smoke else 500_000,
            evaluation_rows=1024 if smoke else 4096,
        ),
        model=Transformer(
            steps=depth,
            d_model=32 if smoke else 256,
            heads=4,
            prelude_layers=int(blocks),
            coda_layers=int(blocks),
            kv="first",
            halting_head=rule != Fixed(),
            halting_bias=0.0 if rule == Fixed() else -2.0,  # a gate that stops at once unlearns what four steps know
        ),
        rule=rule,
        optim=Optim(lr=1e-3, warmup_steps=10 if smoke else 30, weight_decay=0.01),
        training=Training(batch_size=32, steps=steps),
        evaluation=Evaluation(every_steps=30 if smoke else 200, rows=512, compaction=True),
        checkpoint=Checkpointing(every_steps=30 if smoke else 200),
        logging=Logging(every_steps=10),
        seed=seed,
    )
