"""Links between Markdown files lead somewhere, and the log and the index of decisions are in order."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data/README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
ELSEWHERE = ("http", "gallery/")  # addresses, and pictures that the build of the site makes (tests/test_site.py)
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Explicit anchors of a page, and those that its headings have on a hosting service."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_anchors(page: Path) -> None:
    links = [link for link in LINK.findall(CODE.sub("", page.read_text())) if not link.startswith(ELSEWHERE)]
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_each_entry_of_the_log_has_a_date_and_an_anchor_and_the_newest_day_is_first() -> None:
    log = (ROOT / "docs/log.md").read_text()
    entries = re.findall(
        r'^<a id="(\d{4}-\d\d-\d\d)-([a-z0-9-]+)"></a>\n\n## (\d{4}-\d\d-\d\d): .+$', log, re.MULTILINE
    )
    dates = [date for _, _, date in entries]
    assert len(entries) == len(re.findall(r"^## ", log, re.MULTILINE))
    assert [date for date, _, _ in entries] == dates == sorted(dates, reverse=True)
    assert len({(date, slug) for date, slug, _ in entries}) == len(entries)


def test_the_index_of_decisions_has_every_file_under_its_title() -> None:
    folder = ROOT / "docs/decisions"
    indexed = re.findall(
        r"^\| (\d{4}) \| \[(.+)\]\((\1-[a-z0-9-]+\.md)\) \|", (folder / "README.md").read_text(), re.MULTILINE
    )
    files = sorted(path.name for path in folder.glob("[0-9]*.md"))
    assert [name for _, _, name in indexed] == files
    for number, title, name in indexed:
        assert (folder / name).read_text().startswith(f"# {number}: {title}\n")
