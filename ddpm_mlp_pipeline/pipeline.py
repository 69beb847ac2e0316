"""`DDPMMLPPipeline`, a `DiffusionPipeline` that samples points and images.

This file needs torch, numpy and diffusers only, because a checkpoint carries a copy of it.
"""

import importlib
import inspect
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# What model_index.json says of the plugin's own models: the module in unet/ that a checkpoint carries, and its class.
CARRIED_MODELS = [["mlp", "MLPModel"], ["unet", "SmallUNet2DModel"]]
_COMPONENTS = {"unet": ModelMixin, "scheduler": SchedulerMixin}
_IS_CARRIED = __name__ != "ddpm_mlp_pipeline.pipeline"  # this is a checkpoint's copy: there may be no plugin


@dataclass
class PointPipelineOutput(BaseOutput):
    """
    Output of the pipeline for points.

    Args:
        points (`np.ndarray` or `torch.Tensor`): `[batch, dimension]`, in the data's own units.
    """

    points: np.ndarray | torch.Tensor


class DDPMMLPPipeline(DiffusionPipeline):
    r"""
    Unconditional sampling of points or images (Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 2).

    Takes what the stock `DDPMPipeline` takes, and swaps with it: the same components, the same call.

    Parameters:
        unet (`ModelMixin`):
            The ε-network: an [`MLPModel`], or a stock `UNet2DModel`. It samples points if its configuration has no
            `sample_size`, else images.
        scheduler (`SchedulerMixin`):
            A stock `DDPMScheduler`, or any other, made by `X.from_config(pipe.scheduler.config)`.
        data_mean, data_std (`list[float]`, *optional*):
            For points: mean and standard deviation of each coordinate of the data, which the network knows only
            as (point - mean) / std.
        data_columns (`list[str]`, *optional*):
            For points: the names of the coordinates.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        data_mean: list[float] | None = None,
        data_std: list[float] | None = None,
        data_columns: list[str] | None = None,
    ):
        super().__init__()
        if data_columns and isinstance(data_columns[0], list):  # as save_config writes them
            (data_columns,) = data_columns
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(data_mean=data_mean, data_std=data_std, data_columns=data_columns)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample: `(dimension,)` for points, `(channels, height, width)` for images."""
        size = self.unet.config.sample_size
        if size is None:
            return (self.unet.config.in_channels,)
        return (self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size))

    @property
    def is_points(self) -> bool:
        """Whether the samples are points rather than images."""
        return len(self.sample_shape) == 1

    @property
    def learns_variance(self) -> bool:
        """Whether the scheduler takes what the network predicts of the variance, in as many further channels."""
        return isinstance(self.scheduler, DDPMScheduler) and "learned" in self.scheduler.config.variance_type

    @property
    def data_columns(self) -> list[str]:
        """Names of the points' coordinates."""
        return self.config.data_columns or [f"x{i}" for i in range(self.sample_shape[0])]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        latents: torch.Tensor | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
        | None = None,
    ) -> ImagePipelineOutput | PointPipelineOutput | tuple[Any]:
        r"""
        Draw samples.

        Args:
            batch_size (`int`, *optional*):
                The number of samples; by default as many as there are `latents`, or 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                What makes the samples reproducible: one for the batch, or one for each sample.
            num_inference_steps (`int`, *optional*):
                The number of denoising steps; by default as many as the scheduler was trained with.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`. Points have no picture: for them, `"pil"` is as `"np"`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object rather than a tuple.
            latents (`torch.Tensor`, *optional*):
                The noise to start from instead of drawing it: standard normal, `[batch_size, *sample_shape]`.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipe, step, timestep, {"latents": x_t})`. The
                `"latents"` of the dictionary that it returns, if there are any, take x_t's place.

        Returns:
            `ImagePipelineOutput`, `PointPipelineOutput` or `tuple`: the samples. Arrays and tensors of images are in
            [0, 1], `[batch, height, width, channels]` and `[batch, channels, height, width]`.
        """
        if batch_size is None:
            batch_size = 1 if latents is None else len(latents)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        shape = (batch_size, *self.sample_shape)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")

        if num_inference_steps is None:
            num_inference_steps = self.scheduler.config.num_train_timesteps
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}

        x_t = latents.to(device=device, dtype=self.unet.dtype) * self.scheduler.init_noise_sigma
        for i, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            eps = self.unet(self.scheduler.scale_model_input(x_t, t), t).sample
            if not self.learns_variance:
                eps = eps[:, : x_t.shape[1]]
            x_t = self.scheduler.step(eps, t, x_t, **step_kwargs).prev_sample
            if callback_on_step_end is not None:
                x_t = (callback_on_step_end(self, i, t, {"latents": x_t}) or {}).get("latents", x_t)

        samples, output_class = self._to_output(x_t, output_type)
        self.maybe_free_model_hooks()
        return output_class(samples) if return_dict else (samples,)

    def _to_output(self, x_0: torch.Tensor, output_type: str) -> tuple[Any, type[BaseOutput]]:
        if self.is_points:
            points = self.to_data_units(x_0)
            return (points if output_type == "pt" else points.cpu().numpy()), PointPipelineOutput
        images = (x_0 / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images, ImagePipelineOutput
        array = images.cpu().permute(0, 2, 3, 1).float().numpy()
        return (self.numpy_to_pil(array) if output_type == "pil" else array), ImagePipelineOutput

    def to_data_units(self, x: torch.Tensor) -> torch.Tensor:
        """Undo the normalisation of points, `[batch, dimension]`."""
        x = x.float()
        if self.config.data_mean is None:
            return x
        return x * x.new_tensor(self.config.data_std) + x.new_tensor(self.config.data_mean)

    # A checkpoint carries the code of its pipeline and of its model, so that diffusers alone can load it, with
    # trust_remote_code=True; with the plugin installed, the plugin's code is used, and none of the folder's runs.

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "DDPMMLPPipeline":
        """As of any diffusers pipeline, but pickled weights are refused unless `use_safetensors` allows them."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json`, and beside it the code that it names."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)  # a path of the machine that saved it
        index["_class_name"] = _carry_code(type(self), folder)
        if self.config.data_columns:  # diffusers' download takes a list that begins with a string for a component
            index["data_columns"] = [self.config.data_columns]
        for name, component in self.components.items():
            component = getattr(component, "_orig_mod", component)  # what torch.compile wraps
            if not type(component).__module__.startswith("diffusers."):
                index[name] = _carry_code(type(component), folder / name)
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Like `DiffusionPipeline.load_config`, but with the installed classes in place of those that a folder
        carries."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if not _IS_CARRIED:
            index.update({name: _installed(index.get(name), kind) for name, kind in _COMPONENTS.items()})
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        # Both load_config (for folders) and download (for the hub) read model_index.json here. What it names is
        # imported: so nothing may be named but models and schedulers of diffusers' and of the installed plugin's.
        index = super()._dict_from_json_file(json_file, **kwargs)
        if _IS_CARRIED:
            return index
        if index.get("_class_name") == ["pipeline", cls.__name__]:
            index["_class_name"] = cls.__name__
        for name, kind in _COMPONENTS.items():
            if _installed(index.get(name), kind) is None:
                raise ValueError(
                    f"{json_file} has {index.get(name)} as its {name}, which is no {kind.__name__} of diffusers or of "
                    "this plugin. If you trust its code: DiffusionPipeline.from_pretrained(…, trust_remote_code=True)"
                )
        if any(Path(json_file).parent.glob("unet/*.index.json")):  # which may name pickles
            raise ValueError(f"{json_file}: weights in several files are not supported")
        return index


def _installed(entry: Any, kind: type) -> list[str] | None:
    """The module and class that an entry of `model_index.json` stands for; `None` if there is none of that kind."""
    for module, name in CARRIED_MODELS:
        installed = [f"ddpm_mlp_pipeline.models.{module}", name]
        if kind is ModelMixin and entry in ([module, name], installed):
            importlib.import_module(installed[0])
            return installed
    if not isinstance(entry, list) or len(entry) != 2 or entry[0] != "diffusers" or not isinstance(entry[1], str):
        return None
    cls = getattr(diffusers, entry[1], None)
    return entry if isinstance(cls, type) and issubclass(cls, kind) else None


def _carry_code(cls: type, folder: Path) -> list[str]:
    """Copy the file that defines `cls` into `folder`; return what `model_index.json` says of it."""
    source = Path(inspect.getfile(cls))
    if not (folder / source.name).exists() or not source.samefile(folder / source.name):
        shutil.copyfile(source, folder / source.name)
    return [source.stem, cls.__name__]
