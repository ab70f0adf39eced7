"""Make the example of a report page in the documentation: a short run that changes its mode, and `mot report`.

python -m scripts.docs.make_report
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PAGE = Path(__file__).parents[2] / "docs" / "assets" / "report_example.html"
# In its last part the run is in mode per_sequence, so that loads of experts are logged too.
RUN = ["small_clm", "--max_steps", "360", "--transition_share", "0.7", "--transition_mode", "per_sequence"]
RUN += ["--norm_mixing_weights", "true", "--num_experts", "64", "--hidden_size", "64", "--intermediate_size", "256"]
RUN += ["--vocab_size", "1024", "--logging_steps", "12", "--eval_steps", "60", "--max_eval_rows", "64"]
RUN += ["--save_steps", "360", "--disable_tqdm", "true"]


def main() -> None:
    """Train, and write the page."""
    with TemporaryDirectory() as folder:
        for arguments in (["train", *RUN], ["report", "runs/small_clm", "--output", str(PAGE), "--num-batches", "4"]):
            subprocess.run([sys.executable, "-m", "mot_cli", *arguments], cwd=folder, check=True)


if __name__ == "__main__":
    main()
