"""README.md and docs/: links lead somewhere, Python blocks run, and the README's table is that of the results."""

import re
from pathlib import Path

import pytest
from bench import readme

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, block) for page in PAGES for block in PYTHON_BLOCK.findall(page.read_text())]


def text_without_code(page):
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page):
    """Return the relative links of a page whose file or anchor does not exist."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text_without_code(page)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    assert dead_links(page) == []


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b`, c\n[1](#a-b-c) [2](page.md#a-b-c) [3](#b) [4](none.md) [5](https://none)\n```\n[6](no)\n```\n"
    )
    assert dead_links(page) == ["#b", "none.md"]


def test_index_lists_every_page():
    listed = re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs" / "README.md").read_text())
    assert sorted(listed) == sorted(page.name for page in PAGES if page.name != "README.md")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.parametrize("page, block", BLOCKS, ids=[f"{page.stem}-{i}" for i, (page, _) in enumerate(BLOCKS)])
def test_python_block_runs_as_printed(page, block):
    if "torchvision" in block:
        pytest.importorskip("torchvision")
    exec(compile(block, str(page), "exec"), {})


def test_table_of_the_readme_has_the_figures_of_the_results():
    assert readme.table() in (ROOT / "README.md").read_text()
