"""A one-page report on one picture: HTML to read and print, JSON to keep.

    python -m serving.report bundles/emoji heart.png --prompt "red heart, noto style" --out report.html \\
        --images data/emoji/trainset/emoji.parquet

Writes <out> and, beside it, the same as .json. `--images` is where the training pictures are shown from (row = id);
they must be those of the bundle.
"""

from __future__ import annotations

import html
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from fastgda.core import atomic_path, command_line, command_parser, save_json
from fastgda.index.backend import check_k
from feature_extraction.sources import Pictures, open_source
from serving import html as pieces
from serving.answer import NO_INFLUENCE, Answer, creators_of, document, method
from serving.attributor import Attributor, Picture, read_picture
from serving.bundle import weights_for

STYLE = """
:root { color-scheme: light dark; --body-text-color: #111827; --background-fill-primary: #fff;
  --border-color-primary: #d1d5db; --color-accent: #3b82f6; }
@media (prefers-color-scheme: dark) { :root { --body-text-color: #f3f4f6; --background-fill-primary: #1f2937;
  --border-color-primary: #4b5563; } body { background: #111827; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--body-text-color); max-width: 860px; margin: 24px auto;
  padding: 0 16px; } h1 { font-size: 22px; } h2 { font-size: 17px; margin-top: 24px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; overflow-wrap: anywhere; } dd { margin: 0; }
"""


def report(attributor: Attributor, picture: Picture, prompt: str, k: int) -> Answer:
    """The answer of a bundle for one picture; `ValueError` unless `k` is from 1 to the number of its images."""
    bundle = attributor.bundle
    check_k(k, len(bundle.index))
    image = read_picture(picture, "image")
    found = attributor.attribute(image, prompt, bundle.depth(k))
    shares = () if bundle.credit is None else bundle.credit.shares(found.scores, creators_of(found.metadata))
    return Answer(image, prompt, found, shares)


def training_picture(training: Pictures, entry: Mapping[str, Any]) -> Image.Image:
    """The picture of an image found; `ValueError` if `training` has none of its id or says something else of it."""
    row, captions = entry["id"], training.captions
    if row >= len(training):
        raise ValueError(
            f"--images {training.path}: expected the training pictures, found {len(training)} and no {row}"
        )
    if entry["caption"] is not None and entry["caption"] not in captions[row]:
        raise ValueError(
            f"--images {training.path}: expected the training pictures, found another caption for {row}: "
            f"{training.caption(row)!r:.60} instead of {entry['caption']!r:.60}"
        )
    return training.image(row)


def page(found: dict[str, Any], answer: Answer, depth: int, training: Pictures | None) -> str:
    """The report of the JSON document `found` as HTML that needs no other file."""
    figures = []
    for entry in found["images"]:
        image = None if training is None else training_picture(training, entry)
        notes = [f"id {entry['id']}", *(str(entry[key]) for key in ("creator", "licence", "url") if entry[key])]
        notes.append(f"score {entry['score']:.3f}")
        if "influence" in entry:
            notes.append(f"influence {entry['influence']:.2f}")
        figures.append(pieces.card(image, entry["caption"] or "", notes))
    how = found["method"]
    chart = pieces.message("No credit rule." if how["credit"] is None else NO_INFLUENCE)
    if answer.shares:
        chart = pieces.chart(answer.shares, answer.truth, depth)
    facts = {
        "made": found["made"],
        "encoder": how["encoder"]["ftype"],
        "ranker": how["ranker"],
        "training images": f"{how['training_images']:,}",
        "credit rule": "none"
        if how["credit"] is None
        else f"first {how['credit']['depth']} images; fitted on " + how["credit"]["fitted_on"],
        "versions": ", ".join(f"{name} {version}" for name, version in how["versions"].items()),
        "time": ", ".join(f"{name} {value:.1f} ms" for name, value in found["milliseconds"].items()),
    }
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    caveats = "".join(f"<li>{html.escape(text)}</li>" for text in found["caveats"])
    query = pieces.card(answer.image, answer.prompt, [])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Attribution report</title>'
        f"<style>{STYLE}{pieces.CSS}</style></head><body><h1>Which training images made this picture?</h1>"
        f'<div class="query">{query}</div><h2>Shares by creator</h2>{chart}'
        f"<h2>Most influential training images</h2>{pieces.gallery(figures)}"
        f"<h2>Method</h2><dl>{listed}</dl><h2>Caveats</h2><ul>{caveats}</ul></body></html>\n"
    )


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m serving.report", __doc__)
    parser.add_argument("bundle", type=Path, help="folder that python -m serving.bundle made")
    parser.add_argument("image", type=Path, help="generated picture")
    parser.add_argument("--prompt", required=True, help="what it was generated from")
    parser.add_argument("--out", type=Path, required=True, help="report to write, .html")
    parser.add_argument("--k", type=int, default=12, help="training images shown (default: 12)")
    parser.add_argument("--images", type=Path, help="where training pictures are: see feature_extraction/sources.py")
    parser.add_argument("--weights", nargs="*", default=[], help="NAME=PATH of encoder weights that are not the usual")
    args = parser.parse_args(argv)
    if args.out.suffix != ".html":
        raise ValueError(f"--out {args.out}: expected a name ending in .html")
    attributor = Attributor.from_pretrained(args.bundle, weights=weights_for(args.bundle, args.weights))
    bundle = attributor.bundle
    training = None if args.images is None else open_source(args.images)
    answer = report(attributor, args.image, args.prompt, args.k)
    how = method(bundle.encoder, bundle.ranker_id, len(bundle.index), bundle.credit)
    found = document(answer, how, args.k, bundle.credit)
    found["made"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    depth = 0 if bundle.credit is None else bundle.credit.depth
    with atomic_path(args.out) as temporary:
        temporary.write_text(page(json.loads(json.dumps(found)), answer, depth, training))
    save_json(args.out.with_suffix(".json"), found)
    print(f"{args.out}, {args.out.with_suffix('.json')}")


if __name__ == "__main__":
    sys.exit(main())
