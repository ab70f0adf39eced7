"""Notebooks as pages: their text, their code, and the outputs that are stored in them."""

import base64
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.docs.generated import Generated

_STYLE = re.compile("<style.*?</style>", re.DOTALL)


def pages(folder: Path) -> list[Generated]:
    """Makes a page of every notebook, and a file of every picture in it.

    Args:
        folder (`Path`): Folder of the notebooks, in docs/.

    Returns:
        `list[Generated]`: The files, and the notebooks themselves for download.
    """
    made = []
    for path in sorted(folder.glob("*.ipynb")):
        place = f"{folder.name}/{path.stem}"
        made += [Generated(f"{folder.name}/{path.name}", path.read_bytes()), *_convert(path, place)]
    return made


def _convert(path: Path, place: str) -> Iterator[Generated]:
    pictures: list[bytes] = []
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append("".join(cell["source"]))
        elif cell["cell_type"] == "code":
            parts.append(f"```python\n{''.join(cell['source'])}\n```")
            parts += [_show_output(output, path.stem, pictures) for output in cell["outputs"]]
    title, *rest = parts
    download = f"The notebook itself: [{path.name}]({path.name})."
    yield Generated(f"{place}.md", "\n\n".join([title, download, *rest]) + "\n")
    for number, picture in enumerate(pictures):
        yield Generated(f"{place}_{number}.png", picture)


def _show_output(output: Mapping[str, Any], stem: str, pictures: list[bytes]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        pictures.append(base64.b64decode("".join(data["image/png"])))
        return f"![Output of the cell above]({stem}_{len(pictures) - 1}.png)"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    if "text/html" in data:
        html = _STYLE.sub("", "".join(data["text/html"]).replace(' border="1" class="dataframe"', ""))
        return f'<div class="output">{" ".join(html.split())}</div>'
    text = "".join(output.get("text") or data.get("text/plain") or [])
    return f"```{{.text .output}}\n{text.rstrip()}\n```"
