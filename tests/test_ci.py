"""The promises of CI: no test is skipped silently, and missing programs are installed or reported."""

import os
import shutil
import subprocess
import sys

from helpers import ROOT
from skips import read_allowed

TESTS = """
import pytest

@pytest.mark.skipif(True, reason="install this")
def test_mark(): pass

@pytest.fixture(scope="session")
def thing(): pytest.skip("install that")

def test_fixture(thing): pass

@pytest.mark.xfail
def test_known(): assert False

def test_well(): pass
"""
MODULE = """
import pytest
pytest.skip("install more", allow_module_level=True)
"""


def test_a_skip_fails_on_ci_unless_it_is_listed(run, tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    (tmp_path / "tests" / "test_module.py").write_text(MODULE)

    def outcome(allowed, num_workers=0, **environment):
        (tmp_path / "tests" / "allowed_skips.txt").write_text(allowed)
        environment |= {"PYTHONPATH": str(ROOT / "tests"), "PATH": os.environ["PATH"]}
        argv = ("-rs", "-p", "skips", "--rootdir", tmp_path, "-c", os.devnull, "-n", num_workers, tmp_path / "tests")
        return run(sys.executable, "-m", "pytest", *argv, env=environment)

    on_ci = outcome("# nothing\n", 2, CI="true")
    assert on_ci.returncode != 0
    for test, reason in (("test_some.py::test_mark", "this"), ("test_some.py::test_fixture", "that")):
        assert f"tests/{test}: on CI, only what" in on_ci.stdout
        assert f"install {reason})" in on_ci.stdout
    assert "tests/test_module.py: on CI, only what" in on_ci.stdout

    allowed = outcome("tests/test_some.py::*: no reason\ntests/test_module.py: none\n", CI="true")
    elsewhere = outcome("")
    for result in (allowed, elsewhere):
        assert result.returncode == 0, result.stdout
        assert "1 passed, 3 skipped, 1 xfailed" in result.stdout
        assert "install this" in result.stdout

    one = outcome("tests/test_some.py::test_mark: no reason\ntests/test_module.py: none\n", CI="true")
    assert one.returncode != 0
    assert "test_mark: on CI" not in one.stdout


def test_every_allowed_skip_is_of_a_test_that_exists():
    for pattern, _ in read_allowed(ROOT / "tests" / "allowed_skips.txt"):
        file, _, name = pattern.partition("::")
        assert f"def {name.partition('[')[0].rstrip('*')}" in (ROOT / file).read_text(encoding="utf-8"), pattern


def test_what_can_not_be_installed_is_reported_and_the_rest_is_installed(tmp_path):
    """Stand-ins replace make, and apt-get, which refuses npm next to a Node from elsewhere."""
    commands = {
        "apt-get": 'echo "$@" >> "$LOG"; case "$*" in *npm*) echo "nodejs : Conflicts: npm" >&2; exit 100;; esac',
        "make": 'echo "make $*" >> "$LOG"',
        "id": "echo 0",
        "node": "",
    }
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("bash", "dirname", "tail", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name))
    log = tmp_path / "log"
    words = [tmp_path / "bash", ROOT / ".ci" / "run"]
    environment = {"PATH": str(tmp_path), "LOG": str(log)}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=30)
    assert result.returncode == 0, result.stderr
    done = log.read_text().splitlines()
    done.remove("make .venv/installed")  # at any time before the tests
    assert done[0] == "update"
    installed = {line.split()[-1] for line in done[1:-1]}
    assert installed - {"fonts-dejavu-core"} == {"chromium", "npm"}
    assert all(line.startswith("install ") and len(line.split()) == 4 for line in done[1:-1])
    assert done[-1] == "make test"
    assert [line for line in result.stderr.splitlines() if line] == [
        ".ci/run: npm is missing and can't be installed: nodejs : Conflicts: npm"
    ]
