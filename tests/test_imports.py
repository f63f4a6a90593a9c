"""The architecture as a test: who imports whom, few importers for each heavy dependency, every dependency declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from fastgda.core import ROOT

PACKAGES = ("fastgda", "feature_extraction", "abu", "serving", "benchmark")
COMMANDS = ("train", "eval", "demo")
FRAME = {"fastgda.core", "fastgda.flags", "fastgda.cluster"}
"""What every package may use of the student's: errors, files, manifests, the command line and workers, no method."""
ALLOWED = {
    "fastgda": {"fastgda"},
    "feature_extraction": {"feature_extraction", *FRAME},
    "abu": {"abu", "feature_extraction", *FRAME},
    "serving": {"serving", "fastgda", "feature_extraction", "abu"},
    "benchmark": set(PACKAGES),
    **{command: {*PACKAGES, *COMMANDS} for command in COMMANDS},
}
IMPORTERS = {
    "faiss": {"fastgda/index/backend.py", "fastgda/index/gpu.py"},
    # one module for each kind of source model
    "diffusers": {"abu/models.py", "abu/coco.py", "abu/pipelines.py"},
    "gradio": {"serving/page.py"},
    # pieces of work in any order; a stream of shards that Ray Data schedules
    "ray": {"fastgda/cluster.py", "feature_extraction/cluster.py"},
    "open_clip": {"feature_extraction/clip.py"},
    "timm": {"feature_extraction/vit.py"},
    "wandb": {"fastgda/tracking.py"},
}
"""Heavy dependency -> the modules that may import it: one, unless several are meant to."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py")) + [
    ROOT / f"{name}.py" for name in COMMANDS
]


def imports_of(source: str, package: str = "") -> set[str]:
    """Dotted names of everything that `source` imports, wherever it does; "from a import b" counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found.update(str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))
    return found


def imports(path: Path) -> set[str]:
    return imports_of(path.read_text(), path.parent.name)


def inside(name: str, allowed: set[str]) -> bool:
    """Whether `name` is one of the allowed modules or lies inside one."""
    return any(name == module or name.startswith(module + ".") for module in allowed)


def forbidden(names: set[str], importer: str) -> set[str]:
    """Those of `names` that belong to this project and that a module of `importer` must not import."""
    ours = {name for name in names if name.split(".")[0] in PACKAGES + COMMANDS}
    # "from fastgda.core import x" names fastgda.core and fastgda.core.x; "from fastgda import core" fastgda as well
    ours -= {name for name in ours if name in PACKAGES and any(other.startswith(name + ".") for other in ours)}
    return {name for name in ours if not inside(name, ALLOWED[importer])}


def requirement_name(requirement: str) -> str:
    return re.split(r"[=<>!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def locked(name: str) -> dict[str, str]:
    """Distribution -> version of requirements/<name>.txt."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line.split(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") == 1 for pin in pins), "every line pins a version"
    return {requirement_name(pin): pin.split("==")[1] for pin in pins}


@pytest.mark.parametrize(
    ("source", "importer", "found"),
    [
        ("from fastgda.core import ROOT", "abu", set()),
        ("from fastgda import core", "abu", set()),
        ("from fastgda import ranker", "abu", {"fastgda.ranker"}),
        ("def f():\n    import fastgda.rankings", "feature_extraction", {"fastgda.rankings"}),
        ("import importlib\nimportlib.import_module('abu.models')", "fastgda", {"abu.models"}),
        ("import fastgda", "abu", {"fastgda"}),
        ("from .ranker import Ranker", "fastgda", set()),
        ("from train import main", "benchmark", {"train", "train.main"}),
        ("import numpy, feature_extraction.emoji", "abu", set()),
    ],
)
def test_reader_sees_what_it_must(source, importer, found):
    assert forbidden(imports_of(source, importer), importer) == found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows(path):
    importer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert forbidden(imports(path), importer) == set()


@pytest.mark.parametrize("module", sorted(FRAME))
def test_frame_imports_nothing_of_the_project(module):
    names = imports(ROOT / f"{module.replace('.', '/')}.py")
    assert {name for name in names if name.split(".")[0] in PACKAGES + COMMANDS and not inside(name, FRAME)} == set()


@pytest.mark.parametrize("module", IMPORTERS)
def test_heavy_dependency_is_imported_where_it_is_meant_to_be(module):
    importers = {
        path.relative_to(ROOT).as_posix() for path in SOURCES if any(inside(n, {module}) for n in imports(path))
    }
    assert importers <= IMPORTERS[module]


@pytest.mark.parametrize("part", [*PACKAGES, *COMMANDS])
def test_every_import_is_declared(part):
    """In the dependencies or an extra; the extra "dev" only counts for benchmark, which uses its browser and peers."""
    extras = PROJECT["optional-dependencies"]
    counted = extras.keys() - (set() if part == "benchmark" else {"dev"})
    declared = {requirement_name(pin) for pin in PROJECT["dependencies"] + [p for e in counted for p in extras[e]]}
    distributions = metadata.packages_distributions()
    paths = [path for path in SOURCES if path.relative_to(ROOT).parts[0].removesuffix(".py") == part]
    used = {name.split(".")[0] for path in paths for name in imports(path)}
    third_party = used - sys.stdlib_module_names - {*PACKAGES, *COMMANDS}
    providers = {name: {requirement_name(d) for d in distributions.get(name, [name])} for name in third_party}
    assert {name for name in third_party if declared.isdisjoint(providers[name])} == set()


def test_requirement_files_hold_the_declared_versions():
    lock, dev, node = locked("lock"), locked("dev"), locked("node")
    optional = PROJECT["optional-dependencies"]
    base = [*PROJECT["dependencies"], *optional["cpu"], *optional["demo"]]
    for pins, versions in ((base, lock), (optional["dev"], lock | dev), (optional["node"], node)):
        wanted = {requirement_name(pin): pin.split("==")[1] for pin in pins}
        assert {name: versions.get(name) for name in wanted} == wanted
    assert lock.keys().isdisjoint(dev)


def test_tree_in_the_readme_is_the_one_on_disk():
    """Each module and script has its line, and each line its file."""
    listing = re.search(r"```\n(train\.py .*?)\n```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert listing is not None
    listed, folder = set(), ""
    for line in listing[1].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        listed.add(name if name == folder else folder + name)
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    scripts = (ROOT / "scripts").glob("*.sh")
    wanted = {path.relative_to(ROOT).as_posix() for path in [*SOURCES, *scripts] if path.name != "__init__.py"}
    assert wanted - listed == set()
