"""`python -m mot_cli`, for launchers: `accelerate launch -m mot_cli train ...`."""

from mot_cli import run

run()
