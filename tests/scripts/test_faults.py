"""Training that is killed, or whose text can no longer be read."""

import json
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets.config
import fsspec.config
import huggingface_hub.constants
import pytest

from mot_hf.training import find_last_checkpoint
from tests.scripts.kill_training import die_at
from tests.scripts.running import REPOSITORY, run_forked, run_script, write_texts

RECIPE = str(REPOSITORY / "mot_hf" / "recipes" / "small_clm.yaml")
TINY = ["--hidden_size", "32", "--num_attention_heads", "2", "--intermediate_size", "64", "--num_hidden_layers", "2"]
SHORT = ["--max_steps", "8", "--warmup_steps", "1", "--block_length", "16"]
SAVING = ["--save_steps", "2", "--save_only_model", "false", "--logging_steps", "1", "--eval_strategy", "no"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts and, for reading at once and as a stream, a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("faults")
    write_texts(folder / "texts", num_words=300)
    for streaming in ("false", "true"):
        run_script(folder, "train_clm.py", *arguments(f"whole_{streaming}", streaming))
    return folder


def arguments(run: str, streaming: str, tokenizer: tuple[str, str] = ("--vocab_size", "300")) -> list[str]:
    stream = ["--streaming", streaming, "--buffer_size", "500"]
    return [RECIPE, "--output_dir", run, "--source", "texts", *stream, *TINY, *SHORT, *SAVING, *tokenizer]


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize(
    ("where", "streaming", "last"),
    [
        ("step:6", "false", "checkpoint-4"),
        ("step:6", "true", "checkpoint-4"),
        ("file:optimizer.pt", "false", "checkpoint-2"),
        ("file:rng_state.pth", "false", "checkpoint-2"),
    ],
)
def test_a_run_that_was_killed_goes_on_identically(folder: Path, where: str, streaming: str, last: str) -> None:
    name = f"killed_{where.replace(':', '_')}_{streaming}"

    def train_and_die() -> None:
        die_at(where)
        run_script(folder, "train_clm.py", *arguments(name, streaming))

    status, written = run_forked(folder, train_and_die)
    assert status == -signal.SIGKILL, written
    assert find_last_checkpoint(folder / name) == str(folder / name / last)
    run_script(folder, "train_clm.py", *arguments(name, streaming), "--resume_from_checkpoint", "true")
    whole = folder / f"whole_{streaming}"
    assert losses(folder / name) == losses(whole)
    assert len(losses(whole)) == 8
    assert (folder / name / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


class CutServer(BaseHTTPRequestHandler):
    """Serves rows of text; from `cut` bytes on every connection breaks."""

    protocol_version = "HTTP/1.1"
    content = ("text\n" + "".join(f"text {number}\n" for number in range(100_000))).encode()
    cut = len(content)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def answer(self, with_content: bool) -> None:
        size = len(self.content)
        wanted = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").split("-")
        start, end = int(wanted[0]), min(int(wanted[1] or size), size - 1)
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {start}-{end}/{size}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        if with_content:
            self.wfile.write(self.content[start : min(end + 1, max(start, self.cut))])
            if end + 1 > self.cut:
                self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """Address of a server that breaks off."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), CutServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/texts.csv"
    server.shutdown()
    CutServer.cut = len(CutServer.content)


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_an_interrupted_download_is_explained(
    folder: Path, url: str, streaming: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without streaming nothing has begun; in a stream, training has: its checkpoints stay good."""
    CutServer.cut = 400_000 if streaming == "true" else 100_000
    # datasets tries again for 100 seconds; here, not so long. Offline, it would refuse this address too.
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # Else it would fetch the whole file as one block.
    monkeypatch.setitem(fsspec.config.conf, "http", {"block_size": 65536})
    command = arguments(f"download_{streaming}", streaming, ("--tokenizer", "whole_true"))
    command += ["--source", url, "--max_steps", "4000", "--save_total_limit", "2", "--buffer_size", "100"]
    command += ["--per_device_train_batch_size", "256", "--save_steps", "5"]
    with pytest.raises(SystemExit, match="1"):
        run_script(folder, "train_clm.py", *command)
    last_line = re.findall("error: .*", capsys.readouterr().err)[-1]  # behind a progress bar
    if streaming == "false":
        assert last_line.startswith(f"error: The download of `source='{url}'` was interrupted: check the network")
    else:
        assert last_line.startswith("error: Reading the text was interrupted")
        assert (
            f"The last good checkpoint is download_true/{Path(find_last_checkpoint(folder / 'download_true')).name}"
            in (last_line)
        )
