"""Run the notebooks of the documentation and store what they print, without how often and when cells ran.

python -m scripts.docs.run_notebooks
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[2] / "docs" / "notebooks"


def run_notebook(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Runs a notebook in a folder.

    Args:
        path (`Path`): The notebook.
        folder (`Path`): Its working folder.

    Returns:
        `NotebookNode`: The notebook with its new outputs.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    limits = {"startup_timeout": 300, "timeout": 900}  # for a busy machine
    NotebookClient(notebook, **limits, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = None
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def main(paths: Iterable[Path]) -> None:
    """Run notebooks and write them back."""
    for path in paths:
        with TemporaryDirectory() as folder:
            notebook = run_notebook(path, Path(folder))
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or sorted(NOTEBOOKS.glob("*.ipynb")))
