"""The page and its HTTP API; the only importer of gradio.

The page shows a stored query, a picture generated here or an uploaded one. Its address (?query=3, ?prompt=...&seed=7)
leads back to the same answer. For programs there are /attribute, /generate and /query, which give JSON:

    from gradio_client import Client
    Client("http://127.0.0.1:7860").predict(base64_of_the_file, "red heart, noto style", 10, api_name="/attribute")

Pictures come in as base64 text, from the page too: no call names a file or an address that the server would open, and
none leaves a file on it.
"""

from __future__ import annotations

import base64
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from serving import html
from serving.answer import Answer, document
from serving.guard import Guard, Jobs, Service, log
from serving.limits import THREADS, from_base64
from serving.retrained import Retrained
from serving.views import logged, show_address, show_generated, show_query, show_retrained, show_upload
from serving.world import World

if TYPE_CHECKING:
    import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
FOLLOW = """(html) => {
  const link = new DOMParser().parseFromString(html || '', 'text/html').querySelector('a');
  history.replaceState(null, '', link ? link.getAttribute('href') : location.pathname);
}"""
"""Puts the permalink into the address bar."""
CHOOSE = """<label for="picture">Picture (PNG, JPEG, WebP, GIF, BMP or TIFF, at most 50 megapixels). It is not kept, so
its answer has no permalink.</label>
<input type="file" id="picture" accept="image/*">"""
READ = """async (_, prompt) => {
  const file = document.querySelector('#picture').files[0];
  if (!file) return [null, prompt];
  return [await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file.slice(0, LARGEST + 1));
  }), prompt];
}"""
"""Reads the chosen file in the browser; of one that is too large just enough for the server to say so."""
RETRAINED = """### What is lost without them
A smaller model of the same emoji, trained again without the images that a method finds most influential for a prompt,
draws it from the same seed. The more its loss rises, the more those images mattered."""


class Api:
    """The functions behind the HTTP API. Mistakes are `ValueError`s."""

    def __init__(self, world: World) -> None:
        self.world = world

    def attribute(self, image: str, prompt: str, k: int) -> dict:
        """The k training images that most influenced a picture, given as the base64 text of its file."""

        def work() -> Answer:
            limits = self.world.limits
            count, words = self._count(k), limits.checked_prompt(prompt)
            return self.world.answer(limits.picture(from_base64(image), "image"), words, count)

        return self._told("attribute", work, k)

    def generate(self, prompt: str, seed: int, k: int) -> dict:
        """Generates a picture from a prompt and a seed; the picture as base64 PNG and what influenced it."""

        def with_picture(answer: Answer) -> dict:
            out = BytesIO()
            answer.image.save(out, "PNG")
            return self._document(answer, k) | {"image": base64.b64encode(out.getvalue()).decode()}

        find = partial(logged, "generate", lambda: self.world.generated(prompt, seed, self._count(k)))
        return self.world.told(find, with_picture)

    def query(self, query: int, k: int) -> dict:
        """The training images that most influenced a stored query, and the teacher's shares."""
        return self._told("query", lambda: self.world.stored(query, self._count(k)), k)

    def _count(self, k: object) -> int:
        return self.world.limits.checked_k(k, len(self.world.collection))

    def _told(self, name: str, work: Callable[[], Answer], k: int) -> dict:
        return self.world.told(partial(logged, name, work), lambda answer: self._document(answer, k))

    def _document(self, answer: Answer, k: int) -> dict:
        return document(answer, self.world.method, int(k), self.world.credit)


