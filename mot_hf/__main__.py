"""`python -m mot_hf` is the command `mot`."""

from mot_cli import run

run()
