"""The default corpus: the standard library of the running Python, real text that every machine has.

Figures on it are comparable only within one Python version, which [`default_corpus_info`] reports.
"""

import hashlib
import platform
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# pydoc_data is one large file of generated documentation, which would dominate its split
EXCLUDED_FOLDER = re.compile(
    r"tests?|idle_test|idlelib|lib2to3|encodings|pydoc_data|site-packages|dist-packages|__pycache__|config-.*"
)


@dataclass(frozen=True)
class CorpusInfo:
    """Describes the files that a figure was measured on.

    Args:
        source (`str`): Folder of the files.
        python_version (`str`): Version of the interpreter whose standard library was read.
        num_files (`int`): Number of files.
        num_bytes (`int`): Total size of the files.
        digest (`str`): SHA-256 over the relative paths and the contents of the files.
    """

    source: str
    python_version: str
    num_files: int
    num_bytes: int
    digest: str


def default_corpus_files() -> dict[str, Path]:
    """Lists the files of the default corpus: the standard library without tests and installed packages.

    Returns:
        `dict[str, Path]`: Path of each file by its posix path relative to the standard library, in sorted order.
    """
    root = _stdlib_folder()
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return {name: paths[name] for name in sorted(paths) if _is_corpus_file(name) and paths[name].is_file()}


def default_corpus_info() -> CorpusInfo:
    """Describes the default corpus on this machine.

    Returns:
        [`CorpusInfo`]: Python version, size and digest of the files.
    """
    digest, num_bytes = hashlib.sha256(), 0
    files = default_corpus_files()
    for name, path in files.items():
        content = path.read_bytes()
        num_bytes += len(content)
        digest.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    return CorpusInfo(str(_stdlib_folder()), platform.python_version(), len(files), num_bytes, digest.hexdigest())


def _stdlib_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _is_corpus_file(name: str) -> bool:
    *folders, file_name = name.split("/")
    # _sysconfigdata_* contains paths and flags of the machine that Python was built on
    return not file_name.startswith("_sysconfigdata_") and not any(map(EXCLUDED_FOLDER.fullmatch, folders))
