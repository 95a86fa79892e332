"""Writes a report as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

import contextlib
import html
import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from asyncckpt.catalog.listing import CheckpointInfo
from asyncckpt.errors import MissingExtra, RunPathError
from asyncckpt.manifest.environment import version
from asyncckpt.report.facts import Facts, gather
from asyncckpt.report.quantities import size
from asyncckpt.run import Run

_ROWS = 200
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1.5rem; }
body { color: #1b1b1b; background: #fff; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; }
.note { color: #555; margin: .2rem 0 1rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem; margin: 1rem 0; }
.card { border: 1px solid #ddd; border-radius: 8px; padding: .6rem .8rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 600; }
.card.bad { border-color: #d55e00; background: #fff6f0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid #eee; vertical-align: top; }
th { color: #555; font-weight: 600; white-space: nowrap; } td { overflow-wrap: anywhere; }
.good { color: #00734f; } .bad-text { color: #b34700; font-weight: 600; }
"""


def write_report(
    run: Run, out: str | os.PathLike[str], *, modes: Mapping[str, str] | None = None, overwrite: bool = False
) -> Facts:
    """Write the report of a run to ``out``; return what it tells. ``modes``: see ``gather``. ``overwrite``: replace a
    file that is there. The page appears whole or not at all. Blocks on the disk. Raises ``MissingExtra``,
    ``RunPathError``, ``InvalidOption`` and ``StorageFailed``."""
    target = Path(out)
    if target.is_dir() or (os.path.lexists(target) and not overwrite):
        raise RunPathError(f"{target} exists; choose another name, or overwrite it on purpose (--force)")
    facts = gather(run, modes)
    text = page(facts)
    temp = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        temp.write_text(text, encoding="utf-8")
        with temp.open("rb") as file:
            os.fsync(file.fileno())
        temp.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise RunPathError(f"{target}: cannot write here ({error}); choose another path") from error
    return facts


def page(facts: Facts) -> str:
    """Return the page. Names, metrics and errors in it are other people's text: none of it is taken for markup. Raises
    ``MissingExtra``."""
    try:
        import plotly
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtra("a report is drawn with plotly: pip install 'asyncckpt[report]'") from error
    from asyncckpt.report import figures

    parts = [_head(facts)]
    drawn = (
        ("Timeline", "Each mark is a checkpoint, at the time when it was durable.", figures.timeline(facts)),
        (
            "What saves cost",
            "Stall is what training waited; the other line is how long the bytes took.",
            figures.speed(facts),
        ),
        ("Sizes", "What is linked was not written again, because it had not changed.", figures.sizes(facts)),
        ("Metrics", "Stars are the best of those that are there.", figures.metrics(facts)),
    )
    scripts: list[str] = []
    for number, (title, told, figure) in enumerate(drawn):
        if figure is not None:
            parts.append(f'<h2>{title}</h2><p class="note">{told}</p>')
            parts.append(
                figure.to_html(
                    full_html=False,
                    include_plotlyjs=False,
                    div_id=f"figure-{number}",
                    config={"displayModeBar": False, "responsive": True},
                )
            )
    parts += [_health(facts), _environments(facts), _checkpoints(facts.entries)]
    scripts.append(f"<script>{get_plotlyjs()}</script>")
    made = f"asyncckpt {version()}, plotly {plotly.__version__}, {_time(time.time())}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(os.path.basename(facts.path) or facts.path)}: checkpoints</title>"
        f"<style>{_STYLE}</style>{''.join(scripts)}</head><body>{''.join(parts)}"
        f'<p class="note">Made by {_text(made)}. Times are UTC.</p></body></html>\n'
    )


