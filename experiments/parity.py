"""Parity of 16-vectors, the task of ACT and PonderNet: is learned halting worth more than a fixed number of steps?

Training, validation and test have 1 to 8 entries that are not zero, extrapolation 9 to 16, as the paper has 48 of 96.
Its size is --config=experiments/parity.py:n=96,max_train_nonzero=48 and wants an accelerator.

Run:    python -m ponder.train  --config=experiments/parity.py:arm=pondernet --workdir=runs/parity
Table:  python -m ponder.ablate --config=experiments/parity.py --output=experiments/results/parity --jobs=2
Quick:  python -m ponder.train  --config=experiments/parity.py:smoke --workdir=runs/parity_smoke

Cost of the table: 25 runs, 1.84 core-hours of an AMD EPYC, two cores at a time. It gave (five seeds): fixed3
1.0000, ACT 0.9912 +- 0.0061 at 11.1 steps, PonderNet 0.9990 +- 0.0007 at 9.9; no arm extrapolates (0.47 to 0.52).
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting import named
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent, heads
from ponder.tasks.parity import Parity

ARMS = ("fixed12", "act", "pondernet", "fixed3", "fixed6")
SEEDS = 5
STEPS = 12  # K of the arms that halt


def get_config(
    arm: str = "pondernet",
    seed: int = 0,
    n: int = 16,
    max_train_nonzero: int | None = 8,
    smoke: bool = False,
    rule: str = "",
) -> Config:
    """`arm`: fixedK (K steps always), act or pondernet; `rule`: any of `ponder.halting.RULES`, in place of an arm.

    All train for the FLOPs that pondernet needs.
    """
    config = of_arm(rule or arm, seed, n, max_train_nonzero, smoke)
    return compute.matched(config, of_arm("pondernet", seed, n, max_train_nonzero, smoke))


def of_arm(arm: str, seed: int, n: int, max_train_nonzero: int | None, smoke: bool) -> Config:
    tuned = {"act": Act(tau=0.001), "pondernet": PonderNet(prior=0.2, beta=0.01)}
    is_depth = arm in ARMS and arm not in tuned
    rule = Fixed() if is_depth else tuned.get(arm) or named(arm)
    depth = int(arm.removeprefix("fixed")) if is_depth else STEPS
    return Config(
        name=f"parity-{arm}",
        task=Parity(
            n=8 if smoke else n,
            max_train_nonzero=None if smoke else max_train_nonzero,
            train_rows=20_000 if smoke else 500_000,
        ),
        model=Recurrent(steps=depth, cell="gru", d_model=128, **heads(rule.needs)),
        rule=rule,
        optim=Optim(lr=1e-3, schedule="cosine", warmup_steps=100, b2=0.999),
        training=Training(batch_size=128, steps=100 if smoke else 8_000),
        evaluation=Evaluation(every_steps=50 if smoke else 1000, rows=2048, batch_size=1024),
        checkpoint=Checkpointing(every_steps=50 if smoke else 2000),
        logging=Logging(every_steps=10 if smoke else 200),
        seed=seed,
    )
