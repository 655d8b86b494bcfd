"""Can a trained fixed-depth transformer be made to loop, and is that worth more than training it on?

Sums of several numbers, every place of the answer asked at once (Saunshi et al. 2025). The original is an ordinary
transformer of 1 + 4 + 1 layers. It is trained for half of the budget, and then (McLeish et al. 2025, arXiv 2511.07384):

- `continued` trains it on;
- `retrofit` keeps its first layer and its last three, loops two of these for a random number of steps whose mean grows
  from 1 to 4, and trains on.

`scratch` trains the looped model from the beginning, all the budget long. All three spend equal FLOPs, the original's
included. Looped arms answer after 4 steps; their walk has 1, 2 and 8, too.

Run:    python -m ponder.train  --config=experiments/retrofit.py:arm=retrofit --workdir=runs/retrofit
Table:  python -m ponder.ablate --config=experiments/retrofit.py --output=experiments/results/retrofit --jobs=2
Quick:  python -m ponder.train  --config=experiments/retrofit.py:smoke --workdir=runs/retrofit_smoke

Cost of the table: 9 runs, 0.43 core-hours of a busy Intel Xeon. It gave (three seeds): continued 0.9984, retrofit
0.9884, scratch 0.9920, all near the ceiling, so no difference is shown; none adds more numbers than it was trained on.
"""

import dataclasses

from ponder import compute
from ponder.config import Checkpointing, Config, Cut, Depth, Evaluation, Logging, Optim, Start, Training
from ponder.halting.fixed import Fixed
from ponder.models.config import Transformer
from ponder.tasks.sums import Sums

ARMS = ("continued", "retrofit", "scratch")
SEEDS = 3
LAYERS = 4  # of the original, between its first and its last
LOOPED = 2  # of them in the core that is looped
DEPTH = 4  # mean number of its steps at the end of the curriculum, and of the looped arms' evaluation
CUT = Cut(prelude=(0,), core=tuple(range(1 + LAYERS - LOOPED, 1 + LAYERS)), coda=(1 + LAYERS,))


def get_config(arm: str = "retrofit", seed: int = 0, smoke: bool = False) -> Config:
    """`arm`: continued, retrofit or scratch. All train for the FLOPs that `continued` needs."""
    return compute.matched(of_arm(arm, seed, smoke), of_arm("continued", seed, smoke))


def of_arm(arm: str, seed: int, smoke: bool) -> Config:
    original = of_original(seed, smoke)
    if arm == "continued":
        return dataclasses.replace(original, name="retrofit-continued", start=Start(run=original))
    steps = original.training.steps
    return dataclasses.replace(
        original,
        name=f"retrofit-{arm}",
        model=dataclasses.replace(original.model, core_layers=LOOPED, steps=DEPTH, tied=True, inject=True),
        training=dataclasses.replace(
            original.training, depth=Depth(mean=float(DEPTH), backprop=2, most=4 * DEPTH, curriculum_steps=steps // 2)
        ),
        evaluation=dataclasses.replace(original.evaluation, depths=(1, 2, 8)),
        start=Start(run=original, cut=CUT) if arm == "retrofit" else None,
    )


def of_original(seed: int, smoke: bool) -> Config:
    return Config(
        name="retrofit-original",
        task=Sums(digits=2, operands=3, max_operands=6, train_rows=20_000 if smoke else 200_000),
        model=Transformer(
            steps=1,
            d_model=64,
            heads=4,
            prelude_layers=1,
            core_layers=LAYERS,
            coda_layers=1,
            inject=False,
            causal=False,
            halting_head=False,
        ),
        rule=Fixed(),
        optim=Optim(lr=2e-3, warmup_steps=50, weight_decay=0.01),
        training=Training(batch_size=128, steps=30 if smoke else 900),
        evaluation=Evaluation(every_steps=15 if smoke else 250, rows=1024),
        checkpoint=Checkpointing(every_steps=15 if smoke else 500),
        logging=Logging(every_steps=5 if smoke else 50),
        seed=seed,
    )
