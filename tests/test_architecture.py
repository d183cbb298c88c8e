"""Rules for the top-level files: what they import, how many there are, and how long files and functions are.

The import rules of the packages are in pyproject.toml.
"""

import ast
import re
import subprocess
import sys

import pytest
from helpers import ROOT

PACKAGES = ("runtime", "data", "models", "retrieval", "reporting", "training", "webui")
SCRIPTS = ("train", "evaluate", "infer", "app", "export", "sweep", "average")  # and api.py, which people import
# The modules of the project that each top-level file may import. dataset.py imports reporting for `python dataset.py`.
MAY_IMPORT = {
    "config": (),
    "losses": (),
    "dataset": ("runtime", "data", "reporting"),
    "modules": ("runtime", "data", "losses"),
} | dict.fromkeys((*SCRIPTS, "api"), (*PACKAGES, "config", "losses", "dataset", "modules"))


def imports(path):
    """Yield the top-level names of all modules that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_top_level_file_imports_only_allowed_modules(name):
    project = {*PACKAGES, *MAY_IMPORT}
    assert set(imports(ROOT / f"{name}.py")) & project <= set(MAY_IMPORT[name])


def test_top_level_has_twelve_files_and_no_file_or_function_is_long():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)
    for path in (path for folder in (".", *PACKAGES) for path in (ROOT / folder).glob("*.py")):
        text = path.read_text("utf-8")
        assert text.count("\n") <= 420, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 50, (path, node.name)


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_no_heavy_library(package):
    heavy = {"torch", "numpy", "pandas", "gradio", "transformers"}
    code = f"import sys, {package}; print(*({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_line_contains_an_informal_idiom():
    idiom = re.compile(r"\b(says? of|is told|are told|told of|speaks)\b")
    files = subprocess.run(["git", "ls-files", "*.py", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    lines = [(name, line) for name in files for line in (ROOT / name).read_text("utf-8").splitlines()]
    assert [(name, line) for name, line in lines if idiom.search(line) and name != "tests/test_architecture.py"] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_architecture_page_lists_every_file_of_a_package(package):
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    _, _, section = page.partition(f"**`{package}/`**")
    listed = re.findall(r"^- `(\w+)`: ", section.partition("\n**`")[0], re.MULTILINE)
    assert listed == sorted(path.stem for path in (ROOT / package).glob("*.py") if path.stem != "__init__")
