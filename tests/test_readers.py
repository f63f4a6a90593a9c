"""Reading pictures and tables, damaged ones included."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_world import draw, png, rows, write_table

from feature_extraction.readers import MAX_PIXELS, open_image, read_split, read_table, split_path


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds almost no pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_opens_bytes_and_files_alike(tmp_path: Path) -> None:
    picture = draw("red", "circle", "flat")
    (tmp_path / "a.png").write_bytes(png(picture))
    for source in (png(picture), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(np.asarray(open_image(source, "a")), np.asarray(picture))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (5, 3)).save(out, "TIFF" if mode == "CMYK" else "PNG")
    assert (open_image(out.getvalue(), "x").mode, open_image(out.getvalue(), "x").size) == ("RGB", (5, 3))


def test_transparent_pixels_are_white() -> None:
    layer = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    layer.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(open_image(png(layer), "x")).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_exif_orientation_is_applied() -> None:
    picture, out = Image.new("RGB", (4, 2), "blue"), io.BytesIO()
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(out, "JPEG", exif=exif)
    assert open_image(out.getvalue(), "x").size == (2, 4)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg></svg>", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_image_is_refused_by_name(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"holiday\.png: expected an image"):
        open_image(content, "holiday.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_every_truncation_is_refused_or_whole(kind: str, rng: np.random.Generator) -> None:
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(out, kind)
    whole = out.getvalue()
    for cut in (len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4):
        with pytest.raises(ValueError, match=r"cut\.img: expected"):
            open_image(whole[:cut], "cut.img")


@pytest.mark.parametrize(("width", "height"), [(10_000, 5_001), (9_500, 9_500), (60_000, 60_000)])
def test_too_many_pixels_are_refused_before_decoding(width: int, height: int) -> None:
    with pytest.raises(ValueError, match=r"big\.png: expected at most 50 megapixels"):
        open_image(png_header(width, height), "big.png")


def test_exactly_fifty_megapixels_are_allowed() -> None:
    assert MAX_PIXELS == 50_000_000
    with pytest.raises(ValueError, match="truncated"):
        open_image(png_header(10_000, 5_000), "big.png")


def test_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.png: expected a file, found nothing"):
        open_image(tmp_path / "none.png")


def test_table_is_put_in_id_order(tmp_path: Path) -> None:
    table = rows(5)
    write_table(tmp_path / "t.parquet", [table[row] for row in (3, 0, 4, 1, 2)])
    read = read_table(tmp_path / "t.parquet")
    assert len(read) == 5
    assert [read.caption(row) for row in range(5)] == [entry["captions"][0] for entry in table]
    assert read.encoded == [entry["image"] for entry in table]
    assert (read.concepts[4], read.sets[4]) == (table[4]["concept"], table[4]["set"])
    assert read.image(2).size == (64, 64)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda table: table[1].update(id=7), "expected the ids 0..2"),
        (lambda table: table[1].update(id=0), "expected the ids 0..2"),
        (lambda table: table[1].update(captions=[]), "expected a caption for each image, found none for id 1"),
        (lambda table: [entry.pop("concept") for entry in table], "found no concept"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, change, complaint: str) -> None:
    table = rows(3)
    change(table)
    write_table(tmp_path / "t.parquet", table)
    with pytest.raises(ValueError, match=rf"t\.parquet: .*{complaint}"):
        read_table(tmp_path / "t.parquet")


def test_damaged_table_and_damaged_picture_are_named(tmp_path: Path) -> None:
    table = rows(3)
    table[2]["image"] = table[2]["image"][:60]
    path = tmp_path / "t.parquet"
    write_table(path, table)
    read = read_table(path)
    with pytest.raises(ValueError, match=r"t\.parquet, id 2: expected"):
        read.image(2)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PAR1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t\.parquet: expected a whole Parquet file"):
            read_table(path)


def test_missing_split_names_its_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"query_val/queries\.parquet: .*python -m abu\.sample"):
        read_split(tmp_path, "val_query")
    with pytest.raises(ValueError, match=r"emoji\.parquet: .*feature_extraction\.emoji --mode emoji-mini"):
        read_split(tmp_path / "emoji-mini", "data")
    with pytest.raises(ValueError, match="split 'validation'"):
        split_path(tmp_path, "validation")
