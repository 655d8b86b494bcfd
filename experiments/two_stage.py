"""Does it matter when a gate is taught: with the model, or after it, on a model that stands still?

Parity of 12-vectors, as in gate_or_readout.py. All arms spend equal training FLOPs, both stages counted:

- `two_stage_past` is LoopLM's recipe (Zhu et al. 2025, arXiv 2510.25741). Three quarters of the steps of a whole run go
  to a model whose losses are weighted by an exit distribution that is held near the uniform one. Then the model is
  frozen, and the rest of the budget teaches the halting head alone whether the step just taken has gained something:
  without a backward pass through the model that is about as many steps again;
- `two_stage` is the same, but looks ahead: at what one more step would gain;
- `joint_past` and `joint` teach model and gate at once, with even shares of the losses;
- `stage_one` is the first stage all the budget long, stopped by its own exit distribution;
- `fixedK` take K steps always.

Run:    python -m ponder.train  --config=experiments/two_stage.py:arm=two_stage --workdir=runs/two_stage
Table:  python -m ponder.ablate --config=experiments/two_stage.py --output=experiments/results/two_stage --jobs=2
Quick:  python -m ponder.train  --config=experiments/two_stage.py:smoke --workdir=runs/two_stage_smoke

Cost of the table: 27 runs, some 0.8 core-hours of a busy Intel Xeon and an AMD EPYC. It gave (three seeds): the
two-stage gates stop at 2.51 (past) and 1.49 steps with half of the answers right, since their model's losses fall from
the fifth step on alone and neither the last step nor the next has gained anything before; taught along with the model
they stop at 3.27 with 0.8559 +- 0.3999 and at 3.13 with 0.9891. Two fixed steps are exact.
"""

import dataclasses

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Start, Training
from ponder.halting.fixed import Fixed
from ponder.halting.gate import Gate
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent, heads
from ponder.tasks.parity import Parity

GATES = {"two_stage": "next", "joint": "next", "two_stage_past": "past", "joint_past": "past"}
ARMS = (*GATES, "stage_one", "fixed8", "fixed1", "fixed2", "fixed4")
SEEDS = 3
STEPS = 8  # K of all arms but the fixed depths
SHARE = 0.75  # of the optimizer steps of `stage_one` that come before the gate


def get_config(arm: str = "two_stage", seed: int = 0, smoke: bool = False) -> Config:
    """`arm`: two_stage or joint, both with _past, too; stage_one or fixedK. All train for the FLOPs of `stage_one`."""
    return compute.matched(of_arm(arm, seed, smoke), of_arm("stage_one", seed, smoke))


def of_arm(arm: str, seed: int, smoke: bool) -> Config:
    fixed = arm.startswith("fixed")
    others = Fixed() if fixed else PonderNet(shape="uniform")
    rule = Gate(target=GATES[arm]) if arm in GATES else others
    training = Training(batch_size=128, steps=100 if smoke else 6000)
    config = Config(
        name=f"two-stage-{arm}",
        task=Parity(n=8 if smoke else 12, max_train_nonzero=4 if smoke else 6, train_rows=20_000 if smoke else 200_000),
        model=Recurrent(
            cell="gru", d_model=128, steps=int(arm.removeprefix("fixed")) if fixed else STEPS, **heads(rule.needs)
        ),
        rule=rule,
        optim=Optim(lr=1e-3, warmup_steps=100, b2=0.999),
        training=training,
        evaluation=Evaluation(every_steps=50 if smoke else 1000, rows=1024, batch_size=1024),
        checkpoint=Checkpointing(every_steps=50 if smoke else 2000),
        logging=Logging(every_steps=10 if smoke else 200),
        seed=seed,
    )
    if not arm.startswith("two_stage"):
        return config
    first = dataclasses.replace(
        of_arm("stage_one", seed, smoke), training=dataclasses.replace(training, steps=round(SHARE * training.steps))
    )
    return dataclasses.replace(config, start=Start(run=first, train="heads"))
