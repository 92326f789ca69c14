"""Kinds of task: losses and scores by hand, each kind beats a constant on real data, and saved models judge alike."""

import csv
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune_kit import digits, sentences

from data.errors import UserError
from finetune.encoder import Augmentation, load_encoder
from finetune.entities import is_bio, spans
from finetune.evaluation import evaluate
from finetune.judge import commonest, score_intervals
from finetune.model import load_model
from finetune.run import finetune
from finetune.study_targets import baseline
from finetune.targets import IGNORED, Target, target_from
from finetune.targets_class import Classification
from finetune.targets_dense import Segmentation, Tags
from finetune.targets_vector import MultiLabel, Regression
from finetune.tasks import load_task, load_test

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 40, "epochs": 1.0, "lr": 2e-3}
TARGETS = [
    Classification(["a", "b"]),
    MultiLabel(["a", "b", "c"]),
    Regression(["height", "width"], [1.0, -2.0], [2.0, 0.5]),
    Tags(["O", "B-x", "I-x"]),
    Segmentation(["ground", "thing"], 8),
]


def _silent(_: str) -> None:
    pass


def _table(path: Path, rows: list[tuple[str, object]], label: str) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("file", label), *rows])
    return path


def _pictures(folder: Path, first: int, count: int) -> list[tuple[str, np.ndarray, int]]:
    """Digits of scikit-learn as picture files: name, pixels, digit."""
    images, labels = digits()
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for i in range(first, first + count):
        Image.fromarray(images[i]).convert("RGB").save(folder / f"{i:04d}.png")
        found.append((f"{folder.name}/{i:04d}.png", images[i], int(labels[i])))
    return found


def label_sets(root: Path) -> list[Path]:
    """Up to two labels a digit: round (0, 6, 8, 9), and small (below 3)."""

    def labels(digit: int) -> str:
        return "|".join(name for name, here in (("round", digit in (0, 6, 8, 9)), ("small", digit < 3)) if here)

    sides = (("train", 0, 150), ("test", 150, 120))
    return [
        _table(root / f"{name}.csv", [(path, labels(d)) for path, _, d in _pictures(root / name, first, n)], "labels")
        for name, first, n in sides
    ]


def quantities(root: Path) -> list[Path]:
    """How much ink a digit has."""
    sides = (("train", 0, 150), ("test", 150, 120))
    return [
        _table(
            root / f"{name}.csv", [(path, float(x.mean())) for path, x, _ in _pictures(root / name, first, n)], "value"
        )
        for name, first, n in sides
    ]


def masks(root: Path) -> list[Path]:
    """Where a digit stands on a wider ground; the ground's last column is unknown."""
    images, _ = digits()
    for name, first, count in (("train", 0, 80), ("test", 80, 60)):
        (root / name / "images").mkdir(parents=True)
        (root / name / "masks").mkdir()
        for i in range(first, first + count):
            left, top = i * 5 % 9, i * 3 % 9
            picture, mask = np.full((16, 16), 60, dtype=np.uint8), np.zeros((16, 16), dtype=np.uint8)
            picture[top : top + 8, left : left + 8] = images[i]
            mask[top : top + 8, left : left + 8] = 1
            mask[:, 15] = 255
            Image.fromarray(picture).convert("RGB").save(root / name / "images" / f"{i}.png")
            Image.fromarray(mask).save(root / name / "masks" / f"{i}.png")
        (root / name / "classes.txt").write_text("ground\ndigit\n")
    return [root / "train", root / "test"]


def text_sets(root: Path) -> list[Path]:
    """Sentences: whether they are kind, and whether they speak of a film."""
    paths = []
    for name, seed in (("train", 1), ("test", 2)):
        texts, labels = sentences(100, seed)
        lines = [f"{t}\t{c}{';film' if 'film' in t else ''}" for t, c in zip(texts, labels, strict=True)]
        paths.append(root / f"{name}.tsv")
        paths[-1].write_text("\n".join(["text\tlabels", *lines]) + "\n")
    return paths


def text_quantities(root: Path) -> list[Path]:
    """The number of words of a sentence."""
    paths = []
    for name, seed in (("train", 1), ("test", 2)):
        paths.append(root / f"{name}.jsonl")
        rows = [json.dumps({"text": t, "value": len(t.split())}) for t in sentences(100, seed)[0]]
        paths[-1].write_text("\n".join(rows))
    return paths


