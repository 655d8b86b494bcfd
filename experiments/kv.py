"""Which keys does a token show that has stopped early, and what do cheaper caches cost?

Models of PonderNet: `first` trains with the prelude's keys alone, one plane; `depth` with the key of every step, where
stopped tokens run on, as is usual, and go on to show new keys; `frozen` as it is decoded, where a token that has
stopped shows its last one. Sums of three digits, or bytes of text (`:task=text`), with a prelude and a coda block. Then
all write (or read) through the same slots, in turns: those with a key a step also with caches that they were not
trained with, which fill the missing steps by projection or keep fewer planes (docs/decoding.md).

Run:    python -m ponder.train  --config=experiments/kv.py:arm=depth --workdir=runs/kv_run
Table:  python -m ponder.ablate --config=experiments/kv.py --output=experiments/results/kv --workdir=runs/kv --jobs=2
        and --config=experiments/kv.py:task=text into experiments/results/kv_text
Clock:  python -m ponder.bench halting --workdir=runs/kv --missing=projected --ring=1,2,4 --slots=64
        --output=experiments/results/kv/clock.json, and of text the same with runs/kv_text
Quick:  python -m ponder.train  --config=experiments/kv.py:smoke --workdir=runs/kv_smoke
"""

from ponder import compute
from ponder.config import Checkpointing, Config, Evaluation, Logging, Optim, Training
from ponder.errors import UserError
from ponder.halting.pondernet import PonderNet
from ponder.models.config import Transformer
from ponder.tasks.addition import Addition
from ponder.tasks.text import Text

ARMS = ("first", "depth", "frozen")
SEEDS = 3
STEPS = 6
TASKS = ("addition", "text")


def get_config(arm: str = "first", seed: int = 0, task: str = "addition", smoke: bool = False) -> Config:
    """`arm`: first, depth or frozen; `task`: addition or text. All train for the FLOPs of first."""
    return compute.matched(of_arm(arm, seed, task, smoke), of_arm("first", seed, task, smoke))


def of_arm(arm: str, seed: int, task: str, smoke: bool) -> Config:
    if task not in TASKS:
        raise UserError(f"there is no task {task!r}: there are {', '.join(TASKS)}")
    text = task == "text"
    steps = 40 if smoke else 600 if text else 1200
    return Config(
        name=f"kv-{arm}",
        task=Text(length=64) if text else Addition(digits=2 if smoke else 3, train_rows=20_000 if smoke else 200_000),
        model=Transformer(
            steps=STEPS, d_model=64, heads=4, prelude_layers=1, coda_layers=1, kv="first" if arm == "first" else "depth"
        ),
        rule=PonderNet(prior=0.4, beta=0.01),
        optim=Optim(lr=3e-3 if text else 2e-3, warmup_steps=50, weight_decay=0.1 if text else 0.01),
        training=Training(batch_size=16 if text else 128, steps=steps, freeze=arm == "frozen"),
        evaluation=Evaluation(
            every_steps=20 if smoke else 300, rows=64 if text else 1024, batch_size=64 if text else 512
        ),
        checkpoint=Checkpointing(every_steps=20 if smoke else 300),
        logging=Logging(every_steps=10 if smoke else 50),
        seed=seed,
    )
