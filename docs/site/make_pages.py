"""Write the pages of the site that the code makes: notebooks with what their cells print, and pictures of the gallery.

python docs/site/make_pages.py [FOLDER]
"""

import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from gallery import draw_gallery
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_SECONDS = 600  # of one cell, on a slow machine


def main() -> None:
    """Write all pages."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "pages"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    shutil.rmtree(folder, ignore_errors=True)
    for notebook in NOTEBOOKS:
        write_notebook(notebook, folder / "notebooks")
    draw_gallery(folder / "gallery")


def write_notebook(path: Path, folder: Path) -> None:
    """Run a notebook, in an empty folder, and write a page of what it shows, with its pictures.

    Raises nbclient.exceptions.CellExecutionError for a cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as work:
        NotebookClient(notebook, timeout=_SECONDS, resources={"metadata": {"path": work}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _is_shown(output)]
    text, made = MarkdownExporter().from_notebook_node(
        notebook, {"output_files_dir": path.stem, "unique_key": path.stem}
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{path.stem}.md").write_text(text, encoding="utf-8")
    for name, content in made["outputs"].items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def _is_shown(output: nbformat.NotebookNode) -> bool:
    """Whether the page has an output: values, pictures and what is printed, but not progress."""
    if output.output_type == "display_data":
        return "image/png" in output.data
    return bool(output.get("name") != "stderr")


if __name__ == "__main__":
    main()
