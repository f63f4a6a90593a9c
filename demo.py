"""Browser demo: which training images made this picture?

    python demo.py --checkpoint weights/emoji_effnet+minilm.pth --data_dir data/emoji --port 7860

Pick a stored test query, or upload a picture and type its prompt. Shown are the training images that the tuned ranker
finds most influential, the neighbours under the untuned features beside them, for stored queries the teacher's own
top images, and the time taken. The server listens on 127.0.0.1 and asks nothing of the internet.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastgda.attributor import Attribution, Attributor, Untuned
from fastgda.core import ROOT, command_line, load_npy, read_manifest, relative
from fastgda.dataset import default_levels, layout
from fastgda.flags import add_flags, from_flags
from fastgda.ranker import load_ranker
from fastgda.rankings import Rankings, load_rankings
from feature_extraction.encoders import Encoder, identity, load_encoder
from feature_extraction.readers import ImageTable, open_image, read_split

if TYPE_CHECKING:
    import gradio as gr

EXTRACT = "python -m feature_extraction.extract --mode emoji --ftype"
UPLOAD_LIMIT = "200mb"
THUMBNAIL = 256
"""Pixels of an uploaded picture as it is shown."""
FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
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
"""


@dataclass(frozen=True)
class DemoConfig:
    """What the demo shows and where it listens."""

    checkpoint: Path = ROOT / "weights" / "emoji_effnet+minilm.pth"
    """The ranker."""
    ftype: str = "effnet+minilm"
    """Feature that the ranker was trained on."""
    data_dir: Path = ROOT / "data" / "emoji"
    """Folder with trainset/, query_test/ and influence_test.npz."""
    feature_dir: Path | None = None
    """Folder of the training features, or the folder above it; by default <data_dir>/feats/<ftype>."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 7860
    """Port to listen on."""
    topk: int = 12
    """Training images shown in each gallery."""

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"--port {self.port}: expected 1 to 65535")
        if self.topk < 1:
            raise ValueError(f"--topk {self.topk}: expected at least 1")


@dataclass(frozen=True)
class World:
    """Everything the demo needs, loaded and checked."""

    images: ImageTable
    """Training images."""
    queries: ImageTable
    """Stored test queries."""
    teacher: Rankings
    """The teacher's rankings for the stored queries."""
    encoder: Encoder
    tuned: Attributor
    untuned: Attributor
    topk: int
    level: int
    """L: the teacher's top L count as influential."""
    encoding: threading.Lock = field(default_factory=threading.Lock)
    """Tokenizers refuse to be used by two threads at once."""


def load_world(config: DemoConfig) -> World:
    """Loads the artifacts; `ValueError` naming the first one that is missing, damaged or of another run."""
    images, queries = (read_split(config.data_dir, split) for split in ("data", "test_query"))
    folder = config.feature_dir or config.data_dir / "feats"
    if (folder / config.ftype).is_dir():
        folder = folder / config.ftype
    paths = layout("emoji", config.ftype, config.data_dir, folder)
    made_by = f"{EXTRACT} {config.ftype}"
    features = load_npy(paths.images, (len(images), None), finite=True, made_by=made_by)
    if read_manifest(folder)["config"] != identity(config.ftype):
        raise ValueError(f"{folder}: expected features of this {config.ftype}, found others; redo: {made_by}")
    ranker = load_ranker(config.checkpoint, in_dim=features.shape[1])
    teacher = load_rankings(paths.ranking("test"), len(images), made_by="python -m abu.collect")
    if teacher.queries != len(queries):
        raise ValueError(f"{paths.ranking('test')}: expected {len(queries)} queries, found {teacher.queries}")
    encoder = load_encoder(config.ftype)
    tuned, untuned = Attributor.build(features, ranker), Attributor.build(features, Untuned())
    topk = min(config.topk, len(images))
    return World(images, queries, teacher, encoder, tuned, untuned, topk, default_levels("emoji", len(images))[0])


def attribute(world: World, image: Image.Image, prompt: str) -> tuple[Attribution, Attribution]:
    """(tuned, untuned) attribution of a picture and its prompt."""
    start = time.perf_counter()
    with world.encoding:
        features = world.encoder.encode([image], [prompt])[0]
    seconds = time.perf_counter() - start
    return (
        world.tuned.attribute(features, world.topk, seconds),
        world.untuned.attribute(features, world.topk, seconds),
    )


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG data URI, reduced to 256 pixels."""
    shown = image.copy()
    shown.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    shown.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def card(image: Image.Image, caption: str, notes: list[str], agreed: bool = False) -> str:
    """One picture with its caption and small print, as HTML."""
    text = html.escape(caption)
    small = "".join(f'<span class="small">{html.escape(note)}</span>' for note in notes)
    kind = ' class="agreed"' if agreed else ""
    return f'<figure{kind}><img src="{data_uri(image)}" alt="{text}"><figcaption>{text}{small}</figcaption></figure>'


def cards(world: World, ids: np.ndarray, scores: np.ndarray | None, teacher: np.ndarray | None) -> str:
    """A gallery of training images; `teacher` is the query's ranking, absent for an uploaded picture."""
    figures = []
    place = {} if teacher is None else {int(image): rank for rank, image in enumerate(teacher, 1)}
    for position, image in enumerate(map(int, ids)):
        notes = [f"set {world.images.sets[image]}"]
        if scores is not None:
            notes.append(f"score {scores[position]:.3f}")
        if image in place:
            notes.append(f"teacher's rank {place[image]:,}")
        agreed = place.get(image, world.level + 1) <= world.level and scores is not None
        figures.append(card(world.images.image(image), world.images.caption(image), notes, agreed))
    return f'<div class="cards">{"".join(figures)}</div>'


