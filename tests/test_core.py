"""fastgda.core: whole files or none, manifests that notice differences, damaged arrays, keyed noise, exit statuses."""

from __future__ import annotations

import argparse
import json
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgda import core


@dataclass(frozen=True)
class Settings:
    """A stage's configuration, as the stages of the project have."""

    pixels: int = 64
    sizes: tuple[int, ...] = (3, 4)
    folder: Path = core.ROOT / "data" / "emoji"


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.npy": lambda path: core.save_npy(path, np.zeros(50_000)),
    "a.npz": lambda path: core.save_npz(path, noise=np.random.default_rng(0).random(50_000)),
    "a.json": lambda path: core.save_json(path, list(range(50_000))),
}


# --- writing


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_keeps_the_old_file_and_leaves_no_part_of_the_new(tmp_path, disk_limit, files_in, name):
    (tmp_path / name).write_bytes(b"the old file")
    with disk_limit(4096), pytest.raises(OSError, match=rf"/{name}: expected to write the whole file, found: "):
        WRITERS[name](tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"the old file"
    assert files_in(tmp_path) == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_leaves_nothing_where_nothing_was(tmp_path, disk_limit, files_in, name):
    with disk_limit(4096), pytest.raises(OSError, match=r"\S"):
        WRITERS[name](tmp_path / name)
    assert files_in(tmp_path) == []


def test_interrupted_write_leaves_nothing(tmp_path, files_in):
    with pytest.raises(KeyboardInterrupt), core.atomic_path(tmp_path / "deep" / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert files_in(tmp_path) == ["deep"]


def test_written_file_is_as_readable_as_any_other(tmp_path):
    umask = os.umask(0o027)
    try:
        core.save_json(tmp_path / "a.json", {})
    finally:
        os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_temporary_file_keeps_the_suffix_that_writers_look_at(tmp_path):
    with core.atomic_path(tmp_path / "a.npy") as temporary:
        np.save(temporary, np.arange(3))
    assert core.load_npy(tmp_path / "a.npy").tolist() == [0, 1, 2]


def test_json_writes_numpy_values_and_repository_paths(tmp_path):
    core.save_json(tmp_path / "a.json", {"n": np.int64(3), "v": np.arange(2), "p": core.ROOT / "weights" / "a.pth"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"n": 3, "v": [0, 1], "p": "weights/a.pth"}


def test_json_refuses_what_it_cannot_write(tmp_path, files_in):
    with pytest.raises(TypeError, match="Tensor does not go into JSON"):
        core.save_json(tmp_path / "a.json", {"t": torch.zeros(2)})
    assert files_in(tmp_path) == []


# --- reading arrays


def test_arrays_come_back_as_written(tmp_path):
    rank = np.arange(12, dtype=np.int16).reshape(3, 4)
    score = np.linspace(0, 1, 12).astype(np.float16)
    core.save_npz(tmp_path / "a.npz", rank=rank, score=score)
    core.save_npy(tmp_path / "a.npy", rank)
    archive = core.load_npz(tmp_path / "a.npz", ("rank", "score"))
    np.testing.assert_array_equal(archive["rank"], rank)
    np.testing.assert_array_equal(archive["score"], score)
    assert archive["rank"].dtype == np.int16
    mapped = core.load_npy(tmp_path / "a.npy", (None, 4), mmap=True)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, rank)


def test_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(ValueError, match=r"a\.npy: expected a file, found nothing; make it with: python -m x"):
        core.load_npy(tmp_path / "a.npy", made_by="python -m x")
    with pytest.raises(ValueError, match="expected a file, found a folder"):
        core.load_npz(tmp_path, ("rank",))


def test_shape_names_what_was_expected_and_found(tmp_path):
    core.save_npy(tmp_path / "a.npy", np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"a\.npy: expected shape \[\*, 4\], found \[3, 5\]"):
        core.load_npy(tmp_path / "a.npy", (None, 4))
    with pytest.raises(ValueError, match=r"expected shape \[3\], found \[3, 5\]"):
        core.load_npy(tmp_path / "a.npy", (3,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_finite_names_the_first_bad_row(tmp_path, bad):
    array = np.zeros((5, 2), np.float32)
    array[3, 1] = bad
    core.save_npy(tmp_path / "a.npy", array)
    assert core.load_npy(tmp_path / "a.npy").shape == (5, 2)
    with pytest.raises(ValueError, match=r"found NaN or infinity \(first in row 3\)"):
        core.load_npy(tmp_path / "a.npy", finite=True)


def test_every_truncation_is_noticed(tmp_path):
    core.save_npz(tmp_path / "a.npz", rank=np.arange(40))
    core.save_npy(tmp_path / "a.npy", np.arange(40))
    for name, load in (("a.npz", lambda path: core.load_npz(path, ("rank",))), ("a.npy", core.load_npy)):
        whole = (tmp_path / name).read_bytes()
        cut = tmp_path / f"cut-{name}"
        for size in range(len(whole)):
            cut.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=f"cut-{name}: expected a whole"):
                load(cut)


def test_finite_takes_no_memory_of_the_size_of_the_file(tmp_path):
    core.save_npy(tmp_path / "a.npy", np.ones((100_000, 300), dtype=np.float16))
    tracemalloc.start()
    core.load_npy(tmp_path / "a.npy", (None, 300), finite=True, mmap=True)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6e6, "a mask of all numbers takes 30 MB"


@pytest.mark.parametrize("shape", [(9,), (9, 2), (9, 2, 3), (0, 4), (4, 0)])
def test_rows_that_are_not_finite(shape, monkeypatch):
    """Against a mask of the whole array, in blocks that end anywhere."""
    monkeypatch.setattr(core, "FINITE_BLOCK", 5)
    array = np.ones(shape)
    if array.size:
        array.ravel()[[3, -1]] = np.inf, np.nan
    expected = [row for row in range(len(array)) if not np.isfinite(array[row]).all()]
    assert list(core.rows_not_finite(array)) == expected


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_no_changed_byte_raises_anything_but_value_error(tmp_path, flip):
    """Content may change unnoticed in an .npy (its manifest's hash tells); what is noticed names the file."""
    core.save_npz(tmp_path / "a.npz", rank=np.arange(40, dtype=np.int16).reshape(4, 10))
    core.save_npy(tmp_path / "a.npy", np.arange(12, dtype=np.float32))
    noticed = 0
    for name, load in (("a.npz", lambda path: core.load_npz(path, ("rank",))), ("a.npy", core.load_npy)):
        whole, damaged = (tmp_path / name).read_bytes(), tmp_path / f"damaged-{name}"
        for place in range(len(whole)):
            damaged.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                load(damaged)
            except ValueError as error:
                assert f"damaged-{name}: expected" in str(error)
                noticed += 1
    assert noticed > 100


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "a.npz", rank=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npy: expected"):
        core.load_npy(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npz: expected"):
        core.load_npz(tmp_path / "a.npz", ("rank",))


def test_archive_under_the_name_of_an_array_is_refused(tmp_path):
    core.save_npz(tmp_path / "a.npz", rank=np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"a\.npy: expected a \.npy array, found an archive"):
        core.load_npy(tmp_path / "a.npy")


def test_missing_array_is_named(tmp_path):
    core.save_npz(tmp_path / "a.npz", rank=np.arange(3))
    with pytest.raises(ValueError, match=r"a\.npz: expected arrays \['rank', 'score'\], found \['rank'\]"):
        core.load_npz(tmp_path / "a.npz", ("rank", "score"))


# --- manifests


def written(folder: Path) -> Path:
    """An array file with its manifest."""
    core.save_npy(folder / "a.npy", np.arange(10))
    core.write_manifest(folder / "a.npy", Settings(), command="make a", inputs={"lock": "12ab"}, note="kept")
    return folder / "a.npy"


def test_equal_configuration_is_reused_and_the_rest_recorded(tmp_path):
    artifact = written(tmp_path)
    assert core.manifest_difference(artifact, Settings(), {"lock": "12ab"}) is None
    manifest = core.verify_artifact(artifact)
    assert manifest["config"] == {"pixels": 64, "sizes": [3, 4], "folder": "data/emoji"}
    assert manifest["command"] == "make a"
    assert manifest["note"] == "kept"
    assert manifest["files"]["a.npy"]["bytes"] == artifact.stat().st_size
    assert manifest["environment"]["packages"]["torch"] == torch.__version__.split("+")[0]


def test_differences_are_told_in_words(tmp_path):
    artifact = written(tmp_path)
    inputs = {"lock": "12ab"}
    assert core.manifest_difference(artifact, Settings(32), inputs) == "config.pixels is 64, wanted 32"
    assert core.manifest_difference(artifact, Settings(), {"lock": "ffff"}) == "inputs.lock is '12ab', wanted 'ffff'"
    assert core.manifest_difference(artifact, Settings(), {}) == "inputs.lock is '12ab', wanted None"
    artifact.write_bytes(artifact.read_bytes()[:-1])
    assert "the manifest says" in str(core.manifest_difference(artifact, Settings(), inputs))
    core.manifest_path(artifact).unlink()
    assert str(core.manifest_difference(artifact, Settings(), inputs)).endswith("a.npy.manifest.json does not exist")
    artifact.unlink()
    assert str(core.manifest_difference(artifact, Settings(), inputs)).endswith("a.npy does not exist")


def test_folder_holds_its_manifest(tmp_path):
    folder = tmp_path / "out"
    core.save_json(folder / "a.json", [1])
    core.write_manifest(folder, {"seed": 0}, command="make out", files=(folder / "a.json",))
    assert core.manifest_path(folder) == folder / "manifest.json"
    assert core.manifest_difference(folder, {"seed": 0}) is None
    (folder / "a.json").unlink()
    assert "a.json has None bytes" in str(core.manifest_difference(folder, {"seed": 0}))


def test_one_changed_byte_is_noticed_by_the_hash(tmp_path):
    artifact = written(tmp_path)
    damaged = bytearray(artifact.read_bytes())
    damaged[-1] ^= 1
    artifact.write_bytes(damaged)
    assert core.manifest_difference(artifact, Settings(), {"lock": "12ab"}) is None, "same size: only the hash can tell"
    with pytest.raises(ValueError, match=r"a\.npy: expected SHA-256 .* found .*damaged, or made by another run"):
        core.verify_artifact(artifact)


@pytest.mark.parametrize(
    ("text", "found"),
    [(b'{"config": ', "damaged file"), (b"\xff\xfe", "damaged file"), (b"[]", "another JSON"), (b"{}", "another JSON")],
)
def test_damaged_manifest_is_named(tmp_path, text, found):
    artifact = written(tmp_path)
    core.manifest_path(artifact).write_bytes(text)
    with pytest.raises(ValueError, match=rf"a\.npy\.manifest\.json: expected .*{found}"):
        core.read_manifest(artifact)


def test_manifest_does_not_tell_where_the_repository_lies(tmp_path):
    text = core.manifest_path(written(tmp_path)).read_text()
    assert str(core.ROOT) not in text
    assert str(tmp_path) not in text


# --- keyed randomness


def test_noise_depends_on_the_key_alone():
    keys = [("train", 0, example, timestep) for example in range(4) for timestep in (1, 500)]
    forward = {key: torch.randn(3, generator=core.keyed_generator(*key)) for key in keys}
    backward = {key: torch.randn(3, generator=core.keyed_generator(*key)) for key in reversed(keys)}
    assert all(torch.equal(forward[key], backward[key]) for key in keys)
    assert len({tuple(noise.tolist()) for noise in forward.values()}) == len(keys)


def test_keys_do_not_run_into_each_other():
    seeds = {core.keyed_generator(*key).initial_seed() for key in ((1, 23), (12, 3), (123,), ("a", 1, 23))}
    assert len(seeds) == 4


def test_noise_is_the_same_on_every_machine():
    """Stored queries name seeds: they could not be made again if the key's meaning changed."""
    assert core.keyed_generator("train", 0, 7).initial_seed() == 8116080363878786717


# --- the frame of every command


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (ValueError("a.npy: expected\n  3 rows"), 2, "error: a.npy: expected 3 rows\n"),
        (OSError(28, "No space left on device", "a.npy"), 2, "error: [Errno 28] No space left on device: 'a.npy'\n"),
        (KeyboardInterrupt(), 130, "interrupted; start the same command again to go on from here\n"),
    ],
)
def test_what_a_user_can_cause_is_one_line(capsys, raised, status, line):
    @core.command_line
    def main(argv):
        raise raised

    assert main([]) == status
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("spelled", ["--dry_run", "--dry-run"])
def test_options_may_be_spelled_with_dashes(spelled):
    top = core.command_parser("x", "y")
    commands = top.add_subparsers()
    sub = commands.add_parser("build")
    for parser in (top, sub):
        parser.add_argument("--dry_run", action="store_true")
        parser.add_argument("--feature_dir", default="")
        parser.add_argument("--is_odd", action=argparse.BooleanOptionalAction)
    sub.add_argument("words", nargs="*")
    assert top.parse_args([spelled]).dry_run
    found = top.parse_args(["build", spelled, "--feature-dir=a-b", "--no-is-odd", "c-d", "--", "--e-f"])
    assert found.dry_run and found.is_odd is False
    assert (found.feature_dir, found.words) == ("a-b", ["c-d", "--e-f"])
    assert sub.parse_args(["--is-odd", "--feature-dir", "g-h"]).feature_dir == "g-h"


@pytest.mark.parametrize("words", [["--dry"], ["build", "--dry"]])
def test_options_are_not_abbreviated(words, capsys):
    top = core.command_parser("x", "y")
    for parser in (top, top.add_subparsers().add_parser("build")):
        parser.add_argument("--dry_run", action="store_true")
    with pytest.raises(SystemExit) as stopped:
        top.parse_args(words)
    assert stopped.value.code == 2 and "unrecognized arguments: --dry" in capsys.readouterr().err


def test_status_of_success_and_what_only_a_bug_causes():
    @core.command_line
    def main(argv):
        assert argv is None
        return 3

    @core.command_line
    def quiet(argv):
        assert argv == ["--flag"]

    assert main() == 3
    assert quiet(["--flag"]) == 0
    with pytest.raises(AssertionError):
        quiet([])
