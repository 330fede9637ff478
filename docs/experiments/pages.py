"""Bring the generated parts of docs/experiments/E*.md up to date with experiments.toml.

    python docs/experiments/pages.py
"""

import json
import re
import sys
from pathlib import Path
from textwrap import fill

sys.path.insert(0, str(Path(__file__).parents[2]))
from checkpoint import replace_file
from config import OWN, flatten, list_experiments, load_config
from errors import UserError, run_script

PAGES = Path(__file__).parent
MARKS = "<!-- generated: python docs/experiments/pages.py -->", "<!-- end -->"


def generated_block(exp: str) -> str:
    """What a page repeats of experiments.toml: the question, what this experiment changes, its command and profile."""
    first = list_experiments()[0]
    config, base = load_config(exp), flatten(load_config(first))
    rows = [f"| `{key}` | {json.dumps(base[key])} | {json.dumps(value)} |" for key, value in flatten(config).items()
            if value != base[key] and key not in ("exp", *OWN)]
    profile = ", ".join(f"`{key}`\xa0=\xa0{json.dumps(value)}".replace(", ", ",\xa0")
                        for key, value in flatten(load_config(exp, profile="study")).items()
                        if value != flatten(config)[key])
    profile = f"The profile sets {profile}. Where hypothesis, metrics or criteria have other numbers, these hold."
    profile = fill(profile, 120, break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")
    changes = "\n".join([f"| key | {first} | {exp} |", "|---|---|---|", *rows]) if rows else (
        "All keys are as in `[defaults]` of [experiments.toml](../../experiments.toml).")
    return "\n\n".join([MARKS[0], f"**Question.** {config.question}", changes,
                        f"    python train.py --exp {exp} --profile study", profile, MARKS[1]])


def update_page(text: str, exp: str) -> str:
    """The page with its title and generated block as experiments.toml has them now. Raises UserError."""
    pattern = re.compile(rf"\A# [^\n]*\n+{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.DOTALL)
    if not pattern.search(text) or text.count(MARKS[0]) != 1:
        raise UserError(f"docs/experiments/{exp}.md: needs a title, and below it the lines {MARKS[0]} and {MARKS[1]}")
    block = f"# {exp}: {load_config(exp).title}\n\n{generated_block(exp)}"
    return pattern.sub(lambda _: block, text)  # of a function, since the block may hold backslashes


def main() -> int:
    for exp in list_experiments():
        path = PAGES / f"{exp}.md"
        if exp == "smoke":
            continue
        if not path.exists():
            raise UserError(f"{path}: missing; write hypothesis, metrics and success criteria before the run")
        text = path.read_text(encoding="utf-8")
        if update_page(text, exp) != text:
            replace_file(path, update_page(text, exp).encode())
            print(path)
    return 0


if __name__ == "__main__":
    run_script(main)
