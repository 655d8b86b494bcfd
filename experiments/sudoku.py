"""Sudoku 6 x 6: does recursion between two states buy more than looping one, or than no recursion at all?

Grids of test are in no way those of training: not relabelled, reordered or transposed. `trm` and `hrm` are the
two-state models, with an optimizer update after every supervision step: TRM, and HRM with a gradient through the last
update of each state alone and a second value, of going on, taught by the step after, which is run ahead for it.
`looped` is a transformer of equal parameters, applied once a supervision step, `feedforward` the same applied once in
all. `looped3` to `looped5` are `looped` with so many steps and no head, each trained by itself: the fixed depths that
its halting is compared with. All see the whole grid, all halt by example, and all train for equal FLOPs.

Run:    python -m ponder.train  --config=experiments/sudoku.py:arm=trm --workdir=runs/sudoku
Table:  python -m ponder.ablate --config=experiments/sudoku.py --output=experiments/results/sudoku --jobs=2
Quick:  python -m ponder.train  --config=experiments/sudoku.py:smoke --workdir=runs/sudoku_smoke
Real:   --config=experiments/sudoku.py:arm=trm,size=9,source=clue17 (or source=top1465), which wants an accelerator.

What halting at evaluation is worth is in each run's frontier, too: the head's and the readouts' accuracy against that
of fixed depths, on the same walk.

Cost of the table: 24 runs, 1.73 core-hours of a busy AMD EPYC. It gave (three seeds, 9.96 TFLOP an arm): looped 0.9653,
trm 0.9537, no difference shown, at 65 and 389 MFLOP a puzzle; hrm 0.8210; feedforward 0.0177; trm_joint, with one
update a batch, 0.0000. With thresholds chosen on validation (`python -m ponder.evaluate --workdir=W --within=0.01`,
results/sudoku/within.jsonl) looped keeps 0.9620 at 4.72 of its 8 steps; looped5 has 0.9117.
"""

import dataclasses
from typing import Any

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.supervised import Supervised
from ponder.models.config import Transformer, TwoState
from ponder.tasks.sudoku import Source, Sudoku

FIXED = {f"looped{steps}": steps for steps in (3, 4, 5)}
ARMS = ("trm", "hrm", "looped", "feedforward", "trm_joint", *FIXED)
SEEDS = 3
STEPS = 8  # supervision steps


def get_config(
    arm: str = "trm", seed: int = 0, size: int = 6, source: Source = "generated", smoke: bool = False
) -> Config:
    """`trm_joint`: TRM with one update a batch, so that what updates by step are worth is in the table."""
    return compute.matched(of_arm(arm, seed, size, source, smoke), of_arm("trm", seed, size, source, smoke))


def of_arm(arm: str, seed: int, size: int, source: Source, smoke: bool) -> Config:
    width = {"d_model": 32 if smoke else 64, "heads": 4, "halting_bias": -2.0}
    steps = 2 if smoke else STEPS
    two = TwoState(steps=steps, core_layers=2, cycles=2, updates=2, **width)
    looped = Transformer(
        steps=steps, prelude_layers=0, core_layers=2, causal=False, halts="example", unroll=False, **width
    )
    models: dict[str, Any] = {
        "trm": two,
        "trm_joint": two,
        "hrm": dataclasses.replace(two, separate=True, gradient="last", core_layers=1, continue_head=True),
        "looped": looped,
        "feedforward": dataclasses.replace(looped, steps=1, halting_head=False),
        **{name: dataclasses.replace(looped, steps=each, halting_head=False) for name, each in FIXED.items()},
    }
    rules: dict[str, Any] = {
        "hrm": Correctness(continue_target=True),
        "feedforward": Supervised(),
        **dict.fromkeys(FIXED, Fixed()),
    }
    by_step = arm not in ("feedforward", "trm_joint")
    # Both count updates, of which a batch has eight where every step has its own.
    average, warmup = (0.995, 100) if by_step else (0.96, 20)
    return Config(
        name=f"sudoku-{arm}",
        task=Sudoku(
            size=4 if smoke else size,
            source="generated" if smoke else source,
            train_rows=2_000 if smoke else 50_000,
            evaluation_rows=200 if smoke else 1_000,
        ),
        model=models[arm],
        rule=rules.get(arm, Correctness()),
        optim=Optim(lr=3e-3, warmup_steps=warmup, weight_decay=0.1, b2=0.95, ema_decay=average),
        training=Training(batch_size=64, steps=20 if smoke else 200, updates="step" if by_step else "batch"),
        evaluation=Evaluation(
            every_steps=10 if smoke else 50, rows=500, batch_size=200 if smoke else 250, depths=(2 * steps,)
        ),
        checkpoint=Checkpointing(every_steps=10 if smoke else 100),
        logging=Logging(every_steps=5 if smoke else 20),
        seed=seed,
    )
