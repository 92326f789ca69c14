"""The report of a run: one page that needs nothing beside it, and reads well on a phone."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import apt_kit
import pytest
from test_status import make_run

from data.errors import UserError
from launch.charts import Chart, Line, number, svg, thin
from launch.cli import main
from launch.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    """A headless Chromium, installed where that may be done."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    reason = None if found else apt_kit.missing(["chromium"], ["chromium"])
    if reason:
        pytest.skip(reason)
    return found or "chromium"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Forty logged steps, resumed at step 20, with text that must be escaped."""
    folder = make_run(tmp_path / "r<b>un")
    lines = [
        {"step": s, "samples": 10 * s, "epoch": s / 80, "loss": 3 / (s + 1), "lr": 1e-3, "samples_per_second": 20.0}
        for s in range(1, 41)
    ]
    lines[9]["knn_accuracy"], lines[29]["knn_accuracy"] = 0.3, 0.4
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"step": 0, "time": "2026-01-01", "host": "a"}, {"step": 20, "time": "2026-01-02", "host": "b"}]
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.11"}}))
    (folder / "command.txt").write_text("headwater pretrain <recipe>\n")
    return folder


def test_the_page_is_whole_and_alone(run: Path) -> None:
    page = write_report(run, pictures=False).read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is loaded from elsewhere"
    assert "r&lt;b&gt;un" in page
    assert "<b>un" not in page
    assert "&lt;recipe&gt;" in page
    for title in ("Loss", "Learning rate", "Knn accuracy", "Samples a second"):
        assert f"<figcaption>{title}" in page
    assert "resumed 2026-01-02" in page
    assert "1 time<" in page


def test_each_chart_is_well_formed_with_its_marks_inside(run: Path) -> None:
    page = write_report(run, pictures=False).read_text()
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 4
    for text in charts:
        root = ElementTree.fromstring(text)
        marks = [float(line.get("x1", "nan")) for line in root.iter("line") if line.get("class") == "mark"]
        assert all(0 < x < 560 for x in marks)
    loss = ElementTree.fromstring(charts[0])
    assert len([line for line in loss.iter("line") if line.get("class") == "mark"]) == 1


def test_charts_beside_each_other_share_their_steps(run: Path) -> None:
    page = write_report(run, pictures=False).read_text()
    probes = page[page.index("<figcaption>Knn accuracy") :]
    assert probes.index('text-anchor="middle">40<') < probes.index("</svg>"), "though the last probe was at step 30"
    assert page.index("Knn accuracy") < page.index("Learning rate")


def test_the_page_can_go_elsewhere(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["report", str(run), "--no-pictures", "--output"]
    assert main([*words, str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size > 0
    assert not (run / "report.html").exists(), "a run that others watch is left alone"
    assert main([*words, str(tmp_path / "no" / "page.html")]) == 2
    assert "folder that exists" in capsys.readouterr().err


def test_nothing_logged_is_said(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has logged nothing yet"):
        write_report(run)


def test_a_value_that_is_not_finite_breaks_the_line() -> None:
    text = svg(Chart("loss", [Line([(0, 1.0), (1, 2.0), (2, math.nan), (3, 1.5), (4, 1.0)])]))
    assert len(list(ElementTree.fromstring(text).iter("path"))) == 2
    assert "nan" not in text
    assert svg(Chart("loss", [Line([(0, math.nan)])])) == ""
    assert "nan" not in svg(Chart("constant", [Line([(0, 0.0), (1, 0.0)])]))


def test_long_runs_are_thinned_by_means() -> None:
    points = [(float(i), float(i % 2)) for i in range(100_000)]
    short = thin(points)
    assert len(short) <= 800
    assert all(abs(y - 0.5) < 0.01 for _, y in short)
    assert short[-1][0] == points[-1][0]
    assert thin(points[:100]) == points[:100]


@pytest.mark.parametrize(("value", "text"), [(1500, "1.5k"), (2e6, "2M"), (0.00025, "0.00025"), (-3000, "-3k")])
def test_numbers_of_ticks(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_sideways_scrolling(run: Path, browser: str, tmp_path: Path, width: int) -> None:
    page = write_report(run, pictures=False).read_text()
    probe = tmp_path / "probe.html"
    # The page inside a frame of the width asked for: headless windows have a least width of their own.
    inner = page.replace('"', "&quot;")
    probe.write_text(
        f'<iframe id="f" style="border:0;width:{width}px;height:900px" srcdoc="{inner}"></iframe><script>'
        "onload=()=>{const d=document.getElementById('f').contentDocument;const r=d.documentElement;"
        "const small=Math.min(...[...d.querySelectorAll('svg text')].map(t=>t.getBoundingClientRect().height));"
        "document.title=[r.scrollWidth,r.clientWidth,d.querySelectorAll('svg').length,small|0].join(' ')}</script>"
    )
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    words += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    words += [f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*words, probe.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+) (\d+) (\d+) (\d+)</title>", done.stdout)
    assert found, done.stdout[-500:]
    scroll, client, charts, letters = map(int, found.groups())
    assert scroll <= client == width
    assert charts == 4
    assert letters >= 10, "the axes can be read"
