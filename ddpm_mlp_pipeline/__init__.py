"""Small DDPMs for Hugging Face diffusers, from data to a sampler that needs no PyTorch.

Names are imported when they are first used, so that the base install, which has neither torch nor diffusers,
can import the package and sample from a bundle.
"""

import importlib
from typing import Any

from .errors import explain_missing_extra

__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "DDPMMLPPipeline": "pipeline",
    "MLPModel": "models.mlp",
    "SmallUNet2DModel": "models.unet",
    "OnnxSampler": "runtime.sampler",
    "PointPipelineOutput": "pipeline",
    "StepTable": "runtime.step_table",
    "compile_scheduler": "export.compile",
    "export_bundle": "export.exporter",
    "load_images": "data.images",
    "load_points": "data.points",
    "load_checkpoint": "loading",
    "pretrained": "checkpoints",
    "train": "training.loop",
    "TrainingArguments": "training.options",
}

__all__ = sorted(_MODULE_OF_NAME)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    extra = "export" if _MODULE_OF_NAME[name].startswith("export.") else None
    with explain_missing_extra(name, extra):
        module = importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}")
    value = globals()[name] = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
