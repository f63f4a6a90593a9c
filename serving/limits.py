"""What a visitor may ask for: sizes, kinds of pictures, lengths of prompts, requests a minute; else a clear message."""

from __future__ import annotations

import base64
import binascii
import struct
import threading
import time
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

from PIL import Image

from feature_extraction.readers import open_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that Pillow decodes by itself; others may start programs of their own."""
DAMAGED = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, AttributeError),
    *(ArithmeticError, MemoryError, RuntimeError, struct.error, zlib.error),
)
"""What Pillow's decoders raise for hostile files, depending on which byte is wrong."""
THREADS = 4
"""Requests answered at the same time."""
Result = TypeVar("Result")
CLIENTS = 10_000
"""Clients whose requests are counted; the one that has been silent longest is forgotten first."""


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for."""

    upload_mb: float = 32
    """Megabytes of a request. A picture comes in it as base64, which makes it a third larger."""
    held_mb: float = 256
    """Megabytes of requests that are read at the same time."""
    prompt_characters: int = 1000
    """Characters of a prompt."""
    max_k: int = 1000
    """Training images in one answer."""
    requests_per_minute: int = 240
    """Requests that ask for work, a minute and client."""
    queue_length: int = 32
    """Requests that may wait for their turn."""
    timeout_s: float = 60
    """Seconds for a request to arrive, to wait for an encoder in use, and for the work on it."""
    grace_s: float = 30
    """Seconds to finish what is under way after SIGTERM."""

    def __post_init__(self) -> None:
        for name in (
            "upload_mb",
            "held_mb",
            "prompt_characters",
            "max_k",
            "requests_per_minute",
            "queue_length",
            "timeout_s",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name} {getattr(self, name)}: expected more than 0")

    @property
    def largest(self) -> int:
        """Bytes of a request."""
        return round(self.upload_mb * 1e6)

    @property
    def largest_picture(self) -> int:
        """Bytes of a picture's file, the rest of its request aside."""
        return self.largest * 3 // 4 - 20_000

    @property
    def most_held(self) -> int:
        """Bytes of requests that are read at the same time."""
        return round(self.held_mb * 1e6)

    def checked_prompt(self, prompt: object) -> str:
        """`prompt` on one line; `ValueError` if there is none or it is too long."""
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(f"prompt: expected text, found {prompt!r:.40}")
        if prompt is not None and len(prompt) > self.prompt_characters:
            raise ValueError(f"prompt: expected at most {self.prompt_characters:,} characters, found {len(prompt):,}")
        # a half of a surrogate pair, which JSON can carry, is no character that a tokenizer takes
        words = " ".join((prompt or "").encode("utf-8", "replace").decode("utf-8").split())
        if not words:
            raise ValueError("Type the prompt that the picture was made from.")
        return words

    def checked_k(self, k: object, images: int) -> int:
        """`k` as a whole number; `ValueError` unless it is one from 1 to the smaller of the limit and `images`."""
        most = min(self.max_k, images)
        number = whole(k)
        if not 1 <= number <= most:
            raise ValueError(f"k: expected a whole number from 1 to {most:,}, found {k!r:.40}")
        return number

    def checked_seed(self, seed: object) -> int:
        """`seed` as a whole number from 0 to 2^31 - 1; `ValueError` if it is another."""
        number = whole(seed)
        if not 0 <= number < 2**31:
            raise ValueError(f"seed: expected a whole number from 0 to {2**31 - 1:,}, found {seed!r:.40}")
        return number

    def picture(self, content: bytes, name: str) -> Image.Image:
        """The picture in the bytes of a file, the first of an animation; `ValueError` naming what is wrong with it."""
        if len(content) > self.largest_picture:
            raise ValueError(f"{name}: expected at most {self.largest_picture / 1e6:.1f} MB, found more")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(BytesIO(content), formats=FORMATS) as header:
                    size = header.size
        except Image.DecompressionBombError:
            size = (1, 1)  # too many pixels: open_image says so
        except DAMAGED as error:
            raise ValueError(f"{name}: expected an image ({', '.join(FORMATS)}), found something else") from error
        if min(size) < 1:
            raise ValueError(f"{name}: expected an image, found one of {size[0]} x {size[1]} pixels")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return open_image(content, name)
        except ValueError:
            raise
        except DAMAGED as error:
            raise ValueError(f"{name}: expected a whole image, found a damaged one") from error


def whole(value: object) -> int:
    """`value` as an integer, which 5 and 5.0 are; -1 where it is none, as `True`, 2.5, infinity and "5"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, float) and value.is_integer() else -1


def from_base64(text: object) -> bytes:
    """The bytes of base64 text, with or without the head of a data URI; `ValueError` if it is none."""
    if not isinstance(text, str):
        raise ValueError("image: expected the picture's file as base64 text")
    try:
        return base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image: expected the picture's file as base64, found other text ({error})") from error


class Rate:
    """Counts requests by client: a bucket of `rate` requests that fills at `rate` a minute."""

    def __init__(self, rate: int, now: Callable[[], float] = time.monotonic) -> None:
        self.rate = rate
        self._now = now
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def wait(self, client: str) -> float:
        """Counts a request of `client`: 0 if it may be served, else the seconds after which to come again."""
        with self._lock:
            now = self._now()
            left, since = self._left.pop(client, (float(self.rate), now))
            left = min(self.rate, left + (now - since) * self.rate / 60)
            served = left >= 1
            self._left[client] = (left - served, now)
            if len(self._left) > CLIENTS:
                self._left.popitem(last=False)
            return 0.0 if served else (1 - left) * 60 / self.rate


class Turn:
    """A lock that gives up: work that only one thread may do at a time, and that nobody waits for for ever."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Holds the lock; `ValueError` if it was not free in time."""
        if not self._lock.acquire(timeout=self.seconds):
            raise ValueError(f"Too busy: no turn within {self.seconds:g} seconds. Try again.")
        try:
            yield
        finally:
            self._lock.release()


class Workers:
    """Threads for work that is not waited for for ever. What was given up on cannot be stopped: it keeps its thread."""

    def __init__(self, seconds: float, threads: int = THREADS) -> None:
        self.seconds = seconds
        self._free = threading.BoundedSemaphore(threads)

    def __call__(self, work: Callable[[], Result]) -> Result:
        """What `work` returns or raises; `ValueError` if that takes too long, or no thread is free for as long."""
        if not self._free.acquire(timeout=self.seconds):
            raise ValueError(f"Too busy: no turn within {self.seconds:g} seconds. Try again.")
        done: Future[Result] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)
            finally:
                self._free.release()

        # a daemon: work that was given up on does not hold up the end of the process
        threading.Thread(target=run, daemon=True).start()
        if not wait([done], self.seconds).done:
            raise ValueError(f"Given up: the answer took longer than {self.seconds:g} seconds.")
        return done.result()
