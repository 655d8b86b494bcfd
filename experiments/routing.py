"""Bytes of tinyshakespeare: is a block better spent on some tokens than on all, at equal training FLOPs?

Mixture-of-Depths (`depths`) stands beside the deep transformer whose every other block it routes (`dense`), and
Mixture-of-Recursions (`expert`, `token`) beside the looped one whose recursions it rations (`looped`). All train for
the FLOPs that `dense` needs: where training is cheaper, on more batches. Since routing saves at inference, too,
`dense2` to `dense4` have fewer blocks: what a smaller model gives for a routed one's FLOPs.

Run:    python -m ponder.train  --config=experiments/routing.py:arm=depths --workdir=runs/routing
Table:  python -m ponder.ablate --config=experiments/routing.py --output=experiments/results/routing --jobs=2
Quick:  python -m ponder.train  --config=experiments/routing.py:smoke --workdir=runs/routing_smoke

Each row of an evaluation has `router_agreement`, the share of the choices that the causal predictor makes like the
top-k of training, `loss` of the predictor's choices and `run_on_loss` of the top-k's, which sees later tokens and so is
no score of a language model.

Cost of the table: 24 runs, 0.64 core-hours of a busy Intel Xeon. It gave (three seeds): depths 2.618 bits per
byte where dense has 2.666, and dense2 2.576 for fewer FLOPs than either.
"""

import dataclasses

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.errors import UserError
from ponder.halting.fixed import Fixed
from ponder.models.config import (
    ExpertChoiceRecursions,
    MixtureOfDepths,
    ModelConfig,
    TokenChoiceRecursions,
    Transformer,
)
from ponder.tasks.text import Text

ARMS = ("dense", "depths", "looped", "expert", "token", "dense2", "dense3", "dense4")
SEEDS = 3


def get_config(arm: str = "depths", seed: int = 0, smoke: bool = False) -> Config:
    """`arm`: dense, depths, looped, expert, token, or denseN of N blocks. All train for the FLOPs that dense needs."""
    return compute.matched(of_arm(arm, seed, smoke), of_arm("dense", seed, smoke))


def of_arm(arm: str, seed: int, smoke: bool) -> Config:
    sizes = {"d_model": 32 if smoke else 64, "heads": 4}
    plain = {"inject": False, "halting_head": False}
    models: dict[str, ModelConfig] = {
        "dense": Transformer(steps=6, prelude_layers=0, tied=False, **plain, **sizes),
        "depths": MixtureOfDepths(steps=6, capacity=0.125, **sizes),
        "looped": Transformer(steps=4, prelude_layers=1, coda_layers=1, **plain, **sizes),
        "expert": ExpertChoiceRecursions(steps=4, **sizes),
        "token": TokenChoiceRecursions(steps=4, **sizes),
    }
    models |= {f"dense{blocks}": dataclasses.replace(models["dense"], steps=blocks) for blocks in (2, 3, 4)}
    if arm not in models:
        raise UserError(f"there is no arm {arm!r}: there are {', '.join(models)}")
    return Config(
        name=f"routing-{arm}",
        task=Text(length=64 if smoke else 128),
        model=models[arm],
        rule=Fixed(),
        optim=Optim(lr=5e-3, warmup_steps=100, weight_decay=0.2, ema_decay=0.98),
        training=Training(batch_size=8 if smoke else 16, steps=40 if smoke else 450),
        evaluation=Evaluation(
            every_steps=20 if smoke else 300, rows=16 if smoke else 256, batch_size=16 if smoke else 64
        ),
        checkpoint=Checkpointing(every_steps=20 if smoke else 300),
        logging=Logging(every_steps=10 if smoke else 50),
        seed=seed,
    )
