"""The package's public names, shipped checkpoints, and requirements."""

import ast
import configparser
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT
from safetensors.numpy import load_file

import ddpm_mlp_pipeline
from ddpm_mlp_pipeline import pretrained
from ddpm_mlp_pipeline.commands.parser import checkpoint_folder
from ddpm_mlp_pipeline.errors import _EXTRA_OF_MODULE, ConfigurationError


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = "import sys, ddpm_mlp_pipeline; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("name", ddpm_mlp_pipeline.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ddpm_mlp_pipeline, name).__doc__
    assert name in dir(ddpm_mlp_pipeline)


@pytest.mark.slow
def test_type_checkers_see_every_public_name_from_outside(tmp_path):
    script = tmp_path / f"script_{os.getpid()}.py"  # mypy's cache of another run would name that run's file
    lines = [
        "from pathlib import Path",
        "from typing import assert_type",
        "import numpy as np",
        "import numpy.typing as npt",
        "import ddpm_mlp_pipeline as ddpm",
        "assert_type(ddpm.OnnxSampler('bundle').sample(3), npt.NDArray[np.float32])",
        "assert_type(ddpm.pretrained('heart'), Path)",
        "assert_type(ddpm.BundleError('no'), ddpm.BundleError)",
        *(f"ddpm.{name}" for name in ddpm_mlp_pipeline.__all__),
        "ddpm.nonsense",
    ]
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", script]
    environment = os.environ | {"MYPYPATH": str(ROOT)}  # mypy does not run the import hook of an editable install
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    (error,) = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert error.startswith(f"{script}:{len(lines)}: ")
    assert "has no attribute" in error
    assert (ROOT / "ddpm_mlp_pipeline" / "py.typed").is_file()


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ddpm_mlp_pipeline.nonsense


def test_commands_take_shipped_checkpoints_by_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint_folder("heart") == pretrained("heart")
    (tmp_path / "heart").mkdir()
    assert checkpoint_folder("heart") == Path("heart")
    assert checkpoint_folder("nothing") == Path("nothing")


def test_shipped_checkpoints_are_small():
    shipped = {"heart": (39_426, 2e5), "mnist": (1_007_681, 6e6), "mnist_1": (1_007_681, 3e6)}
    shipped |= {"cifar10": (3_659_011, 8e6)}
    shipped |= {"swiss_roll": (39_426, 2e5), "swiss_roll_2015": (39_556, 2e5), "moons": (39_618, 2e5)}
    for name, (parameters, size) in shipped.items():
        weights = pretrained(name) / "unet" / "diffusion_pytorch_model.safetensors"
        assert sum(tensor.size for tensor in load_file(weights).values()) == parameters
        assert weights.stat().st_size < size
    with pytest.raises(
        ConfigurationError,
        match="'hart'; there are: cifar10, heart, mnist, mnist_1, moons, swiss_roll, swiss_roll_2015",
    ):
        pretrained("hart")


MODULES = {  # each module's file, by name
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "ddpm_mlp_pipeline").rglob("*.py")
}
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml", "torch_fidelity": "torch-fidelity", "sklearn": "scikit-learn"}


def requirements(extra=None):
    """Return the distributions that setup.cfg requires, in lower case."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    section = config["options.extras_require"] if extra else config["options"]
    text = section[extra or "install_requires"]
    return {re.split(r"[><=[]", line)[0].lower() for line in text.split()}


def imports(module, everywhere):
    """Yield the modules that a module imports: everywhere, or only when it is imported itself."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            is_for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if everywhere or not (is_for_types or isinstance(child, ast.FunctionDef)):
                yield child
                yield from walk(child)

    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (name for alias in node.names if (name := f"{base}.{alias.name}") in MODULES)


def distributions(*modules, everywhere):
    """Return the third-party distributions that modules import, directly or through other modules of the package."""
    found, seen, waiting = set(), set(), [*modules]
    while waiting:
        name = waiting.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            waiting += imports(name, everywhere)
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top != "ddpm_mlp_pipeline":
            found.add(DISTRIBUTIONS.get(top, top))
    return found


@pytest.mark.parametrize(
    ("extra", "modules"),
    [
        (None, ["commands.sample", "commands.console", "runtime.sampler"]),
        ("export", ["export.exporter", "commands.export"]),
        ("train", ["commands.train_points", "commands.train_images", "figures"]),
        ("evaluate", ["commands.evaluate", "data.points"]),
        ("ray", ["ray_engine"]),
        ("tables", ["judge.tables"]),
    ],
)
def test_what_is_imported_is_declared(extra, modules):
    needed = distributions(*(f"ddpm_mlp_pipeline.{name}" for name in modules), everywhere=False)
    assert needed - requirements() - (requirements(extra) if extra else set()) == set()


def test_what_is_declared_is_imported():
    extras = ("train", "export", "evaluate", "parquet", "ray", "tables", "inception")
    declared = set().union(requirements(), *map(requirements, extras))
    assert declared == distributions(*MODULES, everywhere=True)
    modules = {name: next((m for m, d in DISTRIBUTIONS.items() if d == name), name) for name in declared}
    assert {modules[name] for name in declared - requirements()} <= _EXTRA_OF_MODULE.keys()


def test_the_lowest_versions_are_those_of_the_lower_bounds():
    def read(text, operator):
        pairs = re.findall(rf"^ *([\w-]+)(?:\[\w+\])?{operator}([\d.]+)", text, re.MULTILINE)
        return {(name.lower(), version.removesuffix(".0").removesuffix(".0")) for name, version in pairs}

    bounds = (ROOT / "setup.cfg").read_text(encoding="utf-8").partition("\n# Inception")[0]
    lowest = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    assert read(bounds, ">=") == read(lowest, "==")
