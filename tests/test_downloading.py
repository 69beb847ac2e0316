"""Loading from a local server that answers as the hub does.

The check of `model_index.json` is in `DDPMMLPPipeline._dict_from_json_file`, a private method of diffusers. If
diffusers no longer calls it, these tests fail, and the check must move to where diffusers reads the file.
"""

import hashlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler

import pytest
from diffusers import DDPMScheduler
from helpers import serving

from ddpm_mlp_pipeline import DDPMMLPPipeline, MLPModel

COMMIT = "0" * 40
UNCHECKED = "diffusers no longer reads model_index.json by _dict_from_json_file, so that it is not checked"


@pytest.fixture
def hub(tmp_path):
    """Serve a folder as the hub's repository someone/heart. Return it, the server's address, and the requests."""
    folder, asked = tmp_path / "repository", []
    unet = MLPModel(2, hidden_dim=8, embedding_dim=4)
    DDPMMLPPipeline(unet, DDPMScheduler(), data_columns=["x", "y"]).save_pretrained(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.*")}
            _, _, name = self.path.partition("/resolve/")
            _, _, name = name.partition("/")  # without the revision
            if name in files:
                data = files[name].read_bytes()
            elif name:
                return self.send_error(404)
            elif "/tree/" in self.path:
                tree = [{"type": "file", "path": p, "size": f.stat().st_size, "oid": "0"} for p, f in files.items()]
                data = json.dumps(tree).encode()
            else:
                siblings = [{"rfilename": name} for name in files]
                data = json.dumps({"id": "someone/heart", "sha": COMMIT, "siblings": siblings}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with serving(Handler) as url:
        yield folder, url, asked


LOAD = """
import sys
from diffusers import DiffusionPipeline
from ddpm_mlp_pipeline import DDPMMLPPipeline
try:
    print({expression})
except ValueError as error:
    print(error)
print("antigravity" in sys.modules)
"""


def load_from_hub(run, address, home, expression):
    environment = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": home}
    result = run(sys.executable, "-c", LOAD.format(expression=expression), env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize(
    "expression", ["DDPMMLPPipeline.from_pretrained({})", "DiffusionPipeline.from_pretrained({})"]
)
def test_a_pushed_checkpoint_loads_from_the_hub_again(hub, run, tmp_path, expression):
    _, address, asked = hub
    name = "'someone/heart', trust_remote_code=True" if "Diffusion" in expression else "'someone/heart'"
    printed = load_from_hub(run, address, tmp_path / "home", expression.format(name) + ".data_columns")
    assert printed[-2] == "['x', 'y']", printed
    assert any("safetensors" in path for path in asked)


def test_what_the_hub_sends_is_checked_before_it_is_used(hub, run, tmp_path):
    folder, address, asked = hub
    index = json.loads((folder / "model_index.json").read_text())
    index["unet"] = ["antigravity", "MLPModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    message, is_imported = load_from_hub(run, address, tmp_path / "home", "DDPMMLPPipeline.download('someone/heart')")
    assert "has ['antigravity', 'MLPModel'] as its unet" in message, UNCHECKED
    assert is_imported == "False"
    assert asked
    assert not any("safetensors" in path for path in asked)


def test_a_folders_model_index_is_checked(hub):
    folder, _, _ = hub
    (folder / "model_index.json").write_text(json.dumps({"unet": ["antigravity", "MLPModel"]}))
    for load in (DDPMMLPPipeline.load_config, DDPMMLPPipeline.from_pretrained):
        try:
            load(folder)
        except ValueError as error:
            message = str(error)
        else:
            pytest.fail(UNCHECKED)
        assert "has ['antigravity', 'MLPModel'] as its unet" in message, UNCHECKED
