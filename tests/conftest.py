"""Fixtures that several test modules share. No test reaches a model hub."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MPLBACKEND"] = "Agg"
# Ray binds to the loopback address only if this is set before it is imported.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture
def disk_limit() -> Callable[[int], AbstractContextManager[None]]:
    """`with disk_limit(n):` makes the system refuse to let any file of this process grow beyond n bytes.

    The write fails inside the kernel, as it does on a full disk, after a part of the file has been written.
    """

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def files_in() -> Callable[[Path], list[str]]:
    """A function that names everything in a folder, hidden temporary files included."""
    return lambda folder: sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
