"""PonderNet's own figures on parity, at their size: the grids of ACT's tau and of lambda_p. Wants an accelerator.

Settings of Banino et al. 2021 (arXiv 2107.05407, section 4.1): a tanh RNN of width 128 with at most 20 steps, Adam at
3e-4, batches of 128, beta = 0.01, ten seeds. Interpolation: vectors of 64, every split with 1 to 64 entries that are
not zero. Extrapolation (`:extrapolation`): vectors of 96, trained on 1 to 48, and 49 to 96 in the split of that name.
Ten values of lambda_p from (0, 1] and, for ACT, 0 and 19 of tau from 2e-4 to 2e-2. Ours: where between its ends the
taus lie (even in the logarithm), 0.99 for a lambda_p of 1, whose prior forbids a second step, the number of training
steps, and 500,000 rows in place of ever new ones. What the paper says of the results stands in parity_grid.py.

Run:    python -m ponder.train  --config=experiments/parity_paper.py:arm=pondernet_lambda0.2 --workdir=runs/paper
Table:  python -m ponder.ablate --config=experiments/parity_paper.py --output=experiments/results/parity_paper
        --vmap_sweep, which trains each rule's grid, all seeds of it, as one program
Quick:  python -m ponder.train  --config=experiments/parity_paper.py:smoke --workdir=runs/parity_paper_smoke

The table has not been made.
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.halting.act import Act
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Recurrent
from ponder.protocols import Rule
from ponder.tasks.parity import Parity

TAUS = (0.0, *(float(f"{2e-4 * 100 ** (i / 18):.3g}") for i in range(19)))
LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)
RULES: dict[str, Rule] = {f"act_tau{tau}": Act(tau=tau) for tau in TAUS}
RULES |= {f"pondernet_lambda{prior}": PonderNet(prior=prior, beta=0.01) for prior in LAMBDAS}
ARMS = tuple(RULES)
SEEDS = 10


def get_config(
    arm: str = "pondernet_lambda0.2",
    seed: int = 0,
    extrapolation: bool = False,
    training_steps: int = 100_000,
    smoke: bool = False,
) -> Config:
    """All arms train for the FLOPs that PonderNet spends in `training_steps`."""
    n, most = (96, 48) if extrapolation else (64, None)

    def of_rule(rule: Rule) -> Config:
        return Config(
            name=f"parity_paper-{arm}",
            task=Parity(n=8, train_rows=20_000) if smoke else Parity(n=n, max_train_nonzero=most),
            model=Recurrent(steps=20, cell="rnn", d_model=128),
            rule=rule,
            optim=Optim(lr=3e-4, schedule="constant", warmup_steps=0, b2=0.999, clip_norm=None),
            training=Training(batch_size=128, steps=100 if smoke else training_steps),
            evaluation=Evaluation(every_steps=50 if smoke else 5000, rows=2048, batch_size=1024),
            checkpoint=Checkpointing(every_steps=50 if smoke else 10_000),
            logging=Logging(every_steps=10 if smoke else 500),
            seed=seed,
        )

    return compute.matched(of_rule(RULES[arm]), of_rule(PonderNet()))
