"""The download of the released files: from a folder, and from a server that speaks what the hub's client asks for."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from released_layout import FTYPE, ReleasedSize, write_hub

from fastgda import download
from fastgda.dataset import layout, load_images, load_split
from fastgda.download import Joined, main
from feature_extraction.sources import open_split

TINY = ReleasedSize(images=30, dim=12, train_queries=6, candidates=10, test_queries=3, hidden=3, width=16)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "hub"
    write_hub(folder, TINY)
    return folder


def arguments(folder: Path, source: object, *more: str) -> list[str]:
    places = ["--data_dir", str(folder / "data"), "--weights_dir", str(folder / "weights")]
    return ["--source", str(source), *places, *more]


def check(folder: Path, release: Path) -> None:
    """Everything lies where the layout wants it, as it was, and nothing is left over."""
    coco = folder / "data" / "coco"
    for path in release.rglob("*.*"):
        relative = path.relative_to(release)
        if len(relative.parts) == 1 or ".tar.part" in path.name or not path.is_file():
            continue
        weights = relative.parts[1] == "weights"
        placed = folder / "weights" / path.name if weights else folder / "data" / relative
        assert placed.read_bytes() == path.read_bytes()
    pictures = open_split("coco", coco, "data")
    assert len(pictures) == TINY.images and pictures.image(29).size == (40, 32)
    assert pictures.caption(3) == "a orange square, 7 wide"
    assert open_split("coco", coco, "test_query").image(2).size == (40, 32)
    images = load_images(layout("coco", FTYPE, coco))
    assert load_split(layout("coco", FTYPE, coco), "train", images).queries == TINY.train_queries
    assert list(coco.rglob("*.part*")) == [] and list(coco.rglob("*unpacking*")) == []


def test_from_a_folder_and_nothing_twice(tmp_path: Path, release: Path, capsys) -> None:
    assert main(arguments(tmp_path, release, "--dry_run")) == 0
    assert "train2017.tar.partab" in capsys.readouterr().out and not (tmp_path / "data").exists()
    assert main(arguments(tmp_path, release)) == 0
    check(tmp_path, release)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "data/coco/influence_train.pkl").write_bytes(b"cut off")
    assert main(arguments(tmp_path, release)) == 0
    assert "1 of them fetched now" in capsys.readouterr().out
    again = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert {path.name for path in again} == {"influence_train.pkl"}
    check(tmp_path, release)


def test_a_ranker_of_ones_own_is_not_overwritten(tmp_path: Path, release: Path, capsys) -> None:
    mine = tmp_path / "weights" / f"{FTYPE}.pth"
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    assert main(arguments(tmp_path, release)) == 2
    assert f"{FTYPE}.pth: expected the released file" in capsys.readouterr().err and mine.read_bytes() == b"mine"


def test_interrupted_unpacking_starts_again(tmp_path: Path, release: Path, monkeypatch, capsys) -> None:
    extract, count = tarfile.TarFile.extract, []

    def interrupted(*args, **options):
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt
        return extract(*args, **options)

    monkeypatch.setattr(tarfile.TarFile, "extract", interrupted)
    assert main(arguments(tmp_path, release)) == 130
    assert not (tmp_path / "data/coco/trainset/train2017").exists()
    assert main(arguments(tmp_path, release)) == 0
    assert "0 of them fetched now" in capsys.readouterr().out
    check(tmp_path, release)


def test_a_damaged_archive_leaves_no_pictures(tmp_path: Path, release: Path, capsys) -> None:
    copy = tmp_path / "hub"
    subprocess.run(["cp", "-r", str(release), str(copy)], check=True)
    part = copy / "coco/trainset/train2017.tar.partaa"
    part.write_bytes(b"\1" * part.stat().st_size)
    assert main(arguments(tmp_path, copy)) == 2
    assert "train2017.tar: expected a whole tar file in parts" in capsys.readouterr().err
    assert not (tmp_path / "data/coco/trainset/train2017").exists()


@pytest.mark.parametrize("kind", ["path", "link", "device"])
def test_archives_reach_no_other_folder(tmp_path: Path, capsys, kind: str) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("x")
    source = tmp_path / "hub/coco/trainset"
    source.mkdir(parents=True)
    with tarfile.open(source / "a.tar.partaa", "w") as tar:
        if kind == "path":
            tar.add(outside, "../../../../escaped.txt")
        else:
            member = tarfile.TarInfo("escaped")
            member.type, member.linkname = (tarfile.SYMTYPE, "/") if kind == "link" else (tarfile.FIFOTYPE, "")
            tar.addfile(member)
    assert main(arguments(tmp_path, tmp_path / "hub")) == 2
    assert "which is no file or folder inside it" in capsys.readouterr().err
    assert not (tmp_path / "escaped.txt").exists() and not list(tmp_path.rglob("escaped"))


def test_too_little_disk_is_said_before_anything_is_fetched(tmp_path: Path, release: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(download, "SPARE", 1 << 60)
    assert main(arguments(tmp_path, release)) == 2
    assert "GB of free disk" in capsys.readouterr().err and list((tmp_path / "data").iterdir()) == []


def test_parts_are_read_as_one(tmp_path: Path) -> None:
    content = os.urandom(200_000)
    cuts = [0, 1, 70_000, 70_000, 200_000]
    paths = []
    for number in range(4):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(content[cuts[number] : cuts[number + 1]])
    joined = Joined(paths)
    assert b"".join([joined.read(3), joined.read(150_000), joined.read(70_000), joined.read(5)]) == content


class Hub(BaseHTTPRequestHandler):
    """The dataset of the hub: its tree, and its files in ranges; refuses and breaks off as `server.orders` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        root: Path = self.server.root  # type: ignore[attr-defined]
        if "/tree/" in path:
            if self.server.trees:  # type: ignore[attr-defined]
                code = self.server.trees.pop(0)  # type: ignore[attr-defined]
                return self.answer(code, b"not now", {"X-Error-Code": "RepoNotFound"} if code == 404 else {})
            files = [entry for entry in sorted(root.rglob("*")) if entry.is_file()]
            listing = [
                {
                    "type": "file",
                    "path": entry.relative_to(root).as_posix(),
                    "size": entry.stat().st_size,
                    "oid": "0" * 40,
                    "lfs": {"oid": hashlib.sha256(entry.read_bytes()).hexdigest(), "size": 1, "pointerSize": 1},
                }
                for entry in files
            ]
            return self.answer(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})
        file = root / path.split(f"/resolve/{self.server.revision(path)}/")[1]  # type: ignore[attr-defined]
        order = self.server.orders.get((self.command, file.name), [])  # type: ignore[attr-defined]
        content = file.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        self.server.asked.append((self.command, file.name, self.headers.get("Range")))  # type: ignore[attr-defined]
        if order and order[0] in ("429", "403"):
            return self.answer(int(order.pop(0)), b"not now", {})
        status = 200
        if wanted := self.headers.get("Range"):
            status, first = 206, int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content = content[first:]
        broken = bool(order) and order.pop(0) == "break"
        return self.answer(status, content, headers, broken)

    def answer(self, status: int, content: bytes, headers: dict[str, str], broken: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Hub)
        self.root = root
        self.orders: dict[tuple[str, str], list[str]] = {}
        self.trees: list[int] = []
        self.asked: list[tuple[str, str, str | None]] = []

    def revision(self, path: str) -> str:
        return path.split("/resolve/")[1].split("/")[0]


