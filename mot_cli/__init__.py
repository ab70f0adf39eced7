"""The `mot` command.

It lies outside `mot_hf`, which takes seconds to import: it registers the models, and so loads torch and transformers.
The commands import what they need when they run.
"""

from mot_cli.application import EXTRAS, app, run

# Each module adds its commands; `mot --help` lists them in this order.
from mot_cli import training, use, checkpoints, conversion  # isort: skip

__all__ = ["EXTRAS", "app", "checkpoints", "conversion", "run", "training", "use"]
