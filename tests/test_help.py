"""Every command explains itself: `--help` shows how it is called."""

from __future__ import annotations

import importlib
import re

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
    shown = capsys.readouterr().out
    # once as usage, and once more as an example
    assert shown.count(called) >= 2
    # a dash stands for the underscore of an option's name, so none may be declared with it
    usage = shown.partition("\n\n")[0]
    assert not re.findall(r"--(?!no-)\w+-|--no-\w+-", usage)