def build_app(world: World) -> gr.Blocks:
    """The page; `ValueError` naming the extra if gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
    except ImportError:
        raise ValueError("gradio is not installed; pip install 'fastgda[demo]'") from None

    api = Api(world)

    def told(work: Callable[[], dict]) -> dict:
        try:
            return work()
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def attribute(image: str, prompt: str, k: int = 10) -> dict:
        return told(lambda: api.attribute(image, prompt, k))

    def generate(prompt: str, seed: int = 0, k: int = 10) -> dict:
        return told(lambda: api.generate(prompt, seed, k))

    def query_api(query: int, k: int = 10) -> dict:
        return told(lambda: api.query(query, k))

    stored = len(world.queries) > 0
    example = world.queries.caption(0) if stored else ""
    prompts = [(f"{row}: {world.queries.caption(row)}", row) for row in range(len(world.queries))]
    with gr.Blocks(title="FastGDA", analytics_enabled=False, fill_width=True) as app:
        gr.Markdown("# FastGDA\nWhich training images made this picture? Most influential first.")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                with gr.Tabs() as tabs:
                    with gr.Tab("Stored", id="stored", visible=stored):
                        query = gr.Dropdown(prompts, value=0 if stored else None, label="Prompt", elem_id="stored")
                    with gr.Tab("Generate", id="generate", visible=world.painter is not None):
                        new = gr.Textbox(label="What to draw", placeholder=example, elem_id="new")
                        seed = gr.Number(value=0, precision=0, minimum=0, label="Seed", elem_id="seed")
                        draw = gr.Button("Generate and find its sources", variant="primary", elem_id="draw")
                    with gr.Tab("Upload", id="upload"):
                        gr.HTML(CHOOSE, elem_id="upload")
                        content = gr.Textbox(visible=False)
                        prompt = gr.Textbox(label="Its prompt", placeholder=example, elem_id="prompt")
                        submit = gr.Button("Find its sources", variant="primary", elem_id="submit")
                picture = gr.HTML(elem_id="query")
                link = gr.HTML(elem_id="link")
            with gr.Column(scale=6, min_width=300):
                status = gr.HTML(elem_id="status")
                gr.Markdown("### Shares by creator", visible=world.has_creators)
                shares = gr.HTML(elem_id="shares", visible=world.has_creators)
                with gr.Row():
                    with gr.Column(min_width=260):
                        gr.Markdown("### Tuned: learned from the teacher")
                        tuned = gr.HTML(elem_id="tuned")
                    with gr.Column(min_width=260, visible=world.untuned is not None):
                        gr.Markdown("### Untuned: nearest features")
                        untuned = gr.HTML(elem_id="untuned")
                    with gr.Column(min_width=260, visible=stored):
                        gr.Markdown("### Teacher: slow reference")
                        teacher = gr.HTML(elem_id="teacher")
        if world.retrained is not None:
            retrained_section(world.retrained)
        outputs = [status, picture, link, shares, tuned, untuned, teacher]

        def opened(request: gr.Request) -> tuple:
            tab, number, words, start, found = show_address(world, dict(request.query_params))
            return gr.Tabs(selected=tab), number if stored else None, words, start, *found

        # gradio tells by the annotation that it should pass the request, and cannot resolve the name of a late import
        opened.__annotations__["request"] = gr.Request
        # one queue for all, so that the machine's cores are shared by few requests at a time
        options: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": THREADS, "concurrency_id": "work"}
        events = [
            app.load(opened, None, [tabs, query, new, seed, *outputs], **options),
            query.input(lambda row: show_query(world, row), query, outputs, **options),
            gr.on(
                [draw.click, new.submit],
                lambda words, start: show_generated(world, words, start),
                [new, seed],
                outputs,
                **options,
            ),
            gr.on(
                [submit.click, prompt.submit],
                lambda text, words: show_upload(world, text, words),
                [content, prompt],
                outputs,
                js=READ.replace("LARGEST", str(world.limits.largest_picture)),
                **options,
            ),
        ]
        for event in events:
            event.then(None, link, None, js=FOLLOW, api_visibility="private")
        work: dict[str, Any] = {"concurrency_limit": THREADS, "concurrency_id": "work"}
        gr.api(attribute, api_name="attribute", api_description=Api.attribute.__doc__, **work)
        gr.api(generate, api_name="generate", api_description=Api.generate.__doc__, **work)
        gr.api(query_api, api_name="query", api_description=Api.query.__doc__, **work)
    return app


def retrained_section(retrained: Retrained) -> None:
    """The part of the page on models that were trained again."""
    import gradio as gr

    gr.Markdown(RETRAINED)
    choices = [(caption, query) for query, caption in enumerate(retrained.captions)]
    chosen = gr.Dropdown(choices, value=0, label="Judged prompt", elem_id="judged")
    pictures = gr.HTML(show_retrained(retrained, 0), elem_id="retrained")
    chosen.input(lambda query: show_retrained(retrained, query), chosen, pictures, api_visibility="private")


def launch(app: gr.Blocks, service: Service, host: str, port: int) -> str:
    """Starts serving in the background and returns the address; `OSError` if the port is taken."""
    import gradio as gr
    from starlette.middleware import Middleware

    theme = gr.themes.Default(font=list(FONTS), font_mono=["ui-monospace", "monospace"])
    # unless told which proxies to believe, uvicorn would believe whoever asks from this machine
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    app.queue(max_size=service.limits.queue_length)
    service.jobs = lambda: jobs_of(app)
    _, url, _ = app.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=html.CSS,
        share=False,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        prevent_thread_lock=True,
        app_kwargs={"middleware": [Middleware(Guard, service=service)]},
    )
    return url


def jobs_of(app: gr.Blocks) -> Jobs:
    """What Gradio's queue holds: an event from acceptance until it is finished, its messages until they are fetched."""
    queue = app._queue
    pending = list(queue.pending_event_ids_session.items())
    messages = [queue.pending_messages_per_session.get(session) for session, events in pending if events]
    uncollected = sum(waiting is not None and not waiting.empty() for waiting in messages)
    return Jobs(len(queue.event_ids_to_events), uncollected)


@contextmanager
def signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set, instead of ending the process."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(app: gr.Blocks, service: Service) -> bool:
    """Takes no new work, finishes what is under way and closes; whether all of it was finished in time."""
    finished, left = service.finish(), service.jobs()
    app.close(verbose=False)
    log("stopped", finished=finished, unfinished=left.unfinished, uncollected=left.uncollected)
    return finished