def message(text: str, error: bool = False) -> str:
    """A line for the reader, announced to screen readers."""
    kind, role = ("message error", "alert") if error else ("message", "status")
    return f'<div class="{kind}" role="{role}">{html.escape(text)}</div>'


def results(world: World, image: Image.Image, prompt: str, query: int | None) -> tuple[str, str, str, str, str]:
    """HTML of (message, query, tuned gallery, untuned gallery, teacher's gallery)."""
    tuned, untuned = attribute(world, image, prompt)
    total = tuned.encode_seconds + tuned.embed_seconds + tuned.search_seconds
    line = (
        f"{1000 * total:.1f} ms: encode {1000 * tuned.encode_seconds:.1f}, embed {1000 * tuned.embed_seconds:.1f}, "
        f"search {1000 * tuned.search_seconds:.1f}, among {len(world.images):,} training images."
    )
    ranking, truth = None, message("The teacher has scored stored queries only.")
    notes = ["your picture"]
    if query is not None:
        ranking, notes = world.teacher.rank[query], [f"test query {query}"]
        agree = [np.isin(found.ids, ranking[: world.level]).sum() for found in (tuned, untuned)]
        line += (
            f" Of the {world.topk} shown, {agree[0]} (tuned) and {agree[1]} (untuned) are in the teacher's "
            f"top {world.level} (framed)."
        )
        truth = cards(world, ranking[: world.topk], None, ranking)
    shown = f'<div class="query">{card(image, prompt, notes)}</div>'
    return (
        message(line),
        shown,
        cards(world, tuned.ids, tuned.scores, ranking),
        cards(world, untuned.ids, untuned.scores, ranking),
        truth,
    )


def show_query(world: World, query: int) -> tuple[str, str, str, str, str]:
    """What the page shows for a stored query."""
    return results(world, world.queries.image(query), world.queries.caption(query), query)


def show_upload(world: World, path: str | None, prompt: str | None) -> tuple[str, str, str, str, str]:
    """What the page shows for an uploaded file and its prompt; a mistake becomes a message."""
    prompt = " ".join((prompt or "").split())
    try:
        if path is None:
            raise ValueError("Choose a picture first.")
        if not prompt:
            raise ValueError("Type the prompt that the picture was made from.")
        return results(world, open_image(Path(path).read_bytes(), Path(path).name), prompt, None)
    except ValueError as error:
        return message(str(error), error=True), "", "", "", ""


def build_app(world: World) -> gr.Blocks:
    """The page; `ValueError` naming the extra if gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("gradio is not installed; pip install 'fastgda[demo]'") from None

    prompts = [(f"{row}: {world.queries.caption(row)}", row) for row in range(len(world.queries))]
    with gr.Blocks(title="FastGDA", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown("# FastGDA\nWhich training images made this picture? Most influential first.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Tab("Stored query"):
                    query = gr.Dropdown(prompts, value=0, label="Prompt", elem_id="stored")
                with gr.Tab("Your own picture"):
                    upload = gr.File(label="Picture, at most 50 megapixels", height=140, elem_id="upload")
                    prompt = gr.Textbox(label="Its prompt", placeholder="red heart, noto style", elem_id="prompt")
                    submit = gr.Button("Find its sources", variant="primary", elem_id="submit")
                picture = gr.HTML(elem_id="query")
            with gr.Column(scale=6, min_width=300):
                status = gr.HTML(elem_id="status")
                with gr.Row():
                    with gr.Column(min_width=260):
                        gr.Markdown("### Tuned: learned from the teacher")
                        tuned = gr.HTML(elem_id="tuned")
                    with gr.Column(min_width=260):
                        gr.Markdown("### Untuned: nearest features")
                        untuned = gr.HTML(elem_id="untuned")
                    with gr.Column(min_width=260):
                        gr.Markdown("### Teacher: slow reference")
                        teacher = gr.HTML(elem_id="teacher")
        outputs = [status, picture, tuned, untuned, teacher]
        gr.on([app.load, query.change], lambda row: show_query(world, row), query, outputs, concurrency_limit=4)
        gr.on(
            [submit.click, prompt.submit],
            lambda path, text: show_upload(world, path, text),
            [upload, prompt],
            outputs,
            concurrency_limit=4,
        )
    return app


def launch(app: gr.Blocks, host: str, port: int) -> str:
    """Starts serving in the background and returns the address; `OSError` if the port is taken."""
    import gradio as gr

    theme = gr.themes.Default(font=list(FONTS), font_mono=["ui-monospace", "monospace"])
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=CSS,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=UPLOAD_LIMIT,
        prevent_thread_lock=True,
    )
    return url


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python demo.py", description=__doc__.splitlines()[0])
    add_flags(parser, DemoConfig)
    config = from_flags(DemoConfig, parser.parse_args(argv))
    world = load_world(config)
    app = build_app(world)
    url = launch(app, config.host, config.port)
    print(f"{relative(config.checkpoint)}: serving on {url} (Ctrl-C stops)", flush=True)
    app.block_thread()


if __name__ == "__main__":
    sys.exit(main())
