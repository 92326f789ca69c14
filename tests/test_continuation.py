"""Laws of continued pre-training: it starts exactly where the source ended, heads included; forgetting is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pretrain_kit import recipe
from torch.testing import assert_close

from data.batch import TextBatch
from data.dataset import ShardedDataset
from data.errors import UserError
from data.loader import sequential
from data.text import shard_text
from pretrain.loop import train
from pretrain.objectives.text import TextObjective
from pretrain.reload import load_objective
from pretrain.run import read_metrics
from pretrain.setup import prepare

LOCAL: dict[str, Any] = {"encoder.depth": 2, "encoder.global_every": 2, "encoder.local_attention": 8}


@pytest.fixture(scope="module", params=["next_token", "masked_language"])
def source(request: pytest.FixtureRequest, sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short run of each objective."""
    folder = tmp_path_factory.mktemp("source")
    return train(recipe(request.param, sentences, LOCAL | {"train.steps": 3}), folder / "run")


def started(
    objective: str, source: Path, data: Path, tmp_path: Path, settings: dict[str, Any] | None = None
) -> TextObjective:
    """A new run's objective that starts from `source`."""
    given = LOCAL | {"start": str(source)} | (settings or {})
    found = prepare(recipe(objective, data, given), tmp_path).state.objective
    assert isinstance(found, TextObjective)
    return found


def test_it_starts_with_the_source_s_weights(source: Path, sentences: Path, tmp_path: Path) -> None:
    objective, chosen = load_objective(source)
    ours = started(chosen.objective.name, source, sentences, tmp_path).state_dict()
    for name, tensor in objective.state_dict().items():
        assert torch.equal(ours[name], tensor), name


def test_from_a_transformers_folder(source: Path, sentences: Path, tmp_path: Path) -> None:
    auto = transformers.AutoModelForCausalLM
    if "MaskedLM" in (source / "config.json").read_text():
        auto = transformers.AutoModelForMaskedLM
    folder = tmp_path / "theirs"
    auto.from_pretrained(source).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    if transformers.__version__.startswith("4.") and auto is transformers.AutoModelForCausalLM:
        pytest.skip("transformers 4.57 drops local_attention when it saves a decoder")
    objective, chosen = load_objective(source)
    assert isinstance(objective, TextObjective)
    tokens = torch.from_numpy(ShardedDataset(sentences, context=32).row(0))[None, :20]
    with torch.no_grad():
        ours = started(chosen.objective.name, folder, sentences, tmp_path).logits(tokens)
        assert_close(ours, objective.logits(tokens))


def test_another_objective_takes_encoder_and_head(source: Path, sentences: Path, tmp_path: Path) -> None:
    objective, chosen = load_objective(source)
    other = {"next_token": "masked_language", "masked_language": "next_token"}[chosen.objective.name]
    ours = started(other, source, sentences, tmp_path).state_dict()
    for name, tensor in objective.state_dict().items():
        if name.startswith(("encoder.", "head.")):
            assert torch.equal(ours[name], tensor), name


def test_a_run_that_goes_on_watches_what_it_forgets(source: Path, sentences: Path, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("\n".join(f"{n} green kettles sang" for n in range(400)))
    shard_text(
        [tmp_path / "new.txt"], tmp_path / "new", tokenizer=source, document="line", validation=0.2, progress=False
    )
    objective, chosen = load_objective(source)
    settings = LOCAL | {"start": str(source), "watch.evaluate_every": 2, "train.steps": 4, "optimizer.lr": 1e-8}
    settings |= {"data.watched": {"old": str(sentences)}, "watch.evaluate_samples": 10_000}
    train(recipe(chosen.objective.name, tmp_path / "new", settings), tmp_path / "run")
    lines = [line for line in read_metrics(tmp_path / "run") if "old_loss" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert lines[0]["validation_loss"] != lines[0]["old_loss"]
    loss = count = 0.0
    batch: TextBatch
    for batch in sequential(ShardedDataset(sentences, context=32), 64):
        output = objective(batch, 1.0)
        loss, count = loss + output.loss_sum.item(), count + output.target_count.item()
    assert lines[-1]["old_loss"] == pytest.approx(loss / count, rel=1e-4), "at a rate of nothing, nothing is forgotten"


def test_what_does_not_fit_is_refused(source: Path, sentences: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds another architecture"):
        started("next_token", source, sentences, tmp_path, {"encoder.intermediate_size": 48})
    with pytest.raises(UserError, match="is no folder"):
        started("next_token", tmp_path / "nowhere", sentences, tmp_path)
    (tmp_path / "other.txt").write_text("entirely different words " * 400)
    shard_text([tmp_path / "other.txt"], tmp_path / "other", vocab_size=290, progress=False)
    with pytest.raises(UserError, match="another tokenizer"):
        started("next_token", source, tmp_path / "other", tmp_path)
