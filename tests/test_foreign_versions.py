"""Law: exports give the same in transformers 4.57 and in the newest 5.x, alone, padded and in their pipelines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain_kit import ENVIRONMENT
from safetensors.torch import save_file

from data.tokenizer import load, special_ids, train
from pretrain.encoders.modernbert import export_files
from pretrain.encoders.text import TextConfig, TextEncoder
from pretrain.generate import generate
from pretrain.objectives.masked_language import MaskedLanguage, MaskedLanguageConfig
from pretrain.objectives.next_token import NextToken, NextTokenConfig
from pretrain.objectives.text import TextObjective

TEXTS = ["Colourless green ideas sleep furiously", "naïve façade, 東京 🚂 and", "so it goes"]
VERSIONS = {
    "4.57": ["transformers==4.57.*", "huggingface_hub<1.0", "tokenizers>=0.22,<0.23.1", "sentence-transformers<6"],
    "5": ["transformers>=5,<6", "huggingface_hub>=1.3", "tokenizers", "sentence-transformers"],
}
SHAPE = {"width": 32, "depth": 4, "heads": 2, "intermediate_size": 40, "context": 96}


def build(causal: bool, vocab_size: int) -> TextObjective:
    """Local and global layers, every weight away from its start; two rotary bases where that can be exported."""
    torch.manual_seed(0)
    bases = {} if causal else {"local_rope_theta": 100.0}
    config = TextConfig(vocab_size=vocab_size, global_every=2, local_attention=10, **SHAPE, **bases)
    objective: TextObjective = (
        NextToken(TextEncoder(config), NextTokenConfig())
        if causal
        else MaskedLanguage(TextEncoder(config), MaskedLanguageConfig())
    )
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    return objective.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both exports and what ours make of the same inputs."""
    folder = tmp_path_factory.mktemp("foreign")
    tokenizer = train([*TEXTS * 3, Path(__file__).read_text()], 400)
    tokenizer.save(str(folder / "tokenizer.json"))
    marks = special_ids(tokenizer)
    expected: dict[str, torch.Tensor] = {}
    facts: dict[str, Any] = {}
    for name, causal in (("encoder", False), ("decoder", True)):
        objective = build(causal, tokenizer.get_vocab_size())
        files = export_files(objective.state_dict(), objective.encoder.config, folder / "tokenizer.json", causal)
        for file, payload in files.items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_bytes(payload)
        again = load(folder / name)
        ids = [[marks["bos"], *again.encode(text).ids, *([] if causal else [marks["eos"]])] for text in TEXTS]
        tokens = torch.randint(7, tokenizer.get_vocab_size(), (3, 60), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            # Ours sees all texts packed into one row; theirs pads them to one length.
            packed = torch.tensor([[token for row in ids for token in row]])
            numbers = torch.tensor([[number for number, row in enumerate(ids) for _ in row]])
            expected |= {f"{name} tokens": tokens, f"{name} logits": objective.logits(tokens)}
            expected |= {f"{name} ids": packed[0], f"{name} padded": objective.logits(packed, numbers)[0]}
            if causal:
                facts["text-generation"] = generate(objective, again, TEXTS[0], 8, temperature=0)
                continue
            expected["hidden"] = objective.encoder(tokens, causal=False)
            whole = objective.encoder(packed, numbers, causal=False)[0]
            expected["sentences"] = torch.stack([whole[numbers[0] == i].mean(0) for i in range(len(TEXTS))])
            before, after = (again.encode(part).ids for part in ("Colourless", " ideas sleep furiously"))
            row = torch.tensor([[marks["bos"], *before, marks["mask"], *after, marks["eos"]]])
            facts["fill-mask"] = objective.logits(row)[0, 1 + len(before)].argmax().item()
    save_file({key: tensor.contiguous() for key, tensor in expected.items()}, folder / "expected.safetensors")
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    (folder / "facts.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with one version of transformers and what belongs to it; skips without a package index."""

    def install(version: str) -> Path:
        target = tmp_path_factory.mktemp(f"transformers-{version}")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
        extra = ["httpx", "httpcore", "anyio", "h11", "sniffio", "certifi", "idna", "typer", "click", "shellingham"]
        done = subprocess.run([*command, *VERSIONS[version], *extra], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"transformers {version} cannot be installed here: {done.stderr.strip()[-200:]}")
        return target

    return install


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_an_export_in_another_version(version: str, folder: Path, installed: Callable[[str], Path]) -> None:
    target = installed(version)
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(target)]), "HF_HUB_OFFLINE": "1"}
    worker = str(Path(__file__).with_name("foreign_worker.py"))
    done = subprocess.run([sys.executable, worker, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["transformers"].startswith(version)
    for name in ("encoder whole rows", "encoder padded", "decoder whole rows", "decoder padded", "hidden", "sentences"):
        difference, same = found[name]
        assert difference < 1e-4, name
        assert same == 1, name
    assert found["encoder ids"], "the tokenizer must encode as ours does"
    assert found["decoder ids"]
    facts = json.loads((folder / "facts.json").read_text())
    assert {name: found[name] for name in facts} == facts