def tags(root: Path) -> list[Path]:
    """Judging words are entities of their kind."""
    kinds = {"bad": "neg", "dull": "neg", "awful": "neg", "good": "pos", "fine": "pos", "great": "pos"}
    paths = []
    for name, seed in (("train", 1), ("test", 2)):
        paths.append(root / f"{name}.tsv")
        texts = [t.split() for t in sentences(80, seed)[0]]
        marked = ["".join(f"{w}\t{'B-' + kinds[w] if w in kinds else 'O'}\n" for w in words) for words in texts]
        paths[-1].write_text("\n".join(marked))
    return paths


Make = Callable[[Path], list[Path]]
KINDS = [
    ("multi-label", "images", label_sets),
    ("regression", "images", quantities),
    ("segmentation", "images", masks),
    ("multi-label", "text", text_sets),
    ("regression", "text", text_quantities),
    ("tokens", "text", tags),
]


@pytest.mark.parametrize(("task", "kind", "make"), KINDS)
def test_a_linear_head_beats_a_constant_and_reloads(
    task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    train, test = make(tmp_path)
    source = export if kind == "images" else text_export
    results = finetune(source, train, test, task=task, output=tmp_path / "m", report=_silent, cpu=True)
    merit = results["merit"]
    assert results["interval"][0] > results["baseline"][merit] + 0.03
    assert results["interval"][0] <= results[merit] <= results["interval"][1]
    assert json.loads((tmp_path / "m" / "results.json").read_text()) == results
    out = tmp_path / "out"
    again = evaluate(tmp_path / "m", test, output=out, report=_silent, cpu=True)
    assert again["scores"] == results["scores"]
    assert json.loads((out / "results.json").read_text()) == again
    with open(out / "items.csv", newline="") as file:
        _items_add_up(task, list(csv.DictReader(file)), again)
    with pytest.raises(UserError, match=f"--calibrate fits .* the model is for {task}; leave it out"):
        evaluate(tmp_path / "m", test, calibrate=train, report=_silent, cpu=True)
    one = load_model(tmp_path / "m")
    one.save(tmp_path / "copy")
    two = load_model(tmp_path / "copy")
    assert two.target.describe() == one.target.describe()
    samples, _ = load_test(test, one.encoder, one.target)
    batch = samples.batch(np.arange(4), samples.keys(0, 0, np.arange(4)))
    with torch.no_grad():
        said = [m.target.decide(m.head(m.encoder(batch, dense=m.target.dense))) for m in (one, two)]
    assert torch.equal(*said)
    assert json.dumps(one.target.predictions(said[0]))


def _items_add_up(task: str, rows: list[dict[str, str]], results: dict[str, Any]) -> None:
    """A score found again in the items' own rows."""
    assert len(rows) == results["test"]["samples"]
    assert len({row["item"] for row in rows}) > 30
    assert sorted(results["intervals"]) == sorted(set(results["scores"]) - {"map", "spearman"})
    for name, (low, high) in results["intervals"].items():
        assert low <= results[name] <= high
    if task == "multi-label":
        pairs = [(set(json.loads(row["labels"])), set(json.loads(row["predictions"]))) for row in rows]
        hits = sum(len(true & said) for true, said in pairs)
        assert results["micro_f1"] == pytest.approx(2 * hits / sum(len(true) + len(said) for true, said in pairs))
        assert [row["correct"] == "1" for row in rows] == [true == said for true, said in pairs]
    elif task == "regression":
        away = [abs(float(row["value"]) - float(row["value_prediction"])) for row in rows]
        assert results["mae"] == pytest.approx(np.mean(away), rel=1e-5)
    elif task == "tokens":
        right, words = (sum(int(row[name]) for row in rows) for name in ("right", "words"))
        assert results["token_accuracy"] == pytest.approx(right / words)
        assert [len(json.loads(row["predictions"])) for row in rows] == [len(row["item"].split()) for row in rows]
    else:
        right, pixels = (sum(int(row[name]) for row in rows) for name in ("right", "pixels"))
        assert results["pixel_accuracy"] == pytest.approx(right / pixels)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind", "make"), KINDS)
def test_training_the_encoder_beats_a_constant(
    task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    train, test = make(tmp_path)
    source = export if kind == "images" else text_export
    options = QUICK | {"min_steps": 150}
    results = finetune(source, train, test, task=task, strategy="full", report=_silent, **options)
    assert results["interval"][0] > results["baseline"][results["merit"]] + 0.03


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_targets_describe_themselves_and_losses_add_up(target: Target) -> None:
    draw = torch.Generator().manual_seed(0)
    shape = {"tokens": (4, 6), "segmentation": (4, 2, 2)}.get(target.name, (4,))
    outputs = torch.randn(*shape, target.outputs, generator=draw)
    truth = {
        "multi-label": torch.rand(4, 3, generator=draw).round(),
        "regression": torch.randn(4, 2, generator=draw),
        "segmentation": torch.randint(0, 2, (4, 8, 8), generator=draw),
    }.get(target.name, torch.randint(0, target.outputs, shape, generator=draw))
    if target.dense:
        truth[:, 0] = IGNORED
    assert target_from(json.loads(json.dumps(target.describe()))).describe() == target.describe()
    total, count = target.loss(outputs, truth)
    halves = [target.loss(outputs[part], truth[part]) for part in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(total, halves[0][0] + halves[1][0])
    assert float(count) == float(halves[0][1] + halves[1][1]) == float((truth != IGNORED).sum())
    decided = list(target.decide(outputs))
    sums = target.sums(decided, list(truth))
    assert target.score(decided, list(truth))[target.merit] == pytest.approx(float(target.from_sums(sums.sum(axis=0))))
    assert len(json.dumps(target.predictions(torch.stack(decided)))) > 10


def test_scores_by_hand() -> None:
    labels = MultiLabel(["a", "b"])
    said = list(torch.tensor([[0.9, 0.6], [0.8, 0.1], [0.2, 0.7]]))
    truth = list(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    assert labels.score(said, truth)["micro_f1"] == pytest.approx(2 * 3 / (4 + 4))
    assert labels.score(said, truth)["map"] == pytest.approx((1 + (1 / 1 + 2 / 3) / 2) / 2)
    line = Regression(["x"], [0.0], [1.0])
    numbers = line.score(list(torch.tensor([[1.0], [2.0], [5.0]])), list(torch.tensor([[1.0], [3.0], [5.0]])))
    assert numbers == pytest.approx({"r2": 1 - 1 / 8, "mae": 1 / 3, "spearman": 1.0})
    entities = Tags(["O", "B-x", "I-x"])
    row, true = torch.tensor([1, 2, 0, 1, 0]), torch.tensor([1, 2, 0, 1, 2])
    assert entities.score([row], [true]) == pytest.approx({"f1": 0.5, "token_accuracy": 0.8})
    plain = Tags(["noun", "verb"])
    assert plain.merit == "token_accuracy"
    pixels = Segmentation(["ground", "thing"], 2)
    mask, said_mask = torch.tensor([[0, 0], [1, IGNORED]]), torch.tensor([[0, 1], [1, 1]])
    assert pixels.score([said_mask], [mask]) == pytest.approx({"miou": 0.5, "pixel_accuracy": 2 / 3})


def test_entities_are_read_as_conlleval_reads_them() -> None:
    tagged = ["B-a", "I-a", "B-a", "O", "I-b", "I-a", "I-a"]
    assert spans(tagged) == {("a", 0, 2), ("a", 2, 3), ("b", 4, 5), ("a", 5, 7)}
    assert is_bio(tagged)
    assert not is_bio(["O", "NOUN"])


def test_the_commonest_class_of_each_cell() -> None:
    mask = torch.tensor([[0, 1, 2, 2], [1, 1, 2, 0], [IGNORED] * 4, [IGNORED, IGNORED, 0, IGNORED]])
    assert commonest(mask[None], 2, 2, 3).tolist() == [[[1, 2], [IGNORED, 0]]]


def test_masks_follow_the_crops_of_their_pictures(export: Path, tmp_path: Path) -> None:
    train, _ = masks(tmp_path)
    for path in (train / "images").iterdir():  # pictures that show their own masks
        mask = np.asarray(Image.open(train / "masks" / path.name))
        Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)).convert("RGB").resize((16, 16)).save(path)
    encoder = load_encoder(export)
    samples = load_task(train, None, encoder, "segmentation").train
    positions, augment = np.arange(12), Augmentation(scale=(0.3, 0.6), flip=0.5)
    keys = samples.keys(3, 0, positions)
    view = encoder.inputs(samples.batch(positions, keys), augment)[0].mean(dim=1) > 0
    truth = samples.truth(positions, keys, augment)
    known = truth != IGNORED
    assert float((view == (truth == 1))[known].float().mean()) > 0.95
    other = samples.truth(positions, samples.keys(4, 0, positions), augment)
    assert float((view == (other == 1))[known].float().mean()) < 0.9


def test_words_are_tagged_at_their_first_token_and_long_texts_are_cut_between_words(text_export: Path) -> None:
    encoder = load_encoder(text_export)
    words = ["the", "unheard-of", "Schrödinger", "film"] * 10
    pieces = encoder.tokenize_words(words)
    assert len(pieces) > 1
    assert sum(len(firsts) for _, firsts in pieces) == len(words)
    spelled = []
    for row, firsts in pieces:
        assert len(row) <= encoder.context
        edges = pairwise([*firsts, len(row) - 1])
        spelled += [encoder.tokenizer.decode(row[a:b].tolist()).strip() for a, b in edges]
    assert spelled == words


def test_intervals_hold_the_merit_and_narrow_with_samples() -> None:
    from finetune.judge import Judgement

    draw = torch.Generator().manual_seed(1)
    target = Regression(["x"], [0.0], [1.0])
    widths = []
    for count in (50, 800):
        truth = torch.randn(count, 1, generator=draw)
        said = truth + 0.5 * torch.randn(count, 1, generator=draw)
        judged = Judgement(target, list(said), list(truth), 0.0)
        low, high = score_intervals([judged], resamples=300)[target.merit]
        assert low < judged.merit < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize(("task", "strategy"), [("multi-label", "knn"), ("regression", "knn")])
def test_strategies_that_make_no_sense(task: str, strategy: str, export: Path, tmp_path: Path) -> None:
    train, test = (label_sets if task == "multi-label" else quantities)(tmp_path)
    with pytest.raises(UserError, match="knn votes for one class"):
        finetune(export, train, test, task=task, strategy=strategy, report=_silent)


def test_a_budget_counts_samples_and_the_baseline_sees_no_input(export: Path, tmp_path: Path) -> None:
    train, test = quantities(tmp_path)
    results = finetune(export, train, test, task="regression", labels_per_class=20, seeds=[0, 1], report=_silent)
    assert [run["labels"] for run in results["runs"]] == [20, 20]
    task = load_task(train, test, load_encoder(export), "regression")
    assert baseline(task)["r2"] == pytest.approx(0.0, abs=0.1)
    assert baseline(task)["spearman"] == 0.0


TINY = {"cpu": True, "min_steps": 3, "epochs": 0.1, "batch_size": 8, "lr": 1e-3, "strength": 1.0, "hidden": 0}


QUICKLY = {("segmentation", "frozen"), ("tokens", "lora"), ("segmentation", "dora"), ("tokens", "gradual")}
EVERY = [
    pytest.param(strategy, *case, marks=() if (case[0], strategy) in QUICKLY else pytest.mark.slow)
    for case in KINDS
    for strategy in ("frozen", "lora", "dora", "lp-ft", "gradual")
]


@pytest.mark.parametrize(("strategy", "task", "kind", "make"), EVERY)
def test_every_strategy_takes_every_kind(
    strategy: str, task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    train, test = make(tmp_path)
    source = export if kind == "images" else text_export
    options = {"task": task, "report": _silent, "labels_per_class": 24, "output": tmp_path / "m"}
    results = finetune(source, train, test, strategy=strategy, **options, **TINY)
    again = evaluate(tmp_path / "m", test, report=_silent, cpu=True)
    assert again["scores"] == pytest.approx(results["scores"], abs=1e-4)
    assert (tmp_path / "m" / "adapter").is_dir() == (strategy in ("lora", "dora"))
    before, after = (load_encoder(folder).state_dict() for folder in (source, tmp_path / "m" / "encoder"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert bool(moved) == (strategy != "frozen")


@pytest.mark.parametrize(("task", "kind", "make"), [pytest.param(*KINDS[0], marks=pytest.mark.slow), KINDS[2]])
def test_lp_ft_begins_as_the_linear_strategy_ends(
    task: str, kind: str, make: Make, export: Path, text_export: Path, tmp_path: Path
) -> None:
    train, test = make(tmp_path)
    source = export if kind == "images" else text_export
    scores = [
        finetune(source, train, test, task=task, strategy=name, report=_silent, **TINY | {"lr": 1e-12})["scores"]
        for name in ("linear", "lp-ft")
    ]
    assert scores[1] == pytest.approx(scores[0], abs=1e-3)
