"""The package's face: lazy names, shipped checkpoints."""

import subprocess
import sys

import pytest
from safetensors.numpy import load_file

import ddpm_mlp_pipeline
from ddpm_mlp_pipeline import pretrained
from ddpm_mlp_pipeline.errors import ConfigurationError


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = "import sys, ddpm_mlp_pipeline; print({'torch', 'diffusers', 'numpy'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


@pytest.mark.parametrize("name", ddpm_mlp_pipeline.__all__)
def test_every_public_name_is_there(name):
    assert getattr(ddpm_mlp_pipeline, name).__doc__
    assert name in dir(ddpm_mlp_pipeline)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = ddpm_mlp_pipeline.nonsense


def test_shipped_checkpoints_are_small():
    shipped = {"heart": (39_426, 2e5), "mnist": (1_006_273, 6e6)}
    shipped |= {"swiss_roll": (39_426, 2e5), "swiss_roll_2015": (39_556, 2e5)}
    for name, (parameters, size) in shipped.items():
        weights = pretrained(name) / "unet" / "diffusion_pytorch_model.safetensors"
        assert sum(tensor.size for tensor in load_file(weights).values()) == parameters
        assert weights.stat().st_size < size
    with pytest.raises(ConfigurationError, match="'hart'; there are: heart, mnist, swiss_roll, swiss_roll_2015"):
        pretrained("hart")
