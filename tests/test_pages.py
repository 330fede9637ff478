"""docs/experiments/pages.py, and the pages that it keeps up to date."""

import pytest

import pages
from config import list_experiments
from errors import UserError


@pytest.mark.parametrize("exp", [exp for exp in list_experiments() if exp != "smoke"])
def test_pages_are_up_to_date_with_experiments_toml(exp):
    text = (pages.PAGES / f"{exp}.md").read_text(encoding="utf-8")
    assert pages.update_page(text, exp) == text


def test_a_page_keeps_what_is_written_by_hand():
    text = f"# E2: old title\n\n{pages.MARKS[0]}\nold\n{pages.MARKS[1]}\n\n## Results\nBy \\hand.\n"
    new = pages.update_page(text, "E2")
    assert new.startswith("# E2: Min-SNR") and new.endswith(f"{pages.MARKS[1]}\n\n## Results\nBy \\hand.\n")
    assert '| `loss.weighting` | "constant" | "minsnr" |' in new and "\nold\n" not in new
    with pytest.raises(UserError, match="E2.md"):
        pages.update_page("no title", "E2")
