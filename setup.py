"""Metadata, dependencies and extras of the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def version() -> str:
    """Read the version as text: importing `mot_hf` would need torch at build time."""
    found = re.search(r'^__version__ = "(.+)"$', (ROOT / "mot_hf" / "version.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError('mot_hf/version.py has no line `__version__ = "..."`')
    return found.group(1)


def long_description() -> str:
    """README.md without the pictures and links that only lead somewhere beside the repository's files."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\s*", "", text)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


EXTRAS = {
    "train": ["accelerate>=1.1", "datasets>=4.4", "evaluate>=0.4.6", "tensorboard>=2.16"],
    "report": ["jinja2>=3.1", "matplotlib>=3.9", "rich>=13.7"],
    "lora": ["peft>=0.18"],
    "sft": ["trl>=1.16"],
    "serve": ["transformers[serving]>=5.17,<5.25"],
    "docs": ["latex2mathml>=3.78", "mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
}
EXTRAS["demo"] = EXTRAS["train"] + EXTRAS["report"]
EXTRAS["dev"] = [
    *EXTRAS["demo"],
    *EXTRAS["lora"],
    *EXTRAS["sft"],
    *EXTRAS["serve"],
    *EXTRAS["docs"],
    # what the tests in tests/ecosystem work with
    "bitsandbytes>=0.50",
    "lm_eval>=0.4.13",
    "onnx>=1.23",
    "onnxruntime>=1.32",
    "onnxscript>=0.7",
    "torchao>=0.18",
    # and the checks
    "build>=1.2",
    "codespell>=2.4",
    "hypothesis>=6.100",
    "ipykernel>=7.0",
    "nbclient>=0.10",
    "pre-commit>=4.0",
    "pyright[nodejs]>=1.1.400",
    "pytest>=8.3",
    "pytest-cov>=7.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.12",
    "twine>=6.1",
]

setup(
    name="mot_hf",
    version=version(),
    description="Mixture of Tokens language models for Hugging Face transformers",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2310.15961"},
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["mixture of tokens", "mixture of experts", "language model", "transformers", "pytorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    install_requires=["filelock>=3.15", "torch>=2.11", "transformers>=5.17,<5.25"],
    extras_require=EXTRAS,
    packages=[*find_packages(include=["mot_cli", "mot_hf", "mot_hf.*"]), "mot_hf.modeling"],
    package_dir={"mot_hf": "mot_hf", "mot_hf.modeling": "modeling"},
    package_data={"mot_hf": ["py.typed", "recipes/*.yaml", "recipes/*/*.yaml"], "mot_hf.reporting": ["templates/*"]},
    entry_points={"console_scripts": ["mot=mot_cli:run"]},
)
