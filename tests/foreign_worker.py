"""Run with another version of transformers in front of the path: do our folders give there what they gave here?

    python foreign_worker.py FOLDER

FOLDER holds `encoder` and `decoder`, each an export, and `expected.safetensors`. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, pipeline


@torch.no_grad()
def main(folder: Path) -> dict[str, Any]:
    expected = load_file(folder / "expected.safetensors")
    texts = json.loads((folder / "texts.json").read_text())
    found: dict[str, Any] = {"transformers": transformers.__version__}
    for name, auto in (("encoder", AutoModelForMaskedLM), ("decoder", AutoModelForCausalLM)):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        model = auto.from_pretrained(folder / name, attn_implementation="sdpa").eval()
        rows = model(expected[f"{name} tokens"]).logits
        found[f"{name} whole rows"] = compare(rows, expected[f"{name} logits"])
        padded = tokenizer(texts, padding=True, return_tensors="pt")
        real = padded["attention_mask"].bool()
        logits = model(**padded).logits[real]
        found[f"{name} padded"] = compare(logits, expected[f"{name} padded"])
        found[f"{name} ids"] = padded["input_ids"][real].tolist() == expected[f"{name} ids"].tolist()
    encoder = AutoModel.from_pretrained(folder / "encoder").eval()
    hidden = encoder(expected["encoder tokens"]).last_hidden_state
    found["hidden"] = compare(hidden, expected["hidden"])
    fill = pipeline("fill-mask", model=str(folder / "encoder"))
    found["fill-mask"] = fill(texts[0].replace(" green", fill.tokenizer.mask_token), top_k=1)[0]["token"]
    generate = pipeline("text-generation", model=str(folder / "decoder"))
    found["text-generation"] = generate(texts[0], max_new_tokens=8, do_sample=False)[0]["generated_text"]
    vectors = SentenceTransformer(str(folder / "encoder"), device="cpu").encode(texts, convert_to_tensor=True)
    found["sentences"] = compare(vectors, expected["sentences"])
    return found


def compare(theirs: Tensor, ours: Tensor) -> list[float]:
    """Largest difference, and the share of rows with the same largest entry."""
    same = (theirs.argmax(-1) == ours.argmax(-1)).float().mean().item()
    return [(theirs.float() - ours).abs().max().item(), same]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
