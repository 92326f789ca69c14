"""Saved models reload to identical predictions; outputs are whole or absent; new files are labelled."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune_kit import digits, sentences, write_encoder

from data.errors import UserError
from finetune.encoder import load_encoder
from finetune.evaluation import evaluate
from finetune.model import load_model
from finetune.predict import predict, write_rows
from finetune.run import finetune
from finetune.tasks import load_test

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 8, "epochs": 1.0, "batch_size": 16}


def _silent(_: str) -> None:
    pass


@pytest.mark.parametrize("strategy", ["knn", "linear", "full"])
@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_saved_model_judges_as_it_did(
    strategy: str,
    kind: str,
    export: Path,
    text_export: Path,
    digit_shards: tuple[Path, Path],
    sentiment: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    source, (train, test) = (export, digit_shards) if kind == "images" else (text_export, sentiment)
    options = {"strategy": strategy, "labels_per_class": 5, "output": tmp_path / "model"}
    results = finetune(source, train, test, report=_silent, **options, **QUICK)
    assert json.loads((tmp_path / "model" / "results.json").read_text()) == results
    again = evaluate(tmp_path / "model", test, report=_silent, cpu=True)
    assert (again["accuracy"], again["macro_f1"]) == (results["accuracy"], results["macro_f1"])
    one, two = load_model(tmp_path / "model"), load_model(tmp_path / "model")
    two.save(tmp_path / "copy")
    two = load_model(tmp_path / "copy")
    samples, _ = load_test(test, one.encoder, one.classes)
    assert torch.equal(one.probabilities(samples), two.probabilities(samples))
    assert one.about["chosen"] == results["runs"][0]["chosen"]


def test_a_trained_encoder_is_an_encoder_again(export: Path, digit_shards: tuple[Path, Path], tmp_path: Path) -> None:
    finetune(
        export,
        *digit_shards,
        strategy="full",
        labels_per_class=2,
        output=tmp_path / "m",
        report=_silent,
        **QUICK,
    )
    results = finetune(tmp_path / "m" / "encoder", *digit_shards, labels_per_class=2, report=_silent)
    assert results["encoder"]["objective"] == "none"


def test_an_existing_output_is_refused_before_any_work(
    export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        finetune(export, *digit_shards, output=tmp_path / "m", report=_silent)
    finetune(export, *digit_shards, labels_per_class=1, output=tmp_path / "m", overwrite=True, report=_silent)
    assert not (tmp_path / "m" / "mine.txt").exists()


def test_a_failure_leaves_nothing_behind(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        finetune(export, tmp_path / "absent", output=tmp_path / "out" / "m", report=_silent)
    assert not list(tmp_path.rglob("*m*"))


def test_new_pictures_are_labelled_and_unreadable_ones_counted(
    export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    finetune(export, *digit_shards, strategy="knn", labels_per_class=30, k=1, output=tmp_path / "m", report=_silent)
    images, labels = digits()
    pictures = tmp_path / "new" / "deep"
    pictures.mkdir(parents=True)
    known = finetune_positions(labels)
    for i in known:
        Image.fromarray(images[i]).convert("RGB").save(pictures / f"{i:04d}.png")
    (pictures / "torn.png").write_bytes(b"\x89PNG torn")
    found = predict(load_model(tmp_path / "m"), [tmp_path / "new"], cpu=True)
    # The bank's own members are their nearest neighbours.
    assert [row.label for row in found.rows] == [str(labels[i]) for i in known]
    assert [Path(file).name for file, _ in found.skipped] == ["torn.png"]
    assert all(0 <= row.probability <= 1.00001 for row in found.rows)
    write_rows(found, tmp_path / "rows.csv")
    write_rows(found, tmp_path / "rows.jsonl")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert lines[0] == "input,label,probability"
    assert len(lines) == 1 + len(known) == 1 + len((tmp_path / "rows.jsonl").read_text().splitlines())
    with pytest.raises(UserError, match="does not exist"):
        predict(load_model(tmp_path / "m"), [tmp_path / "nowhere.png"])
    with pytest.raises(UserError, match=r"\.csv, \.tsv or \.jsonl"):
        write_rows(found, tmp_path / "rows.xml")


def finetune_positions(labels: np.ndarray) -> list[int]:
    """A few training pictures that the model was shown."""
    from finetune.splits import subset

    return [int(i) for i in subset(labels[:1200], 30, seed=0)[:7]]


def test_new_texts_from_files_lines_and_strings(
    text_export: Path, sentiment: tuple[Path, Path], tmp_path: Path
) -> None:
    results = finetune(text_export, *sentiment, strategy="linear", output=tmp_path / "m", report=_silent, cpu=True)
    assert results["interval"][0] > 0.7
    model = load_model(tmp_path / "m")
    texts, _ = sentences(6, seed=9)
    (tmp_path / "lines.txt").write_text("\n".join(texts) + "\n\n")
    (tmp_path / "table.csv").write_text("id,text\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(texts)))
    direct = predict(model, texts, cpu=True).rows
    assert [row.input for row in direct] == texts
    assert predict(model, [tmp_path / "lines.txt"], cpu=True).rows == direct
    assert predict(model, [tmp_path / "table.csv"], cpu=True).rows == direct
    with pytest.raises(UserError, match="does not exist"):
        predict(model, ["missing.txt"])


@pytest.mark.parametrize(
    "broken", ["task.json", "head.safetensors", "encoder/model.safetensors", "encoder/config.json"]
)
def test_a_damaged_model_is_one_clear_sentence(
    broken: str, export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    finetune(export, *digit_shards, labels_per_class=1, output=tmp_path / "m", report=_silent)
    path = tmp_path / "m" / broken
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError):
        load_model(tmp_path / "m")
    path.unlink()
    with pytest.raises(UserError):
        load_model(tmp_path / "m")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    one, other = write_encoder(tmp_path / "one"), write_encoder(tmp_path / "other", depth=1)
    (one / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"does not load|lacks"):
        load_encoder(one)
    with pytest.raises(UserError, match="not a folder"):
        load_encoder(tmp_path / "absent")
