"""Kernels in Triton's interpreter, on a CPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run_in_interpreter(module: str, function: str) -> None:
    """Call a function of a module of tests where kernels are interpreted, which is chosen before they are read."""
    script = f"import {module} as tests; tests.{function}()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