@pytest.fixture
def hub(release: Path) -> Iterator[Server]:
    server = Server(release)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def online(hub: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The hub's client asks the server of the test."""
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    changes = {
        "HF_HUB_OFFLINE": False,
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "DOWNLOAD_CHUNK_SIZE": 64,
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "WAIT", 0.01)
    return hub


def test_from_the_hub_through_refusals_and_broken_connections(tmp_path: Path, release: Path, online: Server) -> None:
    online.orders[("HEAD", "influence_test.pkl")] = ["429"]
    online.orders[("GET", "influence_train.pkl")] = ["break"]
    assert main(arguments(tmp_path, "sywang/FastGDA", "--hashes")) == 0
    check(tmp_path, release)
    resumed = [entry for entry in online.asked if entry[:2] == ("GET", "influence_train.pkl") and entry[2]]
    assert resumed and resumed[0][2] != "bytes=0-"
    online.asked.clear()
    assert main(arguments(tmp_path, "sywang/FastGDA")) == 0
    assert [entry for entry in online.asked if entry[0] == "GET"] == []


def test_the_list_of_files_is_asked_for_again(tmp_path: Path, release: Path, online: Server, capsys) -> None:
    online.trees = [403, 403]
    assert main(arguments(tmp_path, "sywang/FastGDA", "--dry_run")) == 0
    assert capsys.readouterr().err.count("sywang/FastGDA, list of files: 403") == 2
    online.trees = [404]
    assert main(arguments(tmp_path, "sywang/FastGDA", "--dry_run")) == 2
    assert "trying again" not in capsys.readouterr().err


def test_weights_on_another_file_system(tmp_path: Path, release: Path, online: Server, monkeypatch) -> None:
    """A rename from one to the other is refused, as by the kernel; the ranker is copied and no half file is left."""
    rename, replace = os.rename, os.replace

    def within(move):
        def moved(source, target, **options):
            sides = {(tmp_path / "weights") in Path(path).parents for path in (source, target)}
            if len(sides) > 1:
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return move(source, target, **options)

        return moved

    monkeypatch.setattr(os, "rename", within(rename))
    monkeypatch.setattr(os, "replace", within(replace))
    assert main(arguments(tmp_path, "sywang/FastGDA")) == 0
    check(tmp_path, release)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [f"{FTYPE}.pth"]


def test_a_hub_that_goes_on_refusing_is_one_clear_line(tmp_path: Path, online: Server, monkeypatch, capsys) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    online.orders[("HEAD", "data_feats.npy")] = ["403"] * 2
    assert main(arguments(tmp_path, "sywang/FastGDA")) == 2
    assert "data_feats.npy: expected to download it, gave up after 2 attempts" in capsys.readouterr().err


def test_a_hub_out_of_reach_is_one_clear_line(tmp_path: Path, capsys) -> None:
    assert main(arguments(tmp_path, "sywang/FastGDA")) == 2
    assert "error: sywang/FastGDA: expected the hub or a folder to answer" in capsys.readouterr().err
