"""How sensitive are ACT and PonderNet to the price of thinking? The paper's figure on parity, at a size for one core.

PonderNet (Banino et al. 2021, arXiv 2107.05407, section 4.1) says of a grid over ACT's tau and its own lambda_p:
  interpolation: PonderNet solves parity at every lambda_p but 0.9; ACT at few values of tau and with wide spread;
  extrapolation: PonderNet is almost perfect on more non-zeros than it was trained on, with some 5 steps; ACT at chance.
Here: vectors of 12 entries, trained on 1 to 6 that are not zero; `test` has 1 to 6 as well (interpolation),
`extrapolation` 7 to 12. Six values of tau, even in the logarithm over the paper's range, and five of lambda_p at its
beta = 0.01, and three fixed depths. A GRU of width 128 with at most 12 steps, as in parity.py; the paper has
a tanh RNN (`:cell=rnn`) with at most 20 (`:thinking_steps=20`) and ten seeds, see parity_paper.py. With one entry that
is not zero there are 24 vectors alone, so that label is no sample.

Run:    python -m ponder.train  --config=experiments/parity_grid.py:arm=act_tau0.0005 --workdir=runs/parity_grid
Table:  python -m ponder.ablate --config=experiments/parity_grid.py --output=experiments/results/parity_grid --jobs=2
        and on an accelerator --vmap_sweep in place of --jobs: the grid of each rule, all seeds of it, is one program
Quick:  python -m ponder.train  --config=experiments/parity_grid.py:smoke --workdir=runs/parity_grid_smoke
Larger: --config=experiments/parity_grid.py:n=96,max_train_nonzero=48,training_steps=100000

Cost of the table: 70 runs, 2.68 core-hours of a busy AMD EPYC (the quickest runs took 41 s on a core). It gave (five
seeds): PonderNet 0.9966 to 0.9977 at every lambda_p, ACT 0.9972 to 0.9977 up to tau 0.0032 and 0.9418 +- 0.0780 at
0.02; two and four fixed steps are exact, twelve have 0.9977; nobody extrapolates (0.46 to 0.51).
"""

from typing import Literal

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.act import Act
from ponder.halting.fixed import Fixed
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent
from ponder.protocols import Rule
from ponder.tasks.parity import Parity

TAUS = (0.0002, 0.0005, 0.00126, 0.00317, 0.00796, 0.02)
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)
RULES: dict[str, Rule] = {f"act_tau{tau}": Act(tau=tau) for tau in TAUS}
RULES |= {f"pondernet_lambda{prior}": PonderNet(prior=prior, beta=0.01) for prior in LAMBDAS}
FIXED = {f"fixed{steps}": steps for steps in (2, 4, 12)}
ARMS = (*RULES, *FIXED)
SEEDS = 5


def get_config(
    arm: str = "pondernet_lambda0.1",
    seed: int = 0,
    n: int = 12,
    max_train_nonzero: int | None = 6,
    cell: Literal["rnn", "gru"] = "gru",
    thinking_steps: int = 12,
    training_steps: int = 4000,
    smoke: bool = False,
) -> Config:
    """All arms train for the FLOPs that PonderNet spends in `training_steps`. `max_train_nonzero=None` is interpolation
    alone: every split has 1 to n."""

    def of_rule(rule: Rule, steps: int = thinking_steps) -> Config:
        return Config(
            name=f"parity_grid-{arm}",
            task=Parity(
                n=8 if smoke else n,
                max_train_nonzero=4 if smoke else max_train_nonzero,
                train_rows=20_000 if smoke else 200_000,
            ),
            model=Recurrent(steps=steps, cell=cell, d_model=128, halting_head="halt" in rule.needs),
            rule=rule,
            optim=Optim(lr=1e-3, warmup_steps=100, b2=0.999),
            training=Training(batch_size=128, steps=100 if smoke else training_steps),
            evaluation=Evaluation(every_steps=50 if smoke else 1000, rows=1024, batch_size=1024),
            checkpoint=Checkpointing(every_steps=50 if smoke else 2000),
            logging=Logging(every_steps=10 if smoke else 200),
            seed=seed,
        )

    own = of_rule(Fixed(), FIXED[arm]) if arm in FIXED else of_rule(RULES[arm])
    return compute.matched(own, of_rule(PonderNet()))
