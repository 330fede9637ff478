"""The rules that keep the house readable."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from config import load_tables

LEAVES = {"config", "rng", "data", "model", "diffusion", "weighting", "curvature", "fid", "checkpoint", "parallel"}
SCRIPTS = {"train", "sample", "plots", "report"}
MODULES = {path.stem for path in ROOT.glob("*.py")}


def imported_siblings(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & MODULES


def test_every_module_has_a_place():
    assert LEAVES | SCRIPTS | {"evaluate", "cost"} == MODULES


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_import_rule(name):
    """Leaves import no sibling but rng; evaluate composes leaves, cost both; nobody imports the scripts on top."""
    allowed = {"rng"} if name in LEAVES else LEAVES | {"cost": {"evaluate"}, "evaluate": set()}.get(name, {
        "cost", "evaluate"})
    assert imported_siblings(name) - {name} <= allowed


def test_start_up_leaves_heavy_libraries_to_those_who_need_them():
    code = ("import sys, train\n"
            "print([m for m in ('torchvision', 'matplotlib', 'scipy', 'torch._dynamo') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_names_every_module_and_every_logged_metric():
    readme = (ROOT / "README.md").read_text()
    assert [m for m in MODULES if f"`{m}.py`" not in readme] == []
    source = (ROOT / "train.py").read_text() + (ROOT / "evaluate.py").read_text()
    metrics = set(re.findall(r'"((?:train|snr|val|curvature)/\w+)"', source))
    assert len(metrics) > 8 and [m for m in metrics if f"`{m}`" not in readme] == []


def test_the_readme_has_a_row_for_every_figure():
    readme = (ROOT / "README.md").read_text().split("\n## Figures and reports\n")[1]
    figures = load_tables("figures")
    assert len(figures) > 12
    for name, table in figures.items():
        (row,) = [line for line in readme.splitlines() if line.startswith("|") and f"`{name}`" in line]
        assert all(exp in row for exp in table.get("runs", []))
