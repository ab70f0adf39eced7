"""Training that is killed at random moments: nothing is lost, and the next command finishes the work.

`MOT_HF_KILLS=100 MOT_HF_KILL_SEED=7 pytest tests/scripts/test_kills.py` tries other moments, and more of them.
"""

import json
import os
from pathlib import Path

import pytest

from tests.scripts.running import REPOSITORY, environment_of, run_python, write_texts

NUMBER = int(os.environ.get("MOT_HF_KILLS", "8"))
SEED = int(os.environ.get("MOT_HF_KILL_SEED", "0"))


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", num_words=300)
    environment = environment_of(tmp_path) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = ["-m", "tests.scripts.kill_often", str(tmp_path), str(NUMBER), str(SEED)]
    lines = run_python(REPOSITORY, *command, environment=environment).splitlines()
    outcomes = [json.loads(line) for line in lines if line.startswith('{"after"')]
    assert len(outcomes) == NUMBER
    assert sum(outcome["is_killed"] for outcome in outcomes) > NUMBER / 2
    for outcome in outcomes:
        # The model that was there, or the new one.
        assert outcome["model"] in ("old", "new"), outcome
        assert outcome["last"], outcome
        assert outcome["status"] == 0, outcome
        assert outcome["model_afterwards"] == "new", outcome
        assert outcome["losses_agree"], outcome
        assert outcome["left_afterwards"] == [], outcome
        assert outcome["damaged_afterwards"] == [], outcome
        said = "\n".join(outcome["log"])
        assert f"The run resumes from run{outcomes.index(outcome)}/{outcome['last']}, step" in said
        assert all(f"{name}: it is incomplete" in said for name in outcome["half_written"]), outcome
        assert ("_unfinished is a partly saved model" in said) is ("_unfinished" in outcome["left"]), outcome
