"""One row for each way to train a looped model, on one task: sums of two or three numbers of two digits.

One transformer everywhere: a layer of prelude, then one layer applied six times, all places of the answer asked at
once. What differs is how it is taught, and when it stops:

- `fixed6` the last step alone; `supervised` every step alike, with all readouts calibrated to break 1 % of the answers;
- `random_depth` a log-normal Poisson number of steps, of which the last two have a gradient, `curriculum` the same with
  a mean that grows from 1; `fixed_point` the state at which nothing changes any more, with an implicit gradient, and
  answers there, after up to 24 steps;
- `layerskip` six layers of their own, with layer dropout and every exit trained in turn;
- `classifier` (CALM), `correctness` and `correctness_continue` (TRM's and HRM's heads), `gate` (taught along what the
  next step gains) and `gate_two_stage` (taught after a first stage, on a model that stands still);
- `fixed1`, `fixed2`, `fixed3` trained at fewer steps: the frontier that the others are measured against.

All spend equal training FLOPs, first stages included. A fixed point is priced with all iterations that it may take.

Run:    python -m ponder.train  --config=experiments/methods.py:arm=random_depth --workdir=runs/methods
Table:  python -m ponder.ablate --config=experiments/methods.py --output=experiments/results/methods --jobs=2
Quick:  python -m ponder.train  --config=experiments/methods.py:smoke --workdir=runs/methods_smoke

Cost of the table: 42 runs, 2.58 core-hours of a busy Intel Xeon and an AMD EPYC. It gave (three seeds): fixed1 0.9940,
fixed2 0.9624, fixed6 0.9185; of the ways to train six steps curriculum 0.9539 and random_depth 0.9485; no exit above
fixed depth.
"""

import dataclasses

from ponder import compute
from ponder.config import (
    Checkpointing,
    Config,
    Depth,
    Evaluation,
    FixedPoint,
    Logging,
    Optim,
    Start,
    Training,
)
from ponder.halting import named
from ponder.halting.correctness import Correctness
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.halting.readout import Readout
from ponder.models.config import Transformer, heads
from ponder.tasks.sums import Sums

ARMS = (
    "fixed6",
    "supervised",
    "random_depth",
    "curriculum",
    "fixed_point",
    "layerskip",
    "classifier",
    "correctness",
    "correctness_continue",
    "gate",
    "gate_two_stage",
    "fixed1",
    "fixed2",
    "fixed3",
)
SEEDS = 3
STEPS = 6
SETTLES = 24  # steps at most, at inference, of what is trained at its fixed point
FIRST_STAGE = 0.75  # of the budget
READOUTS = ("margin", "entropy", "entropy_change", "kl", "state_change", "acceleration", "unstable")
RULES = {
    "correctness_continue": Correctness(continue_target=True),
    "gate_two_stage": Gate(),
    **dict.fromkeys(("random_depth", "curriculum"), Fixed()),
    "fixed_point": Readout(measure="state_change", threshold=1e-2),
}
TRAINING = {
    "random_depth": {"depth": Depth(mean=float(STEPS), backprop=2, most=3 * STEPS)},
    "curriculum": {"depth": Depth(mean=float(STEPS), backprop=2, most=3 * STEPS, curriculum_steps=600)},
    "fixed_point": {"fixed_point": FixedPoint(tolerance=1e-2, most=12)},
    "layerskip": {"layer_dropout": 0.1},
}


def get_config(arm: str = "supervised", seed: int = 0, smoke: bool = False) -> Config:
    """`arm`: one of ARMS. All train for the FLOPs that `supervised` needs."""
    return compute.matched(of_arm(arm, seed, smoke), of_arm("supervised", seed, smoke))


def of_arm(arm: str, seed: int, smoke: bool) -> Config:
    fixed = arm.startswith("fixed") and arm != "fixed_point"
    rule = Fixed() if fixed else RULES.get(arm) or named(arm)
    config = Config(
        name=f"methods-{arm}",
        task=Sums(digits=2, operands=3, max_operands=6, train_rows=20_000 if smoke else 200_000),
        model=Transformer(
            steps=int(arm.removeprefix("fixed")) if fixed else SETTLES if arm == "fixed_point" else STEPS,
            d_model=64,
            heads=4,
            prelude_layers=1,
            core_layers=1,
            causal=False,
            # Keys from the prelude: what stopped tokens show does not depend on when they stopped.
            kv="first",
            tied=arm != "layerskip",
            inject=arm != "layerskip",
            **heads(rule.needs),
        ),
        rule=rule,
        optim=Optim(lr=2e-3, warmup_steps=50, weight_decay=0.01),
        training=Training(batch_size=128, steps=30 if smoke else 1500, **TRAINING.get(arm, {})),
        evaluation=Evaluation(
            every_steps=15 if smoke else 500, rows=1024, readouts=READOUTS if arm == "supervised" else ()
        ),
        checkpoint=Checkpointing(every_steps=15 if smoke else 500),
        logging=Logging(every_steps=5 if smoke else 50),
        seed=seed,
    )
    if arm != "gate_two_stage":
        return config
    first = of_arm("supervised", seed, smoke)
    first = dataclasses.replace(
        first,
        name="methods-first-stage",
        rule=PonderNet(shape="uniform"),
        model=config.model,
        training=dataclasses.replace(first.training, steps=int(FIRST_STAGE * first.training.steps)),
        evaluation=dataclasses.replace(first.evaluation, readouts=(), walk=False),
    )
    return dataclasses.replace(config, start=Start(run=first, train="heads"))
