"""`headwater report RUN`: one self-contained HTML page about a run."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from data.errors import UserError
from data.files import write_atomically
from launch.charts import Chart, Line, svg, thin
from launch.status import Status, duration, logged, read_status
from pretrain.metrics import read_starts

_PLACE = ("step", "samples", "epoch")
_RATES = ("samples_per_second", "data_wait")
_TITLES = {
    "loss": "Loss",
    "samples_per_second": "Samples a second",
    "data_wait": "Share of the time spent waiting for data",
    "lr": "Learning rate",
    "gradient_norm": "Norm of the gradient, before clipping",
}
_STYLE = """
:root{color-scheme:light dark;--text:#1f2328;--soft:#59636e;--line:#1f6feb;--mark:#d9730d;--back:#fff;--card:#f6f8fa;
--grid:#d1d9e0}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--line:#58a6ff;--mark:#f0883e;--back:#0d1117;
--card:#161b22;--grid:#30363d}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1180px;padding:20px 16px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}h1{font-size:1.6rem;margin:0}h2{font-size:1.1rem;margin:32px 0 8px}
p{margin:4px 0;color:var(--soft)}.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:10px;
margin-top:16px}.tile,figure{background:var(--card);border-radius:8px;padding:10px 12px;margin:0;min-width:0}
.tile b{display:block;font-size:1.25rem;overflow-wrap:anywhere}.tile span,figcaption{color:var(--soft);font-size:.85rem}
.sights{display:grid;gap:12px}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:12px}
svg{width:100%;height:auto;display:block}svg text{fill:var(--soft);font-size:12px}svg .grid{stroke:var(--grid)}
svg path{fill:none;stroke:var(--line);stroke-width:2;stroke-linejoin:round}svg .faint{stroke:var(--grid)}
svg circle{fill:var(--line)}svg .mark{stroke:var(--mark);stroke-width:2;stroke-dasharray:4 3}
img{width:100%;image-rendering:pixelated;border-radius:4px}table{border-collapse:collapse;width:100%;font-size:.9rem}
td{padding:3px 10px 3px 0;vertical-align:top;overflow-wrap:anywhere}td:first-child{color:var(--soft);white-space:nowrap}
pre{background:var(--card);border-radius:8px;padding:12px;overflow-x:auto;font-size:.85rem}.bad{color:var(--mark)}
@media(max-width:520px){svg text{font-size:18px}}
"""


def write_report(run: Path, pictures: bool = True, output: Path | None = None) -> Path:
    """Write `output` (by default `run/report.html`); nothing beside it is needed to read it.

    Args:
        pictures: also show views (and reconstructions, for masked image modelling), if there is an export
            and its data can still be read; this loads torch.

    Raises:
        UserError: `run` is no run folder, or has logged nothing yet, or `output` cannot be written.
    """
    target = output or run / "report.html"
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output} must name a file in a folder that exists")
    status = read_status(run)
    lines = logged(run)
    if not lines:
        raise UserError(f"{run} has logged nothing yet; wait for its first line of metrics.jsonl")
    try:
        starts, environment = read_starts(run), _environment(run)
        begun = _starts(starts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"starts.jsonl or environment.json in {run} cannot be read"
        raise UserError(f"{what} ({type(error).__name__}: {error}); mend or remove it") from None
    seen = _looked_at(run) if pictures else ""
    sections = [
        _head(run, status, starts),
        f'<h2>Curves</h2><div class="charts">{"".join(_charts(lines, starts))}</div>',
        seen,
        f"<h2>Starts</h2>{begun}" if starts else "",
        f"<h2>Environment</h2>{environment}",
        f"<h2>Recipe</h2><pre>{html.escape((run / 'recipe.yaml').read_text())}</pre>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(run.name)}: {status.state}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )
    try:
        write_atomically(target, page)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another --output") from None
    return target


def _head(run: Path, status: Status, starts: list[dict[str, Any]]) -> str:
    of = f"of {status.steps:,} steps" if status.steps else "steps"
    tiles = [("state", status.state), (of, f"{status.step:,}")]
    tiles += [("loss", f"{status.loss:.4f}")] if status.loss is not None else []
    speed, wait = status.samples_per_second, status.data_wait
    tiles += [("samples a second", f"{speed:,.0f}")] if speed is not None else []
    tiles += [("data wait", f"{wait:.1%}")] if wait is not None else []
    tiles += [("left", duration(status.seconds_left))] if status.seconds_left is not None else []
    tiles += [("last checkpoint", f"step {int(status.checkpoint[5:]):,}")] if status.checkpoint else []
    tiles += [("resumed", f"{len(starts) - 1} time" + "s" * (len(starts) > 2))] if len(starts) > 1 else []
    cells = "".join(f'<div class="tile"><b>{html.escape(value)}</b><span>{name}</span></div>' for name, value in tiles)
    trouble = "" if status.health == "good" else f'<p class="bad">{html.escape(status.health)}</p>'
    return f'<h1>{html.escape(run.name)}</h1>{trouble}<div class="tiles">{cells}</div>'


def _charts(lines: list[dict[str, Any]], starts: list[dict[str, Any]]) -> list[str]:
    marks = [(start["step"], f"resumed {start['time']}") for start in starts[1:]]
    names = dict.fromkeys(name for line in lines for name, value in line.items() if isinstance(value, int | float))
    # The loss, what was probed, and then how it went.
    order = ["loss"] * ("loss" in names)
    order += [name for name in names if name not in _TITLES and name not in _PLACE]
    order += [name for name in _TITLES if name in names and name != "loss"]
    span = (min(line["step"] for line in lines), max(line["step"] for line in lines))
    figures = []
    for name in order:
        points = [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), int | float)]
        title = _TITLES.get(name, name.replace("_", " ").capitalize())
        few, rate = len(points) < 40, name in _RATES
        picture = svg(Chart(title, [Line(thin(points))], marks=marks, dots=few, from_zero=rate, span=span))
        last = f"{points[-1][1]:.4g} at step {points[-1][0]:,}"
        figures.append(f"<figure><figcaption>{html.escape(title)}: {last}</figcaption>{picture}</figure>")
    return figures


def _starts(starts: list[dict[str, Any]]) -> str:
    rows = [(start["time"], f"step {start['step']:,} on {start.get('host', 'unknown')}") for start in starts]
    return _table(rows)


def _environment(run: Path) -> str:
    rows = []
    path = run / "environment.json"
    if path.exists():
        facts = json.loads(path.read_text())
        rows += [(name, str(value)) for name, value in facts.items() if name != "packages"]
        rows += list(facts.get("packages", {}).items())
    command = run / "command.txt"
    rows += [("command", command.read_text().strip())] if command.exists() else []
    return _table(rows)


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _looked_at(run: Path) -> str:
    """What the model sees: a row of views, and reconstructions where the objective makes some."""
    from launch.sights import sights

    found = sights(run)
    figures = (
        f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{png}">'
        f"<figcaption>{html.escape(name)}</figcaption></figure>"
        for name, png in found
    )
    return f'<h2>What the model sees</h2><div class="sights">{"".join(figures)}</div>' if found else ""
