"""Every command explains itself: `--help` shows how it is called."""

from __future__ import annotations

import importlib

import pytest

from fastgda.core import ROOT

PACKAGES = ("abu", "benchmark", "fastgda", "feature_extraction", "serving")
FILES = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in FILES
    if "@command_line" in path.read_text()
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_the_command_is_called(name, capsys):
    path = name if (ROOT / name.replace(".", "/")).with_suffix(".py").is_file() else f"{name}.__main__"
    with pytest.raises(SystemExit) as end:
        importlib.import_module(path).main(["--help"])
    assert end.value.code == 0
    called = f"python -m {name}" if "." in name else f"python {name}.py"
    # once as usage, and once more as an example
    assert capsys.readouterr().out.count(called) >= 2
