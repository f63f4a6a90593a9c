"""Pieces of HTML for page and report: pictures, galleries, messages, the chart of shares. All text is escaped."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence

from PIL import Image

from fastgda.credit import LEVEL, Share

THUMBNAIL = 256
"""Pixels of a picture as it is shown."""
CSS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 10px; }
.cards figure, .query figure { margin: 0; padding: 6px; border: 1px solid var(--border-color-primary);
  border-radius: 8px; background: var(--background-fill-primary); color: var(--body-text-color); }
.cards figure.agreed { border: 2px solid var(--color-accent); padding: 5px; }
.cards img, .query img { width: 100%; aspect-ratio: 1; object-fit: contain; background: #fff; border-radius: 4px; }
.query figure { max-width: 260px; } .query img { aspect-ratio: auto; }
figcaption { font-size: 12px; line-height: 1.35; overflow-wrap: anywhere; font-weight: 600; }
figcaption, figcaption .small { color: var(--body-text-color); }
figcaption .small { display: block; font-weight: 400; }
.message { padding: 8px 12px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); font-size: 14px; }
.message.error { border-color: var(--error-border-color, #b91c1c); border-left: 6px solid #b91c1c; }
#upload label, #upload input { display: block; font-size: 14px; color: var(--body-text-color); margin: 4px 0; }
#upload input { width: 100%; padding: 8px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.shares { width: 100%; border-collapse: collapse; font-size: 13px; color: var(--body-text-color); }
.shares caption { text-align: left; font-size: 12px; padding-bottom: 4px; color: var(--body-text-color); }
.shares th { text-align: left; font-weight: 600; width: 30%; padding: 3px 8px 3px 0; overflow-wrap: anywhere; }
.shares td.number { width: 9em; white-space: nowrap; text-align: right; font-variant-numeric: tabular-nums; }
.shares, .shares td, .shares th, .shares tr, .shares tbody { border: 0 !important; vertical-align: middle; }
@media (max-width: 640px) {
  .shares tr { display: grid; grid-template-columns: 1fr auto; padding-bottom: 6px; }
  .shares th, .shares td.number { width: auto; padding: 2px 0; }
  .shares td:nth-child(2) { grid-column: 1 / -1; grid-row: 2; padding: 0; }
}
.bar { position: relative; display: block; height: 16px; background: var(--border-color-primary); border-radius: 3px; }
.bar i { position: absolute; display: block; }
.bar .share { left: 0; top: 0; bottom: 0; background: #3b82f6; border-radius: 3px; }
.bar .interval { top: 7px; height: 2px; background: var(--body-text-color); }
.bar .truth { top: -2px; bottom: -2px; width: 4px; margin-left: -2px; background: #ea580c; border: 1px solid #fff; }
"""


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG data URI, reduced to 256 pixels."""
    shown = image.copy()
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    shown.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def card(image: Image.Image | None, caption: str, notes: Sequence[str], agreed: bool = False) -> str:
    """One picture (or none, where only its caption is known) with its caption and small print."""
    text = html.escape(caption)
    small = "".join(f'<span class="small">{html.escape(note)}</span>' for note in notes)
    kind = ' class="agreed"' if agreed else ""
    picture = "" if image is None else f'<img src="{data_uri(image)}" alt="{text}">'
    return f"<figure{kind}>{picture}<figcaption>{text}{small}</figcaption></figure>"


def gallery(figures: Sequence[str]) -> str:
    """Cards in rows."""
    return f'<div class="cards">{"".join(figures)}</div>'


def message(text: str, error: bool = False) -> str:
    """A line for the reader, announced to screen readers."""
    kind, role = ("message error", "alert") if error else ("message", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def chart(shares: Sequence[Share], truth: Mapping[str, float] | None, depth: int) -> str:
    """Shares by creator as bars with their intervals, and the teacher's shares as marks where there are any."""
    names = [share.creator for share in shares]
    known = {share.creator: share for share in shares}
    others = sorted((name for name in truth or {} if name not in known), key=lambda name: -(truth or {})[name])
    rows = []
    for name in [*names, *(other for other in others if (truth or {})[other] > 0)]:
        share = known.get(name, Share(name, 0.0, 0.0, 0.0, 0))
        bar = f'<i class="share" style="width:{100 * share.share:.1f}%"></i>'
        bar += (
            f'<i class="interval" style="left:{100 * share.low:.1f}%;width:{100 * (share.high - share.low):.1f}%"></i>'
        )
        numbers = f"{share.share:.0%} ({share.low:.0%}–{share.high:.0%})"
        if truth is not None:
            bar += f'<i class="truth" style="left:{100 * truth.get(name, 0):.1f}%"></i>'
            numbers += f"; teacher {truth.get(name, 0):.0%}"
        rows.append(
            f'<tr><th scope="row">{html.escape(name)}</th><td><span class="bar" aria-hidden="true">{bar}</span></td>'
            f'<td class="number">{numbers}</td></tr>'
        )
    legend = f"Share of the predicted influence of the first {depth} images; line: {LEVEL:.0%} interval"
    legend += "" if truth is None else "; orange: the teacher's own share"
    return f'<table class="shares"><caption>{legend}</caption><tbody>{"".join(rows)}</tbody></table>'


def permalink(parameters: str) -> str:
    """A link to the page with these parameters."""
    return f'<a href="?{html.escape(parameters)}">Permalink to this answer</a>'
