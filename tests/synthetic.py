"""Finished runs made of formulas, in the files that training writes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def result(
    arm: str, seed: int, *, accuracy: float, flops: float, steps: float, bits: bool = False, spread: float = 0.01
) -> dict[str, Any]:
    """An entry of results.json whose accuracy varies by seed: for all arms alike, and a tenth as much for its own."""
    halts = "fixed" not in arm
    exits = ["last"] if not halts else ["threshold"] if "act" in arm else ["quantile", "bernoulli"]
    rule = "fixed:Fixed" if not halts else "act:Act" if "act" in arm else "pondernet:PonderNet"
    own = (seed % 3 - 1) / 10 if halts else 0.0  # nothing in the mean of three seeds
    value = accuracy + spread * (((seed * 7919) % 5 - 2) / 2 + own)
    rows = [
        evaluation(split, exit, seed, value - 0.02 * i - (0.3 if split == "extrapolation" else 0.0), flops, steps, bits)
        for split in ("validation", "test", "extrapolation")
        for i, exit in enumerate(exits)
    ]
    task = {"type": "ponder.tasks.text:Text"} if bits else {"type": "ponder.tasks.addition:Addition", "digits": 3}
    return {
        "seed": seed,
        "config": {
            "task": task,
            "name": arm,
            "seed": seed,
            "model": {"steps": math.ceil(steps)},
            "rule": {"type": f"ponder.halting.{rule}"},
            "optim": {"lr": 1e-3},
            "training": {"batch_size": 128, "steps": 1000},
        },
        "commit": COMMIT,
        "hardware": "Example CPU, 2 cores",
        "versions": {"python": "3.11"},
        "parameters": 102_592,
        "training_steps": 1000,
        "training_flops": 2e12,
        "train_seconds": 180.0,
        "evaluations": rows,
    }


def evaluation(
    split: str, exit: str, seed: int, value: float, flops: float, steps: float, bits: bool = False, step: int = 1000
) -> dict[str, Any]:
    labels = range(6, 9) if split == "extrapolation" else range(1, 6)
    loss = value * math.log(2) if bits else 1 - value
    row = {
        "kind": "evaluation",
        "step": step,
        "seed": seed,
        "split": split,
        "exit": exit,
        "examples": 500,
        "accuracy": 0.5 if bits else value,
        "token_accuracy": 0.5 if bits else value,
        "loss": loss,
        "run_on_loss": loss + 0.01 + 0.001 * seed,
        "steps": steps,
        "useful_flops": flops,
        "spent_flops": 2 * flops,
        "by_difficulty": [
            {
                "difficulty": label,
                "examples": 100,
                "accuracy": min(1.0, max(0.0, value + 0.01 * (3 - label))),
                "loss": loss + 0.01 * label,
                "steps": steps + 0.2 * (label - 3),
            }
            for label in labels
        ],
    }
    return row | ({"bits_per_byte": value} if bits else {})


def workdir(folder: Path, results: list[dict[str, Any]], traces: bool = False) -> Path:
    """A workdir as training leaves it."""
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    metrics = []
    for entry in results:
        final = entry["evaluations"][0]
        name = "bits_per_byte" if "bits_per_byte" in final else "accuracy"
        for step in range(100, 1001, 100):
            start = 4.0 if name == "bits_per_byte" else 0.0
            value = start + (final[name] - start) * (1 - math.exp(-step / 250))
            metrics.append(
                {"kind": "train", "step": step, "seed": entry["seed"], "loss": 1.0, "steps": 2.0}
                | {"tokens_per_second": 1e4}
            )
            metrics += [
                evaluation("validation", exit, entry["seed"], value + shift, 1e6, 2.0, name != "accuracy", step)
                for exit, shift in (("another", -0.1), (final["exit"], 0.0))
            ]
        metrics += entry["evaluations"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    if traces:
        rng = random.Random(0)
        text = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak. <&> \x07"
        steps = [1 + int(rng.random() < 0.5) + int(rng.random() < 0.3) * 2 for _ in text]
        rows = [
            {
                "split": "validation",
                "tokens": list(text),
                "steps": steps,
                "correct": [bool(rng.random() < 0.6) for _ in text],
                "target": [i > 4 for i, _ in enumerate(text)],
                "difficulty": [0] * len(text),
            }
        ] * 2
        (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


ARMS = {
    # accuracy, useful FLOPs, steps
    "fixed1": (0.55, 1e6, 1.0),
    "fixed2": (0.90, 2e6, 2.0),
    "fixed4": (0.97, 4e6, 4.0),
    "act": (0.93, 2.6e6, 2.8),
    "pondernet": (0.985, 2.9e6, 3.1),
}


def results_of(arm: str, seeds: int = 5, bits: bool = False) -> list[dict[str, Any]]:
    accuracy, flops, steps = ARMS[arm]
    value = 3.0 - accuracy if bits else accuracy
    return [result(arm, seed, accuracy=value, flops=flops, steps=steps, bits=bits) for seed in range(seeds)]
