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
from finetune.targets import Target
from finetune.tasks import Task

FORMAT = 1


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


def describe_data(task: Task) -> dict[str, Any]:
    """The data: names, sizes, fingerprints."""
    return {
        "classes": task.classes,
        "train": {"samples": len(task.train), "fingerprint": task.fingerprints["train"]},
        "test": {
            "samples": len(task.test),
            "fingerprint": task.fingerprints["test"],
            "held_out": task.held_out,
        },
    }


def majority_accuracy(task: Task) -> float:
    """What always naming the commonest training class would score."""
    common = int(np.bincount(task.train.labels).argmax())
    return float((task.test.labels == common).mean())


def kind_of(target: Target) -> dict[str, Any]:
    """The kind of task and the score that is compared; nothing of a classification, whose merit is the accuracy."""
    return {} if target.name == "classification" else {"task": target.name, "merit": target.merit}


def describe_task(task: Task) -> dict[str, Any]:
    """A classification's data, and what always naming the commonest class would score."""
    return {"task": "classification", **describe_data(task), "majority_accuracy": majority_accuracy(task)}


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write atomically, as JSON a person can read."""
    write_atomically(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
