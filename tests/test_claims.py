"""docs/experiments/claims.md: its one-line commands print what the page says, and its tests exist."""

import contextlib
import io
import re
import shlex

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "experiments" / "claims.md").read_text()
PRINTED = re.findall(r"^```bash\n(python -c .*?)^```\n```text\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.mark.long
@pytest.mark.parametrize("command, output", PRINTED)
def test_each_one_liner_prints_what_the_page_says(command, output):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(shlex.split(command)[2], {})
    assert out.getvalue() == output


def test_every_test_that_the_page_selects_exists():
    selections = re.findall(r"pytest ((?:tests/\w+\.py )+)-k (\"[^\"]+\"|\w+)", PAGE)
    assert len(selections) == PAGE.count("-k ") > 5
    missing = [term for files, terms in selections for term in terms.strip('"').split(" or ")
               if not any(re.search(rf"def test_\w*{term}", (ROOT / file).read_text()) for file in files.split())]
    assert missing == []
