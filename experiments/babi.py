"""bAbI tasks 1, 2, 6, 9, 15 and 16 jointly: do questions that need more facts get more steps?

Run:    python -m ponder.train  --config=experiments/babi.py:arm=pondernet --workdir=runs/babi
Table:  python -m ponder.ablate --config=experiments/babi.py --output=experiments/results/babi --jobs=2
Quick:  python -m ponder.train  --config=experiments/babi.py:smoke --workdir=runs/babi_smoke
Joint:  --config=experiments/babi.py:nineteen, all tasks but 3 at PonderNet's width and depth, wants an accelerator.

Cost of the table: 15 runs of 70 to 80 s, 0.35 core-hours of an AMD EPYC. It gave (three seeds): fixed1 0.910 +- 0.008,
ACT 0.901 +- 0.005 at 2.0 steps, PonderNet 0.894 +- 0.003 at 1.6; qa1, 6, 9 and 15 are solved by all arms, qa16 by none.
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.babi import ALL, Babi

ARMS = ("fixed4", "act", "pondernet", "fixed1", "fixed2")
SEEDS = 3
STEPS = 4  # K of the arms that halt


def get_config(arm: str = "pondernet", seed: int = 0, nineteen: bool = False, smoke: bool = False) -> Config:
    """`arm`: fixedK (K steps always), act or pondernet. All train for the FLOPs that pondernet needs."""
    return compute.matched(*(of_arm(each, seed, nineteen, smoke) for each in (arm, "pondernet")))


def of_arm(arm: str, seed: int, nineteen: bool, smoke: bool) -> Config:
    halts = {"act": Act(tau=0.005), "pondernet": PonderNet(prior=0.4, beta=0.01)}
    most = 10 if nineteen else STEPS  # 10 and 128, below: Banino et al. 2021, arXiv 2107.05407
    depth = most if arm in halts else int(arm.removeprefix("fixed"))
    chosen = (1, 15) if smoke else tuple(task for task in ALL if task != 3) if nineteen else (1, 2, 6, 9, 15, 16)
    return Config(
        name=f"babi19-{arm}" if nineteen else f"babi-{arm}",
        task=Babi(tasks=chosen, size="1k" if smoke else "10k"),
        model=Transformer(
            steps=depth,
            d_model=32 if smoke else 128 if nineteen else 64,
            heads=4,
            prelude_layers=1,
            core_layers=1,
            kv="first",
            causal=False,  # the whole story is there before the question is asked
            halting_head=arm in halts,
        ),
        rule=halts.get(arm, Fixed()),
        optim=Optim(lr=1e-3 if nineteen else 2e-3, warmup_steps=100, weight_decay=0.1),
        training=Training(batch_size=8 if smoke else 16, steps=30 if smoke else 100_000 if nineteen else 1000),
        evaluation=Evaluation(
            every_steps=15 if smoke else 250, rows=16 if smoke else 256, batch_size=16 if smoke else 64
        ),
        checkpoint=Checkpointing(every_steps=15 if smoke else 250),
        logging=Logging(every_steps=5 if smoke else 50),
        seed=seed,
    )
