"""What the page shows: an answer, a mistake, or what a link leads back to, as HTML."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image

from fastgda.attributor import Attribution
from serving import html
from serving.answer import NO_INFLUENCE, Answer
from serving.guard import log
from serving.limits import from_base64
from serving.retrained import Retrained
from serving.world import World

Shown = tuple[str, str, str, str, str, str, str]
"""HTML of (message, picture, permalink, shares, tuned gallery, untuned gallery, teacher's gallery)."""


def gallery(world: World, found: Attribution, teacher: np.ndarray | None, distances: np.ndarray | None) -> str:
    """The first training images found; `teacher` is the query's ranking, absent for a picture of the visitor's."""
    figures = []
    place = {} if teacher is None else {int(image): rank for rank, image in enumerate(teacher, 1)}
    for position, known in enumerate(found.metadata[: world.topk]):
        assert known is not None
        notes = [*credits(known), f"score {found.scores[position]:.3f}"]
        if distances is not None and np.isfinite(distances[position]):
            notes.append(f"distance {distances[position]:.3f}")
        if known["id"] in place:
            notes.append(f"teacher's rank {place[known['id']]:,}")
        agreed = place.get(known["id"], world.level + 1) <= world.level
        figures.append(card(world, known, notes, agreed))
    return html.gallery(figures)


def card(world: World, known: Mapping[str, Any], notes: list[str], agreed: bool = False) -> str:
    """A training image with what is known of it."""
    return html.card(picture_of(world, known["id"]), known.get("caption") or "", notes, agreed)


def credits(known: Mapping[str, Any]) -> list[str]:
    """Whose a training image is, or what its dataset calls it."""
    if known.get("creator"):
        return [f"by {known['creator']}"]
    return [f"image {known['key']}"] if "key" in known else []


def picture_of(world: World, image: int) -> Image.Image | None:
    """A training image; `None` if it is not at hand or cannot be read: captions are enough to answer."""
    if image >= len(world.images):
        return None
    try:
        return world.images.image(image)
    except ValueError:
        return None


def timings(answer: Answer) -> str:
    """Milliseconds, the whole and its parts."""
    parts = answer.seconds
    listed = ", ".join(f"{name} {1000 * value:.1f}" for name, value in parts.items())
    return f"{1000 * sum(parts.values()):.1f} ms: {listed}"


def shown(world: World, answer: Answer) -> Shown:
    """An answer as the page shows it."""
    line = f"{timings(answer)}, among {len(world.collection):,} training images."
    nearest = None
    if answer.untuned is not None:
        nearest = np.maximum(1 - answer.untuned.scores, 0)
        line += (
            f" The nearest training image is at cosine distance {nearest[0]:.3f}; "
            f"training images are usually {world.typical_distance:.3f} from their nearest other."
        )
    ranking, truth = None, html.message("The teacher has scored stored queries only.")
    if answer.query is not None and answer.untuned is not None:
        ranking = world.teacher.rank[answer.query]
        found = (answer.tuned.ids[: world.topk], answer.untuned.ids[: world.topk])
        agree = [int(np.isin(ids, ranking[: world.level]).sum()) for ids in found]
        line += (
            f" Of the {world.topk} shown, {agree[0]} (tuned) and {agree[1]} (untuned) are in the teacher's "
            f"top {world.level} (framed)."
        )
        judged = answer.judged[: world.topk]
        notes = [[*credits(one.known), f"teacher's rank {one.rank:,}"] for one in judged]
        truth = html.gallery([card(world, one.known, said) for one, said in zip(judged, notes, strict=True)])
    origin, link = "your picture", ""
    if answer.query is not None:
        origin, link = f"test query {answer.query}", urlencode({"query": answer.query})
    elif answer.seed is not None:
        origin, link = f"generated from seed {answer.seed}", urlencode({"prompt": answer.prompt, "seed": answer.seed})
    shares = html.message("No shares: none were fitted for this ranker (benchmark.credit; of a bundle, --credit).")
    if world.credit is not None:
        shares = html.message(NO_INFLUENCE)
    if not world.has_creators:
        shares = ""
    elif answer.shares and world.credit is not None:
        shares = html.chart(answer.shares, answer.truth, min(world.credit.depth, len(world.collection)))
    return (
        html.message(line),
        f'<div class="query">{html.card(answer.image, answer.prompt, [origin])}</div>',
        html.permalink(link) if link else "",
        shares,
        gallery(world, answer.tuned, ranking, answer.distances),
        "" if answer.untuned is None else gallery(world, answer.untuned, ranking, nearest),
        truth,
    )


def show_retrained(retrained: Retrained, query: int) -> str:
    """The pictures of a query by models trained without its most influential images, the whole model's first."""
    caption = retrained.captions[query]
    cards = [html.card(retrained.image(query), caption, ["trained on everything"])]
    for removal in retrained.of(query):
        notes = [f"without {removal.removed:,} images", f"loss {removal.change:+.4f}"]
        cards.append(html.card(Image.fromarray(removal.picture), removal.method, notes))
    return html.gallery(cards)


def failed(error: ValueError) -> Shown:
    """A visitor's mistake as the page shows it."""
    return (html.message(str(error), error=True), "", "", "", "", "", "")


def logged(name: str, work: Callable[[], Answer]) -> Answer:
    """Does the work and logs how long it took, or that it was a mistake."""
    start = time.perf_counter()
    try:
        answer = work()
    except ValueError:
        log(name, seconds=round(time.perf_counter() - start, 4), refused=True)
        raise
    log(name, **{part: round(value, 4) for part, value in answer.seconds.items()})
    return answer


def show(world: World, name: str, work: Callable[[], Answer]) -> Shown:
    """What the page shows of an answer, or of a mistake."""
    try:
        return world.told(lambda: logged(name, work), lambda answer: shown(world, answer))
    except ValueError as error:
        return failed(error)


def show_query(world: World, query: int) -> Shown:
    """What the page shows for a stored query; a mistake becomes a message."""
    return show(world, "query", lambda: world.stored(query, world.topk))


def show_upload(world: World, text: str | None, prompt: str | None) -> Shown:
    """What the page shows for an uploaded file, as base64 text, and its prompt; a mistake becomes a message."""

    def work() -> Answer:
        if text is None:
            raise ValueError("Choose a picture first.")
        words = world.limits.checked_prompt(prompt)
        return world.answer(world.limits.picture(from_base64(text), "picture"), words, world.topk)

    return show(world, "upload", work)


def show_generated(world: World, prompt: str | None, seed: float | None) -> Shown:
    """What the page shows for a picture generated from a prompt and a seed."""
    return show(world, "generate", lambda: world.generated(prompt, seed, world.topk))


def show_address(world: World, parameters: Mapping[str, str]) -> tuple[str, int, str, int, Shown]:
    """(tab, stored query, prompt, seed, what is shown) for the parameters of a permalink; query 0 without any."""
    if "prompt" in parameters:
        prompt, seed = parameters["prompt"], number_of(parameters.get("seed", "0"))
        kept, tab = prompt[: world.limits.prompt_characters], "stored" if world.painter is None else "generate"
        return tab, 0, kept, max(0, seed), show_generated(world, prompt, seed)
    if len(world.queries) == 0 and "query" not in parameters:
        return "upload", 0, "", 0, (html.message("Upload a picture and type its prompt."), "", "", "", "", "", "")
    query = number_of(parameters.get("query", "0"))
    return "stored", query if 0 <= query < len(world.queries) else 0, "", 0, show_query(world, query)


def number_of(text: str) -> int:
    """The number that the digits `text` spell; -1, which is out of every range, for other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