def _head(facts: Facts) -> str:
    usable = [entry for entry in facts.entries if entry.damage is None]
    damaged = len(facts.entries) - len(usable)
    found = sum(bool(entry.number("damage")) for entry in facts.health if entry.what == "verify")
    linked = sum(point.linked_bytes or 0 for point in facts.points)
    compressed = sum(point.compressed_bytes or 0 for point in facts.points)
    cards: list[tuple[str, str, bool]] = [
        (str(len(usable)), "usable checkpoints", not usable),
        (size(sum(entry.nbytes for entry in usable)), "in their files", False),
        (str(facts.count("save")), "saves in the journal", False),
        (_seconds(facts.median("stall_seconds")), "training stalls, median", False),
        (_seconds(facts.median("durable_seconds")), "until durable, median", False),
        (_speed(facts.median("gigabytes_a_second")), "written, median", False),
        (size(linked), "linked, not written", False),
        (size(compressed), "saved by compression", False),
        (str(facts.count("failed")), "failed saves", facts.count("failed") > 0),
        (str(facts.count("fallback")), "fall-backs", facts.count("fallback") > 0),
        (str(damaged), "damaged now", damaged > 0),
        (str(found), "verifications that found damage", found > 0),
    ]
    rows = "".join(
        f'<div class="card{" bad" if bad else ""}"><b>{_text(value)}</b>{_text(what)}</div>'
        for value, what, bad in cards
    )
    hint = (
        "Times, deleted checkpoints and what went wrong are from the journal that the run keeps, which is a hint: it "
        "is bounded, and lines may be missing. What is there is looked up."
        if facts.journal
        else "The run keeps no journal, or it cannot be read: this page has what its checkpoints say themselves."
    )
    return f'<h1>{_text(facts.path)}</h1><p class="note">{hint}</p><div class="cards">{rows}</div>'


def _health(facts: Facts) -> str:
    rows: list[Sequence[str]] = []
    for entry in facts.entries:
        if entry.damage is not None:
            rows.append((_bad("damaged"), _text(entry.name), "now", _text(entry.damage)))
    for line in facts.health[:_ROWS]:
        if line.what == "verify":
            count = int(line.number("damage") or 0)
            state = _bad(f"{count} damaged") if count else '<span class="good">verified, good</span>'
            told = line.text("first") if count else _seconds(line.number("seconds"))
        else:
            state = _bad("save failed" if line.what == "failed" else "fell back")
            told = line.text("reason")
        rows.append((state, _text(line.name or f"step {line.step}"), _time(line.at_unix_seconds), _text(told)))
    empty = "Nothing was verified, and nothing failed, as far as the journal tells. `asyncckpt verify --all` looks."
    return _table("Health", ("what", "checkpoint", "when", "told"), rows, empty)


def _environments(facts: Facts) -> str:
    rows: list[Sequence[str]] = []
    before: Mapping[str, str] = {}
    for at, step, versions in facts.environments[:_ROWS]:
        changed = {key: value for key, value in versions.items() if before.get(key) != value}
        gone = [f"{key} (gone)" for key in before if key not in versions]
        told = ", ".join([f"{key} {value}" for key, value in changed.items()] + gone)
        rows.append((str(step), _time(at), _text(told)))
        before = versions
    return _table("What saves were made with", ("from step", "when", "what changed"), rows, "Nobody knows.")


def _checkpoints(entries: Sequence[CheckpointInfo]) -> str:
    rows: list[Sequence[str]] = []
    for entry in list(reversed(entries))[:_ROWS]:
        notes = [entry.damage or "ok"]
        notes += (
            ["pinned"] * entry.pinned + [entry.derived] * bool(entry.derived) + ["left by going back"] * entry.abandoned
        )
        metrics = ", ".join(f"{name} {value:.6g}" for name, value in entry.metrics.items())
        state = _bad(entry.damage) if entry.damage is not None else _text(", ".join(notes))
        made = _time(entry.created_unix_seconds) if entry.created_unix_seconds else ""
        cells = (
            str(entry.step),
            _text(entry.name),
            _text(entry.kind),
            size(entry.nbytes),
            made,
            _text(metrics),
            state,
        )
        rows.append(cells)
    head = ("step", "name", "kind", "size", "saved", "metrics", "state")
    return _table("Checkpoints that are there", head, rows, "None.")


def _table(title: str, head: Iterable[str], rows: Sequence[Sequence[str]], empty: str) -> str:
    if not rows:
        return f'<h2>{title}</h2><p class="note">{_text(empty)}</p>'
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<h2>{title}</h2><div class="wide"><table><tr>{heads}</tr>{body}</table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))


def _bad(value: Any) -> str:
    return f'<span class="bad-text">{_text(value)}</span>'


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"


def _speed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} GB/s"


def _time(unix_seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_seconds))
    except (OverflowError, ValueError, OSError):
        return "?"
