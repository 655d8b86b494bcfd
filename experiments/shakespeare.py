"""Bytes of tinyshakespeare: where in a text is a second thought worth its FLOPs?

Run:    python -m ponder.train  --config=experiments/shakespeare.py:arm=pondernet --workdir=runs/shakespeare
Table:  python -m ponder.ablate --config=experiments/shakespeare.py --output=experiments/results/shakespeare --jobs=2
Quick:  python -m ponder.train  --config=experiments/shakespeare.py:smoke --workdir=runs/shakespeare_smoke
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.text import Text

ARMS = ("fixed4", "act", "pondernet", "fixed1", "fixed2", "fixed3")
SEEDS = 3
STEPS = 4  # K of the arms that halt


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
            d_model=32 if smoke else 128,
            heads=4,
            prelude_layers=1,
            core_layers=1,
            kv="first",
            halting_head=arm in halts,
        ),
        rule=halts.get(arm, Fixed()),
        optim=Optim(lr=2e-3, warmup_steps=100, weight_decay=0.1),
        training=Training(batch_size=8 if smoke else 32, steps=40 if smoke else 2500),
        evaluation=Evaluation(
            every_steps=20 if smoke else 250, rows=16 if smoke else 128, batch_size=16 if smoke else 64
        ),
        checkpoint=Checkpointing(every_steps=20 if smoke else 250),
        logging=Logging(every_steps=10 if smoke else 50),
        seed=seed,
    )
