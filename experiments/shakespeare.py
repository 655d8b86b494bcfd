"""Bytes of tinyshakespeare: where in a text is a second thought worth its FLOPs?

Run:    python -m ponder.train  --config=experiments/shakespeare.py:arm=pondernet --workdir=runs/shakespeare
Table:  python -m ponder.ablate --config=experiments/shakespeare.py --output=experiments/results/shakespeare --jobs=2
Quick:  python -m ponder.train  --config=experiments/shakespeare.py:smoke --workdir=runs/shakespeare_smoke

Cost of the table: 15 runs, 1.2 core-hours on two cores of an AMD EPYC. It gave bits per byte of test (three seeds):
fixed3 2.464 +- 0.027, fixed1 2.419 +- 0.063, ACT 2.478 +- 0.031 at 1.7 steps, PonderNet 2.484 +- 0.047 at 1.0.
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.text import Text

ARMS = ("fixed3", "act", "pondernet", "fixed1", "fixed2")
SEEDS = 3
STEPS = 3  # K of the arms that halt


def get_config(arm: str = "pondernet", seed: int = 0, smoke: bool = False) -> Config:
    """`arm`: fixedK (K steps always), act or pondernet. All train for the FLOPs that pondernet needs."""
    return compute.matched(of_arm(arm, seed, smoke), of_arm("pondernet", seed, smoke))


def of_arm(arm: str, seed: int, smoke: bool) -> Config:
    halts = {"act": Act(tau=0.005), "pondernet": PonderNet(prior=0.4, beta=0.01)}
    depth = STEPS if arm in halts else int(arm.removeprefix("fixed"))
    return Config(
        name=f"shakespeare-{arm}",
        task=Text(length=64 if smoke else 128),
        model=Transformer(
            steps=depth,
            d_model=32 if smoke else 96,
            heads=4,
            prelude_layers=1,
            core_layers=1,
            kv="first",
            halting_head=arm in halts,
        ),
        rule=halts.get(arm, Fixed()),
        optim=Optim(lr=5e-3, warmup_steps=100, weight_decay=0.2, ema_decay=0.98),
        training=Training(batch_size=8 if smoke else 16, steps=40 if smoke else 1700),
        evaluation=Evaluation(
            every_steps=20 if smoke else 500, rows=16 if smoke else 256, batch_size=16 if smoke else 64
        ),
        checkpoint=Checkpointing(every_steps=20 if smoke else 500),
        logging=Logging(every_steps=10 if smoke else 50),
        seed=seed,
    )
