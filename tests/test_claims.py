"""docs/experiments/claims.md: each one-line command prints what the page says below it."""

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
