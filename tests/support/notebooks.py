"""Notebooks: executing one as a reader would, and storing what it put out without what is of this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["execute", "printed", "without_places"]

# Where IPython keeps a cell's code, and where packages are installed.
_CELL = re.compile(r"[^\s\"'(\[&;]*[/\\]ipykernel_\d+[/\\]\d+\.py")
_PACKAGES = re.compile(r"(?<![\w.])[A-Za-z]?:?[/\\][^\s\"'(\[&;]*?[/\\](?=(?:site|dist)-packages[/\\])")


def without_places(text: str) -> str:
    """A text without paths of this machine: a cell is called ``cell.py``, a package's file begins at ``site-packages``."""
    return _PACKAGES.sub("", _CELL.sub("cell.py", text))


def execute(path: Path, folder: Path, seconds: int) -> Any:
    """Run a notebook from top to bottom in a folder, and return it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its code and its error.
    """
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(
        notebook,
        timeout=seconds,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},  # without the version, which changes
    }
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = without_places(output.text)
            for kind, value in output.get("data", {}).items():
                output.data[kind] = without_places(value)
    return notebook


def printed(notebook: Any) -> str:
    """Everything that the cells printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")
