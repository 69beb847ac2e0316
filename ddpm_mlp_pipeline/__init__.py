"""Small DDPMs for Hugging Face diffusers, from data to a sampler that needs no PyTorch.

Names are imported on first use, so that the base install, without torch and diffusers, can import the package and
sample from a bundle.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import explain_missing_extra

__version__ = "0.1.0"

if TYPE_CHECKING:  # editors and type checkers read these imports instead of `__getattr__`
    from .checkpoint_sampler import CheckpointSampler as CheckpointSampler
    from .checkpoints import pretrained as pretrained
    from .data.images import load_images as load_images
    from .data.points import load_points as load_points
    from .errors import (
        BundleError as BundleError,
        CheckpointError as CheckpointError,
        ConfigurationError as ConfigurationError,
        DatasetError as DatasetError,
        DDPMPipelineError as DDPMPipelineError,
        DivergenceError as DivergenceError,
        MissingExtraError as MissingExtraError,
        OutputExistsError as OutputExistsError,
        ParityError as ParityError,
        StoppedBySignal as StoppedBySignal,
        UnsupportedSchedulerError as UnsupportedSchedulerError,
    )
    from .export.compile import compile_scheduler as compile_scheduler
    from .export.exporter import export_bundle as export_bundle
    from .loading import load_checkpoint as load_checkpoint
    from .models.mlp import MLPModel as MLPModel
    from .models.unet import SmallUNet2DModel as SmallUNet2DModel
    from .pipeline import DDPMMLPPipeline as DDPMMLPPipeline, PointPipelineOutput as PointPipelineOutput
    from .runtime.sampler import OnnxSampler as OnnxSampler
    from .runtime.step_table import StepTable as StepTable
    from .sample_noise import SampleNoise as SampleNoise
    from .table_scheduler import StepTableScheduler as StepTableScheduler
    from .training.loop import train as train
    from .training.options import TrainingArguments as TrainingArguments

_MODULE_OF_NAME = {
    **dict.fromkeys(["DDPMMLPPipeline", "PointPipelineOutput"], "pipeline"),
    "MLPModel": "models.mlp",
    "SmallUNet2DModel": "models.unet",
    "CheckpointSampler": "checkpoint_sampler",
    "OnnxSampler": "runtime.sampler",
    "SampleNoise": "sample_noise",
    "StepTable": "runtime.step_table",
    "StepTableScheduler": "table_scheduler",
    "compile_scheduler": "export.compile",
    "export_bundle": "export.exporter",
    "load_images": "data.images",
    "load_points": "data.points",
    "load_checkpoint": "loading",
    "pretrained": "checkpoints",
    "train": "training.loop",
    "TrainingArguments": "training.options",
    **dict.fromkeys(["DDPMPipelineError", "ConfigurationError", "DatasetError", "DivergenceError"], "errors"),
    **dict.fromkeys(["BundleError", "CheckpointError", "OutputExistsError", "MissingExtraError"], "errors"),
    **dict.fromkeys(["ParityError", "StoppedBySignal", "UnsupportedSchedulerError"], "errors"),
}

__all__ = sorted(_MODULE_OF_NAME)


if not TYPE_CHECKING:  # a type checker would take `__getattr__` to define every name

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
