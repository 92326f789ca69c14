"""results.json: what was measured, with everything needed to read it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.files import write_atomically
from finetune.encoder import Encoder
from finetune.evidence import Score, interval
from finetune.tasks import Task

FORMAT = 1


def seed_entry(seed: int, labels: int, score: Score, seconds: float, chosen: dict[str, Any]) -> dict[str, Any]:
    """One seed's line of the results."""
    return {
        "seed": seed,
        "labels": labels,
        "accuracy": score.accuracy,
        "interval": list(score.interval),
        "macro_f1": score.macro_f1,
        "seconds": round(seconds, 3),
        "chosen": chosen,
    }


def summarize(scores: list[Score], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and the 95 % interval over seeds and test items."""
    return {
        "accuracy": float(np.mean([score.accuracy for score in scores])),
        "interval": list(interval(np.stack([score.correct for score in scores]))),
        "macro_f1": float(np.mean([score.macro_f1 for score in scores])),
        "seconds": round(sum(entry["seconds"] for entry in entries), 3),
        "runs": entries,
    }


def describe_encoder(encoder: Encoder) -> dict[str, Any]:
    """Which encoder was judged: a hash of its weights as they are, and what it was trained on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {
        "fingerprint": digest.hexdigest(),
        "objective": encoder.info.get("objective"),
        "step": encoder.info.get("step"),
        "features": encoder.features,
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
    }


def describe_task(task: Task) -> dict[str, Any]:
    """The data: classes, sizes, fingerprints, and what always naming the commonest class would score."""
    common = int(np.bincount(task.train.labels).argmax())
    return {
        "task": "classification",
        "classes": task.classes,
        "train": {"samples": len(task.train), "fingerprint": task.fingerprints["train"]},
        "test": {
            "samples": len(task.test),
            "fingerprint": task.fingerprints["test"],
            "held_out": task.held_out,
        },
        "majority_accuracy": float((task.test.labels == common).mean()),
    }


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write atomically, as JSON a person can read."""
    write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
