"""p-hop induction: is one block, looped, as good as as many blocks of their own?

64 letters of four, 1 to 4 hops (Saunshi et al. 2025, "Reasoning with Latent Thoughts", have 256 letters and 16 or 32
hops). `looped` applies one block six times, `deep` has six blocks, `one` has the block once; all train for equal FLOPs,
so `one` sees six times the rows. Where `deep` stays under 0.95 it is not trained, and nothing is claimed.

Run:    python -m ponder.train  --config=experiments/hop.py:arm=looped --workdir=runs/hop
Table:  python -m ponder.ablate --config=experiments/hop.py --output=experiments/results/hop --jobs=2
Quick:  python -m ponder.train  --config=experiments/hop.py:smoke --workdir=runs/hop_smoke
Paper:  --config=experiments/hop.py:arm=looped,n=256,hops=16,train_steps=200000, which wants an accelerator.

Cost of the table: 9 runs, 2.47 core-hours of a busy AMD EPYC. It gave (three seeds, 14.2 TFLOP an arm): deep 0.9998,
looped 0.9997, one 0.6576 ± 0.0151. The learning rate was chosen on validation.
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.tasks.hop import Hop

ARMS = ("deep", "looped", "one")
SEEDS = 3
BLOCKS = 6


def get_config(
    arm: str = "looped", seed: int = 0, n: int = 64, hops: int = 4, train_steps: int = 1500, smoke: bool = False
) -> Config:
    """`train_steps`: of `looped` and `deep`; `one` trains for as many FLOPs."""
    return compute.matched(*(of_arm(each, seed, n, hops, train_steps, smoke) for each in (arm, "deep")))


def of_arm(arm: str, seed: int, n: int, hops: int, train_steps: int, smoke: bool) -> Config:
    return Config(
        name=f"hop-{arm}",
        task=Hop(n=16 if smoke else n, hops=2 if smoke else hops, every=True, train_rows=20_000 if smoke else 500_000),
        model=Transformer(
            steps=1 if arm == "one" else 2 if smoke else BLOCKS,
            d_model=64,
            heads=4,
            prelude_layers=0,
            tied=arm != "deep",
            inject=False,  # the same block, once or six times, or six of them
            halting_head=False,
        ),
        rule=Fixed(),
        optim=Optim(lr=3e-3, warmup_steps=200, weight_decay=0.01),
        training=Training(batch_size=64, steps=40 if smoke else train_steps),
        evaluation=Evaluation(every_steps=20 if smoke else 500, rows=1024),
        checkpoint=Checkpointing(every_steps=20 if smoke else 1000),
        logging=Logging(every_steps=10 if smoke else 100),
        seed=seed,
    )
