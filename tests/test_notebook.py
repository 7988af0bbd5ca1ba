"""The notebook runs from its first cell to its last, and the stored one shows what it says.

``LLIP_JAX_PRESET=quick python tests/test_notebook.py`` runs it in the repository and stores its outputs.
"""

import base64
import os
import re
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image
from run_helpers import COMPILATIONS, ROOT

NOTEBOOK = ROOT / "notebooks" / "llip_small.ipynb"
PICTURES = 9
"""World, four plots of the ladder, maps, weights, two galleries."""
_ABSOLUTE_PATH = re.compile(r"(?<![\w/.:<-])/\w+/\w|[A-Z]:\\|~/")


def executed(path: Path) -> NotebookNode:
    """The notebook with new outputs; cells run in its folder."""
    notebook = nbformat.read(path, 4)
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=None, coalesce_streams=True, record_timing=False, resources=folder).execute()
    for output in outputs(notebook):
        if output.output_type == "stream":
            output.text = output.text.replace("\x1b[A", "")  # A terminal's way up to the line before.
    return notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook: NotebookNode) -> list[Image.Image]:
    data = [output.data for output in outputs(notebook) if "data" in output and "image/png" in output.data]
    return [Image.open(BytesIO(base64.b64decode(own["image/png"]))) for own in data]


def words(notebook: NotebookNode) -> str:
    """All that a reader reads: cells, and outputs but for pictures."""
    texts = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        texts += [output.text] if "text" in output else []
        texts += [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def test_every_cell_runs_and_the_plots_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {
        "LLIP_JAX_PRESET": "smoke",
        "LLIP_JAX_RUNS": str(tmp_path / "runs"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(COMPILATIONS),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = executed(NOTEBOOK)  # which raises where a cell fails
    shown = pictures(notebook)
    assert len(shown) == PICTURES
    for picture in shown:
        assert min(picture.size) > 150 and len(picture.convert("L").getcolors() or []) > 20
    text = words(notebook)
    assert text.count("evaluation after 30 steps") == 2
    assert "### Controls" in text and "### Shortcut" in text
    assert (tmp_path / "runs" / "smoke" / "ladder.jsonl").is_file()


def test_the_stored_notebook_ran_in_order_without_errors_and_names_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert not [
        output for output in outputs(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert len(pictures(notebook)) == PICTURES
    assert _ABSOLUTE_PATH.findall(words(notebook)) == []
    assert NOTEBOOK.stat().st_size < 2_000_000


def setup_cell(folder: Path, repository: str) -> subprocess.CompletedProcess[str]:
    """The notebook's first code cell in a folder of its own, then where it has led."""
    source = next(cell.source for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code")
    script = f"{source}\nprint(os.getcwd(), sys.path[0])"
    environment = os.environ | {"LLIP_JAX_REPOSITORY": repository}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_outside_of_a_clone_the_notebook_clones_the_repository_once(tmp_path: Path) -> None:
    origin, outside = tmp_path / "origin", tmp_path / "outside"
    (origin / "llip_jax").mkdir(parents=True)
    outside.mkdir()
    (origin / "llip_jax" / "__init__.py").touch()
    shutil.copy(ROOT / "setup.cfg", origin)
    identity = ["-c", "user.name=someone", "-c", "user.email=someone@example.com"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message=all"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    for repository in (origin.as_uri(), "nowhere"):  # The second time there is a clone.
        done = setup_cell(outside, repository)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(outside / "llip_jax")] * 2


def test_without_a_clone_or_an_address_the_notebook_says_what_to_set(tmp_path: Path) -> None:
    done = setup_cell(tmp_path, "")
    assert done.returncode != 0
    assert "LLIP_JAX_REPOSITORY" in done.stderr.splitlines()[-1]


if __name__ == "__main__":
    nbformat.write(executed(NOTEBOOK), NOTEBOOK)
