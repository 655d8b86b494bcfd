"""Addition of two numbers of up to three digits, sum reversed: how many steps does a sum need?

Run:    python -m ponder.train  --config=experiments/addition.py --workdir=runs/addition
Table:  python -m ponder.ablate --config=experiments/addition.py --output=experiments/results/addition --jobs=2
Quick:  python -m ponder.train  --config=experiments/addition.py:smoke --workdir=runs/addition_smoke
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.addition import Addition

ARMS = ("fixed4", "act", "pondernet", "fixed1", "fixed2")
SEEDS = 5
STEPS = 4  # K of the arms that halt


def get_config(arm: str = "pondernet", seed: int = 0, smoke: bool = False) -> Config:
    """`arm`: fixedK (K steps always), act or pondernet. All train for the FLOPs that pondernet needs."""
    return compute.matched(of_arm(arm, seed, smoke), of_arm("pondernet", seed, smoke))


def of_arm(arm: str, seed: int, smoke: bool) -> Config:
    halts = {"act": Act(tau=0.01), "pondernet": PonderNet(prior=0.4, beta=0.01)}
    depth = STEPS if arm in halts else int(arm.removeprefix("fixed"))
    return Config(
        name=f"addition-{arm}",
        task=Addition(digits=2 if smoke else 3, train_rows=20_000 if smoke else 200_000),
        # Keys from the prelude: what stopped tokens show does not depend on when they stopped (see LOG.md).
        model=Transformer(
            steps=depth, d_model=64, heads=4, prelude_layers=1, core_layers=1, kv="first", halting_head=arm in halts
        ),
        rule=halts.get(arm, Fixed()),
        optim=Optim(lr=2e-3, warmup_steps=50, weight_decay=0.01),
        training=Training(batch_size=128, steps=60 if smoke else 1500),
        evaluation=Evaluation(every_steps=30 if smoke else 200, rows=1024),
        checkpoint=Checkpointing(every_steps=30 if smoke else 200),
        logging=Logging(every_steps=10 if smoke else 50),
        seed=seed,
    )
