"""The one-page report: HTML and JSON say what the attributor says, and whatever a prompt holds stays text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_world import build_bundle, draw, png, write_bundle

from fastgda.core import sha256_file
from fastgda.credit import Credit
from fastgda.magnitude import Magnitude
from serving import Attributor, report


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "emoji"
    write_bundle(folder)
    (folder / "x.png").write_bytes(png(draw("red", "circle", "flat")))
    return folder


def run(data: Path, out: Path, *more: str, prompt: str = "red circle", bundle: str = "bundle") -> int:
    flags = ["--prompt", prompt, "--out", str(out), "--k", "4"]
    return report.main([str(data / bundle), str(data / "x.png"), *flags, *more])


def test_report_says_what_the_attributor_says(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "r.html", "--images", str(data / "trainset" / "emoji.parquet")) == 0
    attributor = Attributor.from_pretrained(data / "bundle")
    found = attributor.attribute(data / "x.png", "red circle", 10)
    told, page = json.loads((tmp_path / "r.json").read_text()), (tmp_path / "r.html").read_text()
    assert [entry["id"] for entry in told["images"]] == found.ids[:4].tolist()
    assert [entry["caption"] for entry in told["images"]] == [(known or {})["caption"] for known in found.metadata[:4]]
    rule = attributor.bundle.credit
    assert rule is not None
    expected = rule.shares(found.scores, [(known or {})["creator"] for known in found.metadata])
    assert [(share["creator"], share["share"]) for share in told["shares"]] == [(s.creator, s.share) for s in expected]
    assert told["method"]["ranker"] == attributor.bundle.ranker_id and told["method"]["training_images"] == 35
    assert len(re.findall("<img", page)) == 5 and all(f"id {name}<" in page for name in found.ids[:4])
    for part in (attributor.bundle.ranker_id, "Caveats", "look-alikes", f"{expected[0].share:.0%}", "CC0-1.0"):
        assert part in page
    assert not re.search(r'(?:src|href)="(?!data:)', page), "needs no other file"
    assert str(data) not in page and str(data) not in (tmp_path / "r.json").read_text()


def test_markup_in_a_prompt_is_text(data: Path, tmp_path: Path) -> None:
    assert run(data, tmp_path / "r.html", prompt="<script>alert(1)</script>") == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_without_a_credit_rule_there_are_no_shares(data: Path, tmp_path: Path) -> None:
    assert build_bundle(data, data / "plain", credit=None, metadata=None) == 0
    assert run(data, tmp_path / "r.html", bundle="plain") == 0
    assert "No credit rule." in (tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["images"][0]["caption"] is None


def test_mistakes_are_named(data: Path, tmp_path: Path, capsys) -> None:
    assert run(data, tmp_path / "r.txt") == 2
    assert "expected a name ending in .html" in capsys.readouterr().err
    for k in ("99", "0", "-1"):
        assert run(data, tmp_path / "r.html", "--k", k) == 2
        assert f"k = {k}: expected 1 to 35" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists() and not (tmp_path / "r.json").exists()


def test_training_pictures_are_those_of_the_bundle(data: Path, tmp_path: Path, capsys) -> None:
    table = pq.read_table(data / "trainset" / "emoji.parquet")
    pq.write_table(table.slice(0, 1), tmp_path / "short.parquet")
    assert run(data, tmp_path / "r.html", "--images", str(tmp_path / "short.parquet")) == 2
    error = capsys.readouterr().err
    assert "short.parquet: expected the training pictures, found 1 and no" in error
    ids = table.column("id")
    pq.write_table(table.take(list(range(35, -1, -1))).set_column(0, "id", ids), tmp_path / "other.parquet")
    assert run(data, tmp_path / "r.html", "--images", str(tmp_path / "other.parquet")) == 2
    assert "other.parquet: expected the training pictures, found another caption for" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_rule_that_finds_no_influence_is_not_missing(data: Path, tmp_path: Path) -> None:
    magnitude = Magnitude(np.array([-1.0, 1.0]), np.array([-2.0, -1.0]), np.array([0.1, 0.1]))
    Credit(magnitude, 1.0, 10, sha256_file(data / "ranker.pth"), "nothing").save(tmp_path / "credit.json")
    assert build_bundle(data, data / "negative", credit=tmp_path / "credit.json") == 0
    assert run(data, tmp_path / "r.html", bundle="negative") == 0
    page = (tmp_path / "r.html").read_text()
    assert "No training image among the first has positive influence." in page and "No credit rule." not in page
