"""The file of pictures of retrained models: written, read, refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from demo_world import retrained

from serving.page import show_retrained
from serving.retrained import KEYS, Retrained


def test_what_is_written_is_read(tmp_path: Path) -> None:
    kept = retrained()
    kept.save(tmp_path / "pictures.npz")
    found = Retrained.load(tmp_path / "pictures.npz")
    assert found.captions == kept.captions
    np.testing.assert_array_equal(found.references, kept.references)
    for one, other in zip(found.removals, kept.removals, strict=True):
        assert (one.query, one.method, one.removed, one.change) == (
            other.query,
            other.method,
            other.removed,
            other.change,
        )
        np.testing.assert_array_equal(one.picture, other.picture)


def test_queries_without_removals_are_kept(tmp_path: Path) -> None:
    Retrained(("a",), np.zeros((1, 4, 4, 3), np.uint8), ()).save(tmp_path / "pictures.npz")
    assert Retrained.load(tmp_path / "pictures.npz").of(0) == []


def test_removals_are_shown_by_their_number_and_captions_are_text() -> None:
    kept = retrained()
    assert [(one.removed, one.method) for one in kept.of(1)] == [(2, "tuned"), (2, "untuned"), (9, "tuned")]
    shown = show_retrained(kept, 2)
    assert "&lt;b&gt;dog&lt;/b&gt;" in shown and "<b>" not in shown
    assert "without 9 images" in shown and "loss +0.0300" in shown


def changed(path: Path, **changes: np.ndarray) -> Path:
    retrained().save(path)
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in KEYS}
    np.savez(path, **arrays | changes)
    return path


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"queries": np.array([0, 1, 2, 3])}, "expected queries 0 to 2, found 3"),
        ({"changes": np.array([0.1, np.nan, 0.2, 0.3])}, "tuned: expected a picture"),
        ({"removed": np.array([1, 1, 1])}, "expected columns of one length, found [4, 4, 3, 4, 4]"),
        ({"pictures": np.zeros((4, 5, 6, 3), np.uint8)}, "expected a picture [6, 6, 3]"),
        ({"pictures": np.zeros((4, 6, 6, 3))}, "expected another type of numbers in pictures, found float64"),
        ({"references": np.zeros((2, 6, 6, 3), np.uint8)}, "expected pictures [3, P, P, 3], found [2, 6, 6, 3]"),
        ({"captions": np.array([b"a", b"b", b"c"])}, "expected another type of numbers in captions"),
    ],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, changes: dict, complaint: str) -> None:
    path = changed(tmp_path / "pictures.npz", **changes)
    with pytest.raises(ValueError) as caught:
        Retrained.load(path)
    assert str(path) in str(caught.value) and complaint in str(caught.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = changed(tmp_path / "pictures.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"expected a whole \.npz archive"):
        Retrained.load(path)
    with pytest.raises(ValueError, match=r"make it with: python -m benchmark\.removal report"):
        Retrained.load(tmp_path / "none.npz")
    np.savez(path, captions=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="expected"):
        Retrained.load(path)
