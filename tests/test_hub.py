"""The model card, and the files of a push to a local server that answers as the hub does."""

import base64
import json
import sys
from http.server import BaseHTTPRequestHandler

import pytest
from helpers import ROOT, assert_one_line_error, serving
from huggingface_hub import ModelCard

SCRIPT = ROOT / "train_scripts" / "train_points.py"
SHORT = ("--dataset_size", 500, "--train_batch_size", 100, "--max_train_steps", 4, "--lr_warmup_steps", 1)
SHORT += ("--ddpm_num_steps", 10, "--checkpointing_steps", 2)


@pytest.fixture
def hub():
    """Serve the hub's three calls (create a repository, choose the upload mode, commit), and record the commit."""
    received = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                received["repo"] = json.loads(body)
                answer = {"url": f"http://{self.headers['Host']}/someone/two-moons", "name": "someone/two-moons"}
            elif "/preupload/" in self.path:
                paths = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines()]
                files = [line["value"] for line in lines if line["key"] == "file"]
                received["files"] = {file["path"]: base64.b64decode(file["content"]) for file in files}
                answer = {
                    "commitUrl": f"http://{self.headers['Host']}/someone/two-moons/commit/1",
                    "commitOid": "1",
                    "success": True,
                }
            else:
                answer = {}
            self.answer(answer)

        def do_GET(self):
            if not self.path.endswith("?expand=xetEnabled"):  # only huggingface_hub before 1.0 requests it
                return self.send_error(404)
            self.answer({"id": "someone/two-moons", "xetEnabled": False})

        def answer(self, answer):
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        received["url"] = url
        yield received


def test_a_run_is_pushed_with_its_card(run, hub, tmp_path, monkeypatch):
    for name, value in (("HF_HUB_OFFLINE", "0"), ("HF_ENDPOINT", hub["url"]), ("HF_TOKEN", "hf_test")):
        monkeypatch.setenv(name, value)
    folder = tmp_path / "two-moons"
    argv = ("--dataset", "two_moons", "--label_column", "label", "--output_dir", folder, *SHORT)
    argv += ("--push_to_hub", "--hub_private_repo")
    result = run(sys.executable, SCRIPT, *argv)
    assert result.returncode == 0, result.stderr
    assert hub["repo"]["name"] == "two-moons"
    assert hub["repo"].get("visibility") == "private" or hub["repo"]["private"] is True  # before huggingface_hub 1.0
    pushed = {path for path in hub["files"] if "/" not in path}
    assert pushed == {
        *("README.md", "model_index.json", "pipeline.py"),
        *("samples.png", "loss.png", "forward_process.png", "process.gif"),
    }
    assert {path for path in hub["files"] if "/" in path} == {
        *("unet/config.json", "unet/mlp.py", "unet/diffusion_pytorch_model.safetensors"),
        "scheduler/scheduler_config.json",
    }
    card = ModelCard(hub["files"]["README.md"].decode())
    assert card.data.library_name == "diffusers"
    assert card.data.datasets is None  # two_moons is not a data set of the hub
    assert card.data.tags == ["ddpm", "points", "ddpm-mlp-pipeline"]
    assert "![Samples, beside the data](samples.png)" in card.text
    assert 'samples = pipeline(batch_size=16, class_labels="lower")[0]' in card.text
    assert "max_train_steps: 4" in card.text
    assert str(tmp_path) not in card.text
    assert result.stdout.splitlines()[-1].endswith("/someone/two-moons/commit/1")


def test_without_the_hub_a_run_that_is_to_be_pushed_does_not_start(run_forked, tmp_path):
    argv = ("--output_dir", tmp_path / "run", *SHORT, "--push_to_hub", "--hub_model_id", "someone/heart")
    assert_one_line_error(run_forked("train_points", *argv), "can't push to the hub as someone/heart")
    assert not (tmp_path / "run").exists()
