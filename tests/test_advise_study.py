"""The study itself: the same labels for all, no test item learned from, nothing lost by a kill, the cap kept."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from test_finetune_kit import NAMES, digits, sentences, write_encoder, write_images, write_text_encoder, write_tsv

from data.errors import UserError
from finetune.advise.budgets import default_budgets, parse_budgets, settle_budgets, take
from finetune.advise.cells import Cell, CellFile
from finetune.advise.clock import Clock, Costs, OutOfTime, guarded, work
from finetune.advise.duplicates import separate
from finetune.advise.study import Choices, advise
from finetune.encoder import load_encoder
from finetune.settings import Settings
from finetune.tasks import load_task
from launch.advise_page import page
from launch.cli import main

pytest_plugins = ["test_finetune_kit"]
QUICK = {"cpu": True, "min_steps": 4, "epochs": 1.0, "batch_size": 16}
UNEQUAL = np.repeat([0, 1, 2], [600, 90, 10])


def _silent(_: str) -> None:
    pass


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_budgets_are_nested_and_stratified(per_class: bool, seed: int) -> None:
    before: set[int] = set()
    for budget in (3, 10, 30, 100, 300):
        positions = take(UNEQUAL, budget, seed, per_class)
        counts = np.bincount(UNEQUAL[positions], minlength=3)
        assert before <= set(positions.tolist())
        before = set(positions.tolist())
        if per_class:
            assert counts.tolist() == np.minimum(budget, [600, 90, 10]).tolist()
        else:
            assert counts.sum() == budget == len(before)
            due = budget * np.array([600, 90, 10]) / 700
            # Within one label of its share, where the label that every class gets first leaves that much.
            assert (counts >= 1).all()
            assert (np.abs(counts - due) <= 2).all()
    assert set(take(UNEQUAL, None, seed, per_class).tolist()) == set(range(700))
    assert take(UNEQUAL, 100, 0, per_class).tolist() != take(UNEQUAL, 100, 1, per_class).tolist()


def test_budgets_that_cannot_be_met_are_told() -> None:
    met, notes = settle_budgets(UNEQUAL, [2, 30, 5000, None], False)
    assert met == {30: 30, 700: None}
    assert "too few" in notes[0]
    assert "all 700" in notes[1]
    assert default_budgets(UNEQUAL, False) == [10, 30, 100, 300, None]
    assert list(settle_budgets(UNEQUAL, None, True)[0]) == [3, 9, 30, 70, 200, 400, 700]
    assert parse_budgets(["1_000", "all"]) == [1000, None]
    with pytest.raises(UserError, match="too few"):
        settle_budgets(UNEQUAL, [2], False)
    with pytest.raises(UserError, match="ten"):
        parse_budgets(["ten"])


def test_what_the_test_set_holds_is_not_learned_from(export: Path, tmp_path: Path) -> None:
    images, labels = digits()
    train = write_images(tmp_path / "train", images[:300], labels[:300], NAMES)
    # 40 of the training pictures, another 60, and 10 of those once more.
    places = np.r_[0:40, 300:360, 300:310]
    test = write_images(tmp_path / "test", images[places], labels[places], NAMES)
    task = load_task(train, test, load_encoder(export))
    found = separate(task)
    assert (found.removed_from_train, found.removed_from_test) == (40, 10)
    assert found.train.tolist() == list(range(40, 300))
    assert found.test.tolist() == list(range(100))
    apart = separate(found.apply(task))
    assert (apart.removed_from_train, apart.removed_from_test) == (0, 0)


def test_the_same_text_counts_once(text_export: Path, tmp_path: Path) -> None:
    texts, labels = sentences(40, 1)
    task = load_task(
        write_tsv(tmp_path / "train.tsv", texts, labels),
        write_tsv(tmp_path / "test.tsv", [texts[3], "a new one", "a new one"], [labels[3], "pos", "pos"]),
        load_encoder(text_export),
    )
    found = separate(task)
    assert found.removed_from_train == texts.count(texts[3])
    assert found.removed_from_test == 1


def _study(export: Path, shards: tuple[Path, Path], out: Path, report: Any = _silent, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"budgets": ["10", "40"], "seeds": 2, "minutes": 5.0, "settings": QUICK}
    options |= {"strategies": ["majority", "linear", "full", "scratch"], "test_items": 150} | changes
    return advise(export, *shards, out, choices=Choices(**options), report=report)


@pytest.fixture(scope="module")
def whole(
    export: Path, digit_shards: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A finished study."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    return folder, _study(export, digit_shards, folder)


def test_all_cells_are_there_and_the_files_agree(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    arms = ["majority", "linear, untrained", "linear", "full", "scratch"]
    assert [arm["name"] for arm in results["arms"]] == arms
    assert results["not_run"] == []
    assert json.loads((folder / "advise.json").read_text()) == json.loads(json.dumps(results))
    rows = list(csv.DictReader((folder / "cells.csv").open()))
    assert {(r["arm"], r["labels"], r["seed"]) for r in rows} == {
        (a, n, s) for a in arms for n in ("10", "40") for s in "01"
    }
    for row in results["accuracy"]:
        seeds = [float(r["accuracy"]) for r in rows if (r["arm"], r["labels"]) == (row["arm"], str(row["labels"]))]
        assert row["accuracy"] == pytest.approx(np.mean(seeds), abs=1e-5)
        assert row["low"] <= row["accuracy"] <= row["high"]
    tried = {about["learning_rates"] for about in results["trials"].values()}
    assert len(tried) == 1  # equal effort, the control included
    assert results["test"]["samples"] == 150
    assert not (folder / "features").exists()


def test_a_cell_is_what_finetune_does(export: Path, digit_shards: tuple[Path, Path], tmp_path: Path) -> None:
    from finetune.run import finetune

    alone = finetune(export, *digit_shards, strategy="linear", labels_per_class=3, seeds=[0], report=_silent, cpu=True)
    choices = Choices(budgets=["3"], per_class=True, strategies=["linear"], seeds=1, settings={"cpu": True})
    results = advise(export, *digit_shards, tmp_path / "out", choices=choices, report=_silent)
    assert set(results["duplicates"].values()) == {0}
    row = next(row for row in results["accuracy"] if row["arm"] == "linear")
    assert (row["labels"], row["accuracy"], row["macro_f1"]) == (30, alone["accuracy"], alone["macro_f1"])


@pytest.mark.slow
def test_a_study_goes_on_where_it_was(
    whole: tuple[Path, dict[str, Any]], export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    lines = (whole[0] / "cells.jsonl").read_bytes().splitlines(keepends=True)
    for cut in (lines[:4], [*lines[:7], lines[7][:50]]):
        folder = tmp_path / str(len(cut))
        folder.mkdir()
        (folder / "cells.jsonl").write_bytes(b"".join(cut))
        told: list[str] = []
        results = _study(export, digit_shards, folder, told.append)
        assert any(
            f"{len([c for c in cut[1:] if c.endswith(b'}' + chr(10).encode())])} of them done" in t for t in told
        )
        for part in ("accuracy", "benefit", "differences"):
            without = [{k: v for k, v in row.items() if k != "seconds"} for row in results[part]]
            assert without == [{k: v for k, v in row.items() if k != "seconds"} for row in whole[1][part]]


def test_another_study_is_not_mixed_in(
    whole: tuple[Path, dict[str, Any]], export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="set of settings"):
        _study(export, digit_shards, whole[0], settings=QUICK | {"batch_size": 8})
    with pytest.raises(UserError, match="another encoder"):
        _study(write_encoder(tmp_path / "other", seed=9), digit_shards, whole[0])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="no study"):
        _study(export, digit_shards, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
def test_a_killed_study_keeps_its_cells(export: Path, digit_shards: tuple[Path, Path], tmp_path: Path) -> None:
    train, test = map(str, digit_shards)
    command = [sys.executable, "-m", "launch.cli", "advise", str(export), train, "--test", test]
    command += ["--budgets", "10,40", "--strategies", "linear,full,scratch", "--output", str(tmp_path / "out")]
    command += ["--test-items", "100", *(f"{name}={value}" for name, value in QUICK.items())]
    file = tmp_path / "out" / "cells.jsonl"
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < 8):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = file.read_bytes().count(b"\n") - 1
    assert 7 <= kept < 24
    done = subprocess.run([*command, "--json"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"{kept} of them done" in done.stderr
    assert json.loads(done.stdout)["not_run"] == []
    assert (tmp_path / "out" / "advise.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_cap_is_kept_and_what_was_not_run_is_named(
    export: Path, digit_shards: tuple[Path, Path], tmp_path: Path
) -> None:
    """To 5 seconds and one step beyond the cap (files and intervals), here with cells that would take hours."""
    slow = QUICK | {"min_steps": 200_000}
    started = time.monotonic()
    results = _study(export, digit_shards, tmp_path / "out", settings=slow, minutes=0.5)
    assert time.monotonic() - started < 0.5 * 60 + 5
    missing = {(cell["arm"], cell["labels"], cell["seed"]) for cell in results["not_run"]}
    assert {("full", 40, 1), ("scratch", 10, 0)} <= missing
    assert all(cell["reason"] for cell in results["not_run"])
    run = {(row["arm"], row["labels"]) for row in results["accuracy"]}
    assert ("linear", 40) in run  # cheap first


def test_no_sample_is_read_after_the_clock_has_run_down(export: Path, digit_shards: tuple[Path, Path]) -> None:
    now = [0.0]
    task = load_task(*digit_shards, load_encoder(export))
    watched = guarded(task.train, Clock(10, lambda: now[0])).select(np.arange(20))
    assert len(list(watched.batches(10))) == 2
    now[0] = 11.0
    with pytest.raises(OutOfTime):
        next(watched.batches(10))
    assert len(list(task.train.select(np.arange(20)).batches(10))) == 2  # the original is not watched


def test_costs_grow_with_the_work() -> None:
    settings = Settings(min_steps=100, epochs=5.0, batch_size=10)
    assert work(10, 300, settings, 3) == 3 * 1000 + 1000 + 100
    assert work(10_000, 0, settings, 3) == pytest.approx(50_000 + 3 * 7500)
    # Trials may take a share of the steps, and no batch is larger than the labels.
    brief = Settings(min_steps=100, epochs=5.0, batch_size=32, trial_share=0.25)
    assert work(10, 300, brief, 3) == 3 * 250 + 1000 + 100
    costs = Costs(lambda arm, labels: float(labels))
    assert costs.predict("full", 10) is None
    costs.note("full", 10, 2.0)
    costs.note("full", 10, 1.0)
    assert costs.predict("full", 30) == pytest.approx(1.25 * 6.0)
    assert costs.predict("full", 10) == pytest.approx(2.5)


def test_a_cell_survives_its_file(tmp_path: Path) -> None:
    cell = Cell("full", 10, 3, np.arange(13) % 3 == 0, 0.25, 1.5, {"lr": 0.1})
    CellFile(tmp_path / "cells.jsonl", {"encoder": "a"}).add(cell)
    read = CellFile(tmp_path / "cells.jsonl", {"encoder": "a"}).cells["full", 10, 3]
    assert (read.correct == cell.correct).all()
    assert (read.macro_f1, read.seconds, read.chosen) == (0.25, 1.5, {"lr": 0.1})
    with pytest.raises(UserError, match="another encoder"):
        CellFile(tmp_path / "cells.jsonl", {"encoder": "b"})


class _Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {k}" for k, _ in attributes if k in ("src", "href", "srcset", "data")]


def test_the_page_stands_alone_and_says_what_was_found(whole: tuple[Path, dict[str, Any]]) -> None:
    text = page(whole[1])
    parser = _Outside()
    parser.feed(text)
    assert parser.found == []
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert whole[1]["recommendation"]["text"].replace("'", "&#x27;") in text
    for heading in ("Is pre-training worth it?", "Rules of thumb, checked", "Seconds", "Not measured"):
        assert heading in text
    assert len(text) < 100_000


def test_a_study_of_nothing_still_says_so(
    export: Path, digit_shards: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test = map(str, digit_shards)
    words = ["advise", str(export), train, "--test", test, "--output", str(tmp_path / "out"), "cpu=true"]
    assert main([*words, "--minutes", "0.00001"]) == 0
    assert "raise --minutes" in capsys.readouterr().out
    assert "raise --minutes" in (tmp_path / "out" / "advise.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budgets", "1,2"], "each needs a label"),
        (["--budgets", "ten"], "'ten' is no label budget"),
        (["--strategies", "linaer"], "'linaer'"),
        (["--seeds", "0"], "one seed or more"),
        (["--targets", "80"], "between 0 and 1"),
        (["--targets", "x"], "between 0 and 1"),
        (["--minutes", "0"], "more than 0 minutes"),
        (["--pretraining", "nowhere"], "nowhere"),
        (["--second", "nowhere"], "nowhere"),
        (["epocs=1"], "epocs"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str],
    sentence: str,
    export: Path,
    digit_shards: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, test = map(str, digit_shards)
    assert main(["advise", str(export), train, "--test", test, "--output", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error


def test_text_with_a_second_encoder(sentiment: tuple[Path, Path], text_export: Path, tmp_path: Path) -> None:
    other = write_text_encoder(tmp_path / "other", seed=5)
    choices = Choices(budgets=["10", "all"], strategies=["knn", "linear"], seeds=2, settings={"cpu": True})
    results = advise(text_export, *sentiment, tmp_path / "out", second=other, choices=choices, report=_silent)
    arms = {row["arm"] for row in results["accuracy"]}
    assert arms == {"knn", "knn, untrained", "knn, second", "linear", "linear, untrained", "linear, second"}
    assert set(results["encoders"]) == {"pre-trained", "second"}
    assert results["not_run"] == []
