"""The rules that keep the code readable."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from config import load_config
from runs import LOGS

LEAVES = {"rng", "errors", "data", "model", "diffusion", "weighting", "curvature", "taylor", "inception", "fid",
          "checkpoint", "parallel"}
# What a module may import besides rng and errors. config reads the names in the tables of leaves.
ALLOWED = {name: set() for name in LEAVES} | {
    "fid": {"inception"}, "config": {"diffusion", "fid", "weighting"},
    "runs": LEAVES | {"config"}, "interop": {"checkpoint", "config", "diffusion", "model", "runs"},
    "distances": LEAVES | {"runs"},
    "evaluate": LEAVES | {"config", "runs", "interop", "distances"}, "estimate": LEAVES | {"config", "evaluate"},
    "train": LEAVES | {"config", "runs", "distances", "evaluate", "estimate"},
    "sample": LEAVES | {"config", "runs", "evaluate", "interop"},
    "plots": LEAVES | {"config", "runs"}, "report": LEAVES | {"config", "runs", "plots"}}
MODULES = {path.stem for path in ROOT.glob("*.py")}


def imported_siblings(name):
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names & MODULES


@pytest.mark.parametrize("name", sorted(MODULES | ALLOWED.keys()))
def test_the_import_rule(name):
    assert imported_siblings(name) <= ALLOWED[name] | {"rng", "errors"}


def test_start_up_leaves_heavy_libraries_to_those_who_need_them():
    code = ("import sys, train\n"
            "print([m for m in ('torchvision', 'matplotlib', 'scipy', 'torch._dynamo') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_pages_name_every_module_and_every_logged_metric():
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs" / "metrics.md").read_text()
    assert [m for m in MODULES if f"`{m}.py`" not in readme] == []
    logs = [ROOT / "docs/experiments/results/runs/E1/seed1077" / name for name in LOGS]
    logged = {key for log in logs for key in json.loads(log.read_text().splitlines()[-1]) if "_" in key or "/" in key}
    ends = "_(mean|std|stderr|samples|floor|floor_test|ceiling)"  # the page names one of a family
    families = {key: f"`({key}|{re.sub(f'{ends}$', '(_mean)?', key)})`" for key in logged}
    assert len(logged) > 30 and [key for key, family in families.items() if not re.search(family, page)] == []


def anchors(page):
    """Those that GitHub gives to the headings of a page."""
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)}


def test_every_relative_link_of_the_pages_leads_somewhere():
    broken = []
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            path = page.parent / target if target else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}#{anchor}")
    assert broken == []


def test_every_experiment_and_profile_of_a_command_exists():
    sources = [*ROOT.glob("*.py"), ROOT / "README.md", ROOT / "experiments.toml", *ROOT.glob("docs/*.md")]
    named = {found for path in sources
             for found in re.findall(r"train\.py --exp (E\w+|smoke)(?:.* --profile (\w+))?", path.read_text())}
    assert named >= {("smoke", ""), ("E8c", "study")}
    for exp, profile in named:
        load_config(exp, profile=profile or None)
