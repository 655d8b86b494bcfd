"""Is a learned gate worth more than reading the confidence off a model that was never taught to halt?

Parity of 12-vectors, chains of modular arithmetic or p-hop induction (one step for each operation, or hop, for whoever
takes them one after the other). Every learned rule stands beside readouts of a model whose steps were all trained alike
(`supervised`) and of one that was trained at its last step alone (`fixed8`), each at a threshold calibrated to break at
most 1 % of the questions; beside separately trained fixed depths; and beside the oracle, which stops at the first right
step. What a readout looks at is in its FLOPs.

Run:    python -m ponder.train  --config=experiments/gate_or_readout.py:arm=supervised --workdir=runs/gate
Table:  python -m ponder.ablate --config=experiments/gate_or_readout.py --output=experiments/results/gate_or_readout
        --jobs=2
Quick:  python -m ponder.train  --config=experiments/gate_or_readout.py:smoke --workdir=runs/gate_smoke

Cost of the table: 55 runs, 2.93 core-hours of a busy AMD EPYC (the quickest runs took 41 s on a core). It gave (five
seeds): a depth of two steps is exact and cheaper than any other exit above 0.95; readouts of `supervised` 0.9939 to
0.9971 at 2.5 to 5.1 steps; PonderNet is exact at 7.24, heads of another kind are not shown to be better than margin.
Chains of four operations, each beginning of which has a target (`:task=chains` into results/chains, 4.15 core-hours):
fixed1 0.9726, margin on `supervised` 0.9280 at 1.21 of four steps, no learned exit shown to differ from it.
p-hop of up to four hops, `:task=hop` into results/hop_gates, 2.45 core-hours: ACT 0.9962 at 4.06 of six steps,
PonderNet 0.9907 at 4.18, margin on `supervised` 0.9423 at 3.90; seeds differ too much to show a difference.
"""

import dataclasses
from typing import Any

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.errors import UserError
from ponder.halting import named
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent, Transformer, heads
from ponder.tasks.chains import Chains
from ponder.tasks.hop import Hop
from ponder.tasks.parity import Parity

SEEDS = 5
STEPS = {"parity": 8, "chains": 4, "hop": 6}  # K of all arms but the lesser fixed depths
FIXED = {"parity": (1, 2, 4), "chains": (1, 2, 3), "hop": (1, 2, 3)}
LEARNED = ("pondernet", "pondernet_uniform", "act", "correctness", "classifier", "gate")
READOUTS = ("margin", "entropy", "entropy_change", "kl", "state_change", "acceleration", "unstable")


def arms(task: str = "parity") -> tuple[str, ...]:
    check(task)
    return (f"fixed{STEPS[task]}", "supervised", *LEARNED, *(f"fixed{steps}" for steps in FIXED[task]))


def check(task: str) -> None:
    if task not in STEPS:
        raise UserError(f"there is no task {task!r}: there are {', '.join(STEPS)}")


def get_config(arm: str = "supervised", seed: int = 0, task: str = "parity", smoke: bool = False) -> Config:
    """`arm`: fixedK, or a name of `ponder.halting.RULES`; `task`: parity, chains or hop. All train for equal FLOPs."""
    check(task)
    return compute.matched(of_arm(arm, seed, task, smoke), of_arm("supervised", seed, task, smoke))


def of_arm(arm: str, seed: int, task: str, smoke: bool) -> Config:
    tuned = {"act": Act(tau=0.003), "pondernet": PonderNet(prior=0.2, beta=0.01)}
    fixed = arm.startswith("fixed")
    reads = arm in (f"fixed{STEPS[task]}", "supervised")
    rule = Fixed() if fixed else tuned.get(arm) or named(arm)
    steps = int(arm.removeprefix("fixed")) if fixed else STEPS[task]
    base = {"parity": parity, "chains": chains, "hop": hop}[task](smoke)
    evaluation = base.evaluation
    if reads:
        evaluation = dataclasses.replace(evaluation, **reading(STEPS[task]))
    if rule.mixes == "states":  # a mean of them is no step's answer: there is no walk
        evaluation = dataclasses.replace(evaluation, depths=())
    return dataclasses.replace(
        base,
        name=f"{task}-{arm}",
        model=dataclasses.replace(base.model, steps=steps, **heads(rule.needs)),
        rule=rule,
        evaluation=evaluation,
        seed=seed,
    )


def reading(steps: int) -> dict[str, Any]:
    """How a model is walked that readouts are tried on: also far beyond the steps of its training."""
    return {"readouts": READOUTS, "depths": (2 * steps, 4 * steps, 16 * steps)}


def chains(smoke: bool) -> Config:
    return Config(
        task=Chains(
            every=True,
            max_train_operations=3 if smoke else 4,
            max_operations=8,
            train_rows=20_000 if smoke else 200_000,
        ),
        # Keys from the prelude: what stopped tokens show does not depend on when they stopped.
        model=Transformer(d_model=64, heads=4, prelude_layers=1, core_layers=1, kv="first"),
        rule=Fixed(),
        optim=Optim(lr=3e-3, warmup_steps=50, weight_decay=0.1),
        training=Training(batch_size=128, steps=60 if smoke else 3000),
        evaluation=Evaluation(every_steps=30 if smoke else 500, rows=1024, depths=(8,)),
        checkpoint=Checkpointing(every_steps=30 if smoke else 1000),
        logging=Logging(every_steps=10 if smoke else 100),
    )


def hop(smoke: bool) -> Config:
    return Config(
        task=Hop(n=16 if smoke else 32, hops=2 if smoke else 4, every=True, train_rows=20_000 if smoke else 500_000),
        # A question halts as one: what a hop finds is written where it leads from.
        model=Transformer(d_model=64, heads=4, prelude_layers=1, core_layers=1, halts="example"),
        rule=Fixed(),
        optim=Optim(lr=3e-3, warmup_steps=200, weight_decay=0.01),
        training=Training(batch_size=64, steps=40 if smoke else 700),
        evaluation=Evaluation(every_steps=20 if smoke else 500, rows=1024, depths=(12,)),
        checkpoint=Checkpointing(every_steps=20 if smoke else 1000),
        logging=Logging(every_steps=10 if smoke else 100),
    )


def parity(smoke: bool) -> Config:
    return Config(
        task=Parity(n=8 if smoke else 12, max_train_nonzero=4 if smoke else 6, train_rows=20_000 if smoke else 200_000),
        model=Recurrent(cell="gru", d_model=128),
        rule=Fixed(),
        optim=Optim(lr=1e-3, warmup_steps=100, b2=0.999),
        training=Training(batch_size=128, steps=100 if smoke else 6000),
        evaluation=Evaluation(every_steps=50 if smoke else 1000, rows=1024, batch_size=1024, depths=(16,)),
        checkpoint=Checkpointing(every_steps=50 if smoke else 2000),
        logging=Logging(every_steps=10 if smoke else 200),
    )
