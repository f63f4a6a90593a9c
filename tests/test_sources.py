"""Sources of pictures: the order of rows, captions, what is damaged, and what changes the fingerprint."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_world import png, rows

from feature_extraction.archives import TarPictures
from feature_extraction.sources import FileTable, Pictures, open_source, read_coco, read_query_folder

TABLE = rows(6)
PNGS = [entry["image"] for entry in TABLE]


def same_pictures(source: Pictures, expected: list[bytes]) -> bool:
    return [png(source.image(row)) for row in range(len(source))] == expected


def write_tar(path: Path, members: list[tuple[str, bytes]], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def img2dataset(folder: Path) -> None:
    """Two shards as img2dataset writes them: picture, caption and record of a sample; beside them the records alone."""
    for shard in range(2):
        members = []
        for row in range(3 * shard, 3 * shard + 3):
            key = f"{shard:05d}{row:04d}"
            record = {"caption": f"caption {row}", "key": key, "url": f"https://x/{row}"}
            members += [(f"{key}.png", PNGS[row]), (f"{key}.txt", f"caption {row}".encode())]
            members += [(f"{key}.json", json.dumps(record).encode())]
        write_tar(folder / f"{shard:05d}.tar", members)
        pq.write_table(pa.table({"key": ["a"], "caption": ["b"]}), folder / f"{shard:05d}.parquet")


def write_coco(folder: Path, images: list[dict], annotations: list[dict]) -> Path:
    path = folder / "annotations" / "captions_val2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    (folder / "val2017").mkdir(exist_ok=True)
    for row, image in enumerate(images):
        (folder / "val2017" / image["file_name"]).write_bytes(PNGS[row])
    return path


COCO_IMAGES = [{"id": 9, "file_name": "9.png"}, {"id": 2, "file_name": "2.png"}, {"id": 5, "file_name": "5.png"}]
COCO_CAPTIONS = [{"image_id": name, "caption": text} for name, text in ((2, "b"), (9, "a"), (2, "B"), (77, "of none"))]


def test_coco_keeps_the_order_of_the_images(tmp_path: Path) -> None:
    source = open_source(write_coco(tmp_path, COCO_IMAGES, COCO_CAPTIONS))
    assert list(source.keys) == ["9", "2", "5"]
    assert list(source.captions) == [["a"], ["b", "B"], []]
    assert [source.caption(row) for row in range(3)] == ["a", "b", ""]
    assert same_pictures(source, PNGS[:3])


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (b"{", "expected JSON"),
        (b"\xff\xfe\xff", "expected JSON"),
        (b"[]", "expected COCO captions"),
        (b'{"images": []}', "expected COCO captions"),
        (b'{"images": [{"id": 1}], "annotations": []}', "expected COCO captions .* found no 'file_name'"),
        (json.dumps({"images": COCO_IMAGES * 2, "annotations": []}).encode(), "each image id once, found 3 repeated"),
    ],
)
def test_other_documents_are_refused(tmp_path: Path, document: bytes, complaint: str) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(document)
    with pytest.raises(ValueError, match=rf"captions\.json: .*{complaint}"):
        read_coco(path, tmp_path)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_folder_with_metadata(tmp_path: Path, kind: str) -> None:
    entries = [{"file_name": f"sub/{row}.png", "text": f"line, {row}"} for row in (2, 0, 1)]
    (tmp_path / "sub").mkdir()
    for row in range(3):
        (tmp_path / "sub" / f"{row}.png").write_bytes(PNGS[row])
    with open(tmp_path / f"metadata.{kind}", "w", newline="") as handle:
        if kind == "csv":
            writer = csv.DictWriter(handle, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(entries)
        else:
            handle.write("\n".join(map(json.dumps, entries)) + "\n\n")
    source = open_source(tmp_path)
    assert list(source.keys) == ["sub/2.png", "sub/0.png", "sub/1.png"]
    assert [source.caption(row) for row in range(3)] == ["line, 2", "line, 0", "line, 1"]
    assert same_pictures(source, [PNGS[2], PNGS[0], PNGS[1]])
    (tmp_path / "sub" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"sub/0\.png: expected a file, found nothing"):
        source.image(1)


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("metadata.jsonl", '{"file_name": "a"}\n{"file', 2),
        ("metadata.jsonl", "[]", 1),
        ("metadata.csv", "name,text\na,b\n", 2),
        ("metadata.csv", "file_name,text\na,b\n,c\n", 3),
        ("metadata.csv", f"file_name,text\na,b\nc,{'x' * 131_073}\n", 3),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, name: str, text: str, line: int) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}, line {line}: expected"):
        open_source(tmp_path)


def test_lists_of_captions_are_kept(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a", "captions": ["x", "y"]}\n{"file_name": "b"}\n')
    assert list(open_source(tmp_path).captions) == [["x", "y"], []]


def test_query_folder_counts_like_its_captions(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for row in range(3):
        (tmp_path / "images" / f"{row}.png").write_bytes(PNGS[row])
    (tmp_path / "captions.txt").write_text("one\u2028line\ntwo\nthree")
    source = read_query_folder(tmp_path)
    assert list(source.captions) == [["one\u2028line"], ["two"], ["three"]]
    assert same_pictures(source, PNGS[:3])
    (tmp_path / "captions.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"captions\.txt: expected a line for each of the 3 pictures .* found 2"):
        read_query_folder(tmp_path)


def test_parquet_by_files_and_row_groups(tmp_path: Path) -> None:
    for name, start in (("b", 4), ("a", 0)):
        count = 4 if name == "a" else 2
        column = [{"bytes": PNGS[row], "path": f"{row}.png"} for row in range(start, start + count)]
        captions = [[f"caption {row}"] for row in range(start, start + count)]
        pq.write_table(
            pa.table({"image": column, "captions": captions}), tmp_path / f"{name}.parquet", row_group_size=3
        )
    source = open_source(tmp_path)
    assert [source.caption(row) for row in range(6)] == [f"caption {row}" for row in range(6)]
    assert same_pictures(source, PNGS)
    assert [png(source.image(row)) for row in (5, 0, 4, 3)] == [PNGS[row] for row in (5, 0, 4, 3)]


def test_parquet_by_id(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"jpg": PNGS[:3], "id": [2, 0, 1], "url": ["c", "a", "b"]}), path)
    assert same_pictures(open_source(path), [PNGS[1], PNGS[2], PNGS[0]])
    pq.write_table(pa.table({"jpg": PNGS[:3], "id": [20, 0, 10]}), path)
    assert same_pictures(open_source(path), PNGS[:3]), "other ids are names, not places"
    assert list(open_source(path).keys) == ["20", "0", "10"]


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": [PNGS[0], None, PNGS[2][:50]]}), path)
    source = open_source(path)
    for row, complaint in ((1, "id 1: expected the bytes of an image, found none"), (2, "id 2: expected")):
        with pytest.raises(ValueError, match=rf"t\.parquet, {complaint}"):
            source.image(row)
    pq.write_table(pa.table({"image": ["no bytes"], "text": ["x"]}), path)
    with pytest.raises(ValueError, match=r"t\.parquet: expected a column of encoded pictures .* found image, text"):
        open_source(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.parquet: expected a whole Parquet file"):
        open_source(path)


def test_img2dataset_shards(tmp_path: Path) -> None:
    img2dataset(tmp_path)
    source = open_source(tmp_path)
    assert isinstance(source, TarPictures), "the Parquet files beside the shards hold no pictures"
    assert [source.caption(row) for row in range(6)] == [f"caption {row}" for row in range(6)]
    assert source.captions[1:3] == [["caption 1"], ["caption 2"]] and len(source.captions) == 6
    assert source.keys[4] == "000010004"
    assert same_pictures(source, PNGS)
    assert same_pictures(open_source(tmp_path / "00001.tar"), PNGS[3:])


def test_samples_keep_their_places(tmp_path: Path) -> None:
    """Folders count in the name, a sample may lack its picture, members may come in any order, captions from JSON."""
    members = [
        ("x/1.txt", b"one"),
        ("y/1.JPG", PNGS[1]),
        ("x/1.png", PNGS[0]),
        ("z.txt", b"no picture"),
        ("w.v.png", b"another kind of member"),
        ("y/1.json", b'{"text": "from json"}'),
        ("v.webp", b"damaged"),
        ("v.json", b"{"),
    ]
    write_tar(tmp_path / "t.tar", members)
    source = open_source(tmp_path / "t.tar")
    assert list(source.keys) == ["x/1", "y/1", "z", "w", "v"]
    assert [source.caption(row) for row in range(3)] == ["one", "from json", "no picture"]
    assert [png(source.image(row)) for row in (1, 0)] == [PNGS[1], PNGS[0]]
    for row, key in ((2, "z"), (3, "w"), (4, "v")):
        with pytest.raises(ValueError, match=rf"t\.tar, id {row} \({key}\): expected an image"):
            source.image(row)
    with pytest.raises(ValueError, match=r"id 4 \(v\): expected a JSON record"):
        source.caption(4)


def test_damaged_tars_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    write_tar(path, [("a.png", PNGS[0]), ("b.png", PNGS[1])])
    whole = path.read_bytes()
    boundary = 512 + -(-len(PNGS[0]) // 512) * 512
    for content in (whole[:boundary], whole[: boundary + 300], whole[: boundary + 600], whole[:100], b"", b"x" * 2000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.tar: expected a whole uncompressed tar file"):
            open_source(path)
    write_tar(path, [("a.png", PNGS[0])], "w:gz")
    with pytest.raises(ValueError, match=r"t\.tar: expected a whole uncompressed tar file"):
        open_source(path)
    write_tar(path, [("a.png", PNGS[0]), ("a.jpg", PNGS[1])])
    with pytest.raises(ValueError, match=r"t\.tar: expected one image for each sample, found two of a"):
        open_source(path)


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    path = write_coco(tmp_path, COCO_IMAGES, COCO_CAPTIONS)
    img2dataset(tmp_path / "tars")
    pq.write_table(pa.table({"image": PNGS[:3], "text": ["a", "b", "c"]}), tmp_path / "t.parquet")

    def fingerprints() -> list[str]:
        return [open_source(place).fingerprint for place in (path, tmp_path / "tars", tmp_path / "t.parquet")]

    before = fingerprints()
    assert fingerprints() == before
    (tmp_path / "val2017" / "2.png").write_bytes(PNGS[1] + b"\0")
    with tarfile.open(tmp_path / "tars" / "00001.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("z.txt"))
    pq.write_table(pa.table({"image": PNGS[:3], "text": ["a", "b", "d"]}), tmp_path / "t.parquet")
    assert all(np.array(fingerprints()) != np.array(before))


@pytest.mark.parametrize("name", ["", "nothing", "x.parquet", "x.tar", "x.json"])
def test_what_is_supported_is_said(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        open_source(tmp_path / name)


def test_files_are_read_when_asked_for(tmp_path: Path) -> None:
    table = FileTable(tmp_path / "list", tmp_path, ["late.png"], ["late"], [["x"]])
    (tmp_path / "late.png").write_bytes(PNGS[0])
    assert same_pictures(table, PNGS[:1])
