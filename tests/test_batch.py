"""The batch command writes what single attributions say, goes on after an interruption and mixes no results."""

from __future__ import annotations

import json
import shutil
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_world import draw, png, write_bundle

from serving import Attributor, batch

PICTURES = [draw(colour, shape, "flat") for colour in ("red", "blue", "black") for shape in ("circle", "square")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("world") / "emoji")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures with prompts, the third of them damaged."""
    path = tmp_path / "generated"
    path.mkdir()
    lines = []
    for number, picture in enumerate(PICTURES):
        (path / f"{number}.png").write_bytes(b"damaged" if number == 2 else png(picture))
        lines.append(json.dumps({"file_name": f"{number}.png", "caption": f"prompt {number}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def run(bundle: Path, source: Path, out: Path, *more: str) -> int:
    return batch.main([str(bundle), str(source), "--out", str(out), "--k", "5", "--max_corrupt", "0.2", *more])


def read(out: Path, name: str = "attributions") -> list[dict]:
    return [row for file in sorted(out.glob(f"{name}-*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_rows_are_single_attributions(bundle: Path, folder: Path, tmp_path: Path) -> None:
    assert run(bundle, folder, tmp_path / "out", "--part_rows", "4") == 0
    attributor, table = Attributor.from_pretrained(bundle), read(tmp_path / "out")
    assert len(table) == 5 * 5 and {row["query"] for row in table} == {0, 1, 3, 4, 5}
    for number in (0, 5):
        mine = [row for row in table if row["query"] == number]
        found = attributor.attribute(PICTURES[number], f"prompt {number}", 5)
        assert [row["id"] for row in mine] == found.ids.tolist() and [row["place"] for row in mine] == [1, 2, 3, 4, 5]
        assert np.allclose([row["score"] for row in mine], found.scores, atol=1e-6)
        assert [row["caption"] for row in mine] == [(known or {})["caption"] for known in found.metadata]
        assert {row["prompt"] for row in mine} == {f"prompt {number}"} and mine[0]["key"] == f"{number}.png"
    shares = [row for row in read(tmp_path / "out", "shares") if row["query"] == 0]
    ten = attributor.attribute(PICTURES[0], "prompt 0", 10)
    rule = attributor.bundle.credit
    assert rule is not None
    expected = rule.shares(ten.scores, [(known or {})["creator"] for known in ten.metadata])
    assert [(row["creator"], row["share"], row["high"]) for row in shares] == [
        (share.creator, share.share, share.high) for share in expected
    ]
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["id"] for entry in skipped] == [2] and "2.png" in skipped[0]["reason"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["images"] == 6 and manifest["skipped"] == 1 and len(manifest["files"]) == 4


def test_interrupted_command_goes_on(
    bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(bundle, folder, tmp_path / "whole", "--part_rows", "2") == 0
    original, calls = batch.write_part, []

    def interrupted(attributor, pictures, rows, *rest):
        calls.append(rows.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(attributor, pictures, rows, *rest)

    monkeypatch.setattr(batch, "write_part", interrupted)
    out = tmp_path / "out"
    assert run(bundle, folder, out, "--part_rows", "2") == 130
    assert not (out / "manifest.json").exists()
    assert run(bundle, folder, out, "--part_rows", "2") == 0
    assert calls == [0, 2, 2, 4]
    assert read(out) == read(tmp_path / "whole") and read(out, "shares") == read(tmp_path / "whole", "shares")
    assert (out / "skipped.json").read_text() == (tmp_path / "whole" / "skipped.json").read_text()


def test_results_of_other_work_are_not_mixed(bundle: Path, folder: Path, tmp_path: Path, capsys) -> None:
    own = shutil.copytree(bundle, tmp_path / "own")
    assert run(own, folder, tmp_path / "out") == 0
    assert batch.main([str(own), str(folder), "--out", str(tmp_path / "out"), "--k", "3", "--max_corrupt", "1"]) == 2
    assert "choose another --out" in capsys.readouterr().err
    Attributor.from_pretrained(own).bundle.index.remove(np.array([0]), command="opt-out")
    assert run(own, folder, tmp_path / "out") == 2


@pytest.mark.parametrize("part", [0, 2, 4])
def test_an_image_removed_while_parts_are_written_ends_the_command(
    bundle: Path, folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """Whichever part it is, the last one too: parts of before and after are not passed off as one result."""
    own, original = shutil.copytree(bundle, tmp_path / "own"), batch.write_part

    def removed_after(attributor, pictures, rows, *rest):
        done = original(attributor, pictures, rows, *rest)
        if rows.start == part:
            attributor.bundle.index.remove(np.array([0]), command="opt-out")
        return done

    monkeypatch.setattr(batch, "write_part", removed_after)
    assert run(own, folder, tmp_path / "out", "--part_rows", "2") == 2
    assert "expected the index as it was at the beginning" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_webdataset_and_dry_run(bundle: Path, tmp_path: Path, capsys) -> None:
    with tarfile.open(tmp_path / "generated.tar", "w") as archive:
        for name, content in (("a.png", png(PICTURES[0])), ("a.txt", b"prompt 0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    assert run(bundle, tmp_path / "generated.tar", tmp_path / "out", "--dry_run") == 0
    assert "1 pictures, 5 rows, about" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert run(bundle, tmp_path / "generated.tar", tmp_path / "out") == 0
    assert [row["key"] for row in read(tmp_path / "out")] == ["a"] * 5


def test_mistakes_are_named(bundle: Path, folder: Path, tmp_path: Path, capsys) -> None:
    assert batch.main([str(bundle), str(folder), "--out", str(tmp_path / "out"), "--k", "36"]) == 2
    assert "--k 36: expected at most 35" in capsys.readouterr().err
    assert batch.main([str(bundle), str(folder), "--out", str(tmp_path / "out"), "--k", "0"]) == 2
    assert batch.main([str(bundle), str(folder), "--out", str(tmp_path / "out"), "--k", "3"]) == 2
    assert "at most 1.00% unreadable pictures (--max_corrupt), found 1 of 6" in capsys.readouterr().err


def test_a_damaged_caption_costs_its_picture_alone(bundle: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number, picture in enumerate(PICTURES):
            record = b"{" if number == 2 else json.dumps({"caption": f"prompt {number}"}).encode()
            for name, content in ((f"{number}.png", png(picture)), (f"{number}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, BytesIO(content))
    assert run(bundle, tmp_path / "shard.tar", tmp_path / "out") == 0
    assert {row["query"] for row in read(tmp_path / "out")} == {0, 1, 3, 4, 5}
    (skipped,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert skipped["id"] == 2 and "expected a JSON record" in skipped["reason"]
