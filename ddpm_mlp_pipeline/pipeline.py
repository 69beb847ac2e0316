"""`DDPMMLPPipeline`, a `DiffusionPipeline` that draws points and images.

A checkpoint carries a copy of this file, so it imports torch, numpy, pillow and diffusers only.
"""

import functools
import importlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# The installed module of each plugin class, by the name of the module's copy in a checkpoint and the class
_INSTALLED = {
    ("mlp", "MLPModel"): "ddpm_mlp_pipeline.models.mlp",
    ("unet", "SmallUNet2DModel"): "ddpm_mlp_pipeline.models.unet",
    ("table_scheduler", "StepTableScheduler"): "ddpm_mlp_pipeline.table_scheduler",
}
_COMPONENTS = {"unet": ModelMixin, "scheduler": SchedulerMixin}
_IS_CARRIED = __name__ != "ddpm_mlp_pipeline.pipeline"  # whether this is a checkpoint's copy


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
    A pipeline that draws points or images with a DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239, algorithm 2),
    optionally with given labels, conditions or known values.

    It has the components and the call arguments of the stock `DDPMPipeline`, and can replace it.

    Parameters:
        unet (`ModelMixin`):
            The network for noise prediction: an [`MLPModel`], a [`SmallUNet2DModel`] or a stock `UNet2DModel`. It
            draws images if its configuration has a `sample_size`, and points otherwise.
        scheduler (`SchedulerMixin`):
            A stock `DDPMScheduler`, another stock scheduler made by `X.from_config(pipe.scheduler.config)`, or the
            plugin's [`StepTableScheduler`].
        data_mean, data_std (`list[float]`, *optional*):
            For points: mean and standard deviation of each coordinate. The network sees (point - mean) / std.
        data_columns (`list[str]`, *optional*):
            For points: names of the coordinates.
        class_names (`list[str]`, *optional*):
            Names of the network's classes, in the order of their numbers.
        null_label (`int`, *optional*):
            The class that stands for "no label". By default the one of the plugin's networks, `num_class_embeds`; a
            stock `UNet2DModel` has none unless it was trained with one.
        label_column (`str`, *optional*):
            The column of the training data that holds the labels.
        condition_columns (`list[str]`, *optional*):
            Names of the condition's numbers.
        condition_mean, condition_std (`list[float]`, *optional*):
            Mean and standard deviation of the condition's numbers. The network sees (condition - mean) / std.
        class_shares (`list[float]`, *optional*):
            The share of each class in the training data, in the order of `class_names`. Without labels, conditions
            and known values, the pipeline draws each sample's label from these shares.
        columns (`list[dict]`, *optional*):
            For tables: the columns, whose coding turns the points' coordinates into rows. The plugin's `TableCodec`
            reads them.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        data_mean: list[float] | None = None,
        data_std: list[float] | None = None,
        data_columns: list[str] | list[list[str]] | None = None,
        class_names: list[str] | list[list[str]] | None = None,
        null_label: int | None = None,
        label_column: str | None = None,
        condition_columns: list[str] | list[list[str]] | None = None,
        condition_mean: list[float] | None = None,
        condition_std: list[float] | None = None,
        class_shares: list[float] | None = None,
        columns: list[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            data_mean=data_mean,
            data_std=data_std,
            data_columns=_unwrap(data_columns),
            class_names=_unwrap(class_names),
            null_label=null_label,
            label_column=label_column,
            condition_columns=_unwrap(condition_columns),
            condition_mean=condition_mean,
            condition_std=condition_std,
            class_shares=class_shares,
            columns=columns,
        )

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
        """Whether the scheduler uses a learned variance, the second half of the network's output channels."""
        return isinstance(self.scheduler, DDPMScheduler) and "learned" in self.scheduler.config.variance_type

    @property
    def data_columns(self) -> list[str]:
        """Names of the points' coordinates."""
        return self.config.data_columns or [f"x{i}" for i in range(self.sample_shape[0])]

    @property
    def num_classes(self) -> int:
        """Number of the network's classes; 0 if it takes no labels."""
        return self.unet.config.get("num_class_embeds") or 0

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return self.config.class_names or [str(i) for i in range(self.num_classes)]

    @property
    def null_label(self) -> int | None:
        """The class that stands for "no label", if the network has one."""
        if self.config.null_label is not None or not self.num_classes:
            return self.config.null_label
        # The plugin's networks have one embedding more than classes: the null label's.
        return self.num_classes if self.unet.class_embedding.num_embeddings > self.num_classes else None

    @property
    def condition_columns(self) -> list[str]:
        """Names of the condition's numbers; empty if the network takes no condition, or known values instead."""
        if self.takes_known:
            return []
        return self.config.condition_columns or [f"c{i}" for i in range(self.unet.config.get("condition_dim") or 0)]

    @property
    def takes_known(self) -> bool:
        """Whether the network's condition is the known values, which then are more than pasted into its samples."""
        return bool(self.unet.config.get("takes_known"))

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
        class_labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        condition: Mapping[str, float] | Sequence[Any] | np.ndarray | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: ModelMixin | None = None,
        known: Mapping[str, float] | Sequence[Any] | np.ndarray | torch.Tensor | PIL.Image.Image | None = None,
        mask: Sequence[Any] | np.ndarray | torch.Tensor | PIL.Image.Image | None = None,
        resample: int = 1,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
        | None = None,
    ) -> ImagePipelineOutput | PointPipelineOutput | tuple[Any]:
        r"""
        Draw samples.

        Args:
            batch_size (`int`, *optional*):
                Number of samples; by default the number of `latents`, or 1.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator for the batch, or one for each sample, to make the samples reproducible.
            num_inference_steps (`int`, *optional*):
                Number of denoising steps; by default the number of training timesteps, or the number of calls of a
                [`StepTableScheduler`]'s first table.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`. For points, `"pil"` is the same as `"np"`.
            return_dict (`bool`, defaults to `True`):
                Whether to return an output object rather than a tuple.
            latents (`torch.Tensor`, *optional*):
                Standard normal noise to start from, `[batch_size, *sample_shape]`; by default drawn.
            class_labels (`int`, `str`, or a sequence of them, *optional*):
                One class for all samples, or one for each, by number or by name. Without labels, conditions and known
                values, each label is drawn from `class_shares`, if they are known, before any noise. Otherwise, the
                default is the null label, "any class".
            condition (`dict[str, float]` or array, *optional*):
                The condition in its own units: a dictionary by column name, or an array, `[condition_dim]` for all
                samples or `[batch_size, condition_dim]`.
            guidance_scale (`float`, *optional*):
                w of classifier-free guidance (Ho & Salimans 2022, https://arxiv.org/abs/2207.12598): the network's
                output becomes w · output(x, t, c) + (1 − w) · output(x, t, ∅). If w is not 1, a denoising step costs
                two network evaluations, in one batch. By default 1, or what a [`StepTableScheduler`]'s table was
                fitted with.
            guidance_interval (`tuple[float, float]`, *optional*):
                `(t_high, t_low)`, the range of timesteps to guide at (Kynkäänniemi et al. 2024,
                https://arxiv.org/abs/2404.07724); by default all.
            guide (`ModelMixin`, *optional*):
                A smaller or less trained network of the same data, whose output replaces output(x, t, ∅)
                (autoguidance, Karras et al. 2024, https://arxiv.org/abs/2406.02507). It needs no labels.
            known (`dict[str, float]`, array or `PIL.Image.Image`, *optional*):
                Values that the samples must have, one array for all samples or one for each. Points: in the data's own
                units, as an array with NaN for coordinates to draw, or by column name. Images: a picture, or in
                [0, 1] an array, `[height, width, channels]`, or a tensor, `[channels, height, width]`.
            mask (array or `PIL.Image.Image`, *optional*):
                True where `known` holds: `[dimension]` or `[height, width]`, or a picture that is white there.
            resample (`int`, defaults to 1):
                Number of times that each step is taken, with one timestep's noise added back in between, so that the
                drawn part fits the known part (RePaint, Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865,
                algorithm 1).
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback_on_step_end(pipe, step, timestep, {"latents": x_t})`. If it returns
                a dictionary with `"latents"`, they replace x_t.

        Returns:
            `ImagePipelineOutput`, `PointPipelineOutput` or `tuple`: the samples. Images as arrays or tensors are in
            [0, 1], `[batch, height, width, channels]` or `[batch, channels, height, width]`.

        Raises:
            ValueError: if an argument is out of range, has the wrong shape, or doesn't fit the network.
        """
        if batch_size is None:
            batch_size = 1 if latents is None else len(latents)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if resample < 1:
            raise ValueError(f"resample must be at least 1, got {resample}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        shape, device, dtype = (batch_size, *self.sample_shape), self._execution_device, self.unet.dtype
        if self.config.class_shares is not None and class_labels is None and condition is None and known is None:
            class_labels = self._draw_labels(batch_size, generator)
        asked = self._to_arguments(class_labels, condition, batch_size)
        y, m = self._to_known(known, mask, shape)
        if self.takes_known:
            seen = torch.full(shape, math.nan, device=device, dtype=dtype)
            asked["condition"] = seen if y is None else torch.where(torch.as_tensor(m).bool(), y, seen)
        if (y is not None or resample > 1) and not hasattr(self.scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(self.scheduler).__name__} takes no known values: it has no alphas_cumprod")
        randn = functools.partial(randn_tensor, shape, device=device, dtype=dtype)
        of_known = getattr(generator, "of_known", generator)  # a `SampleNoise` has another stream for them
        if latents is None:
            latents = randn(generator=generator)
        elif latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")

        scheduler = self.scheduler
        if num_inference_steps is None:
            num_inference_steps = default_num_inference_steps(scheduler)
        scheduler.set_timesteps(num_inference_steps, device=device)
        guidance_scales = self._guidance_scales(guidance_scale, guidance_interval)
        null = self._null_of(asked, guide) if any(w != 1 for w in guidance_scales) else {}
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        step_kwargs = {"generator": generator} if takes_generator else {}
        x_t = latents.to(device=device, dtype=dtype) * scheduler.init_noise_sigma
        timesteps = [*scheduler.timesteps]
        for i, t in enumerate(self.progress_bar(timesteps)):
            next_t = timesteps[i + 1] if i + 1 < len(timesteps) else None
            for repetition in reversed(range(resample)):
                state = _state_of(scheduler)
                eps = self._predict(scheduler.scale_model_input(x_t, t), t, asked, null, guide, guidance_scales[i])
                x_t = scheduler.step(eps, t, x_t, **step_kwargs).prev_sample
                if y is not None:
                    signal, noise = self._rates(next_t)
                    z = randn(generator=of_known) if next_t is not None else 0.0
                    x_t = m * (signal * y + noise * z) + (1 - m) * x_t
                if repetition > 0:  # go back to t: draw from q(x_t | x_t′)
                    signal, noise = self._rates(next_t)
                    scheduler.__dict__.update(state)
                    of_x_0, sigma = self._rates(t)
                    share = of_x_0 / signal
                    added = (sigma**2 - (share * noise) ** 2).clamp(min=0).sqrt()
                    x_t = share * x_t + added * randn(generator=generator)
            if callback_on_step_end is not None:
                x_t = (callback_on_step_end(self, i, t, {"latents": x_t}) or {}).get("latents", x_t)

        samples, output_class = self._to_output(x_t, output_type)
        self.maybe_free_model_hooks()
        return output_class(samples) if return_dict else (samples,)

    def _predict(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        asked: dict[str, torch.Tensor],
        null: dict[str, torch.Tensor],
        guide: ModelMixin | None = None,
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """Call the network, with guidance if the scale is not 1."""
        if guidance_scale == 1:
            output, other = self.unet(x_t, t, **asked).sample, None
        elif guide is not None:
            output, other = self.unet(x_t, t, **asked).sample, guide(x_t, t, **null).sample
        else:
            both = {name: torch.cat([value, null[name]]) for name, value in asked.items()}
            output, other = self.unet(torch.cat([x_t, x_t]), t, **both).sample.chunk(2)
        channels = x_t.shape[1]
        eps, variance = output[:, :channels], output[:, channels:]
        if other is not None:
            eps = guidance_scale * eps + (1 - guidance_scale) * other[:, :channels]
        return torch.cat([eps, variance], dim=1) if self.learns_variance else eps

    def _rates(self, t: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the coefficients of x_0 and of noise in the scheduler's sample at t, or after the last step."""
        if t is None:
            return torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        (alpha_cumprod,) = alphas_cumprod_at(self.scheduler, [float(t)])
        # The network's input has variance 1; some schedulers' samples are a multiple of it.
        scale = self.scheduler.scale_model_input(torch.ones((), dtype=torch.float64), t)
        return alpha_cumprod.sqrt() / scale, (1 - alpha_cumprod).sqrt() / scale

    def _to_arguments(self, class_labels: Any, condition: Any, batch_size: int) -> dict[str, torch.Tensor]:
        """Return the network's arguments besides x_t and t, with one row for each sample."""
        arguments, device = {}, self._execution_device
        if class_labels is not None and not self.num_classes:
            raise ValueError("class_labels: the network knows no classes")
        if self.num_classes:
            labels: Any = self.null_label if class_labels is None else class_labels
            if labels is None:
                raise ValueError("the network needs class_labels: it has no null label")
            is_one = isinstance(labels, str) or np.ndim(labels) == 0
            numbers = [self._to_class(label) for label in ([labels] if is_one else labels)]
            if len(numbers) not in (1, batch_size):
                raise ValueError(f"class_labels must be one, or {batch_size}, got {len(numbers)}")
            arguments["class_labels"] = torch.tensor(numbers, device=device).expand(batch_size)
        columns = self.condition_columns
        if condition is not None:
            if not columns:
                raise ValueError("condition: the network takes no condition")
            values = _named_values(condition, columns, "condition")
            if values.shape not in ((len(columns),), (batch_size, len(columns))) or not np.isfinite(values).all():
                raise ValueError(
                    f"condition must hold finite numbers, {len(columns)} ({', '.join(columns)}) for all samples or "
                    f"for each of {batch_size}, got the shape {values.shape}"
                )
            if self.config.condition_mean is not None:
                values = (values - np.asarray(self.config.condition_mean)) / np.asarray(self.config.condition_std)
            condition = torch.tensor(values, dtype=self.unet.dtype, device=device)
            arguments["condition"] = condition.expand(batch_size, -1)
        elif columns:
            shape = (batch_size, len(columns))
            arguments["condition"] = torch.full(shape, math.nan, dtype=self.unet.dtype, device=device)
        return arguments

    def _draw_labels(self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None) -> list[int]:
        """Draw labels from the class shares, with one generator for the batch or one for each sample."""
        shares = torch.tensor(self.config.class_shares, dtype=torch.float64)  # as precise as the runtime's
        if len(shares) != len(self.class_names):
            raise ValueError(f"class_shares must hold {len(self.class_names)} numbers, got {len(shares)}")
        if isinstance(generator, list):
            if len(generator) > 1:  # a list of one is for the batch, as in `randn_tensor`
                return [label for i in range(batch_size) for label in self._draw_labels(1, [generator[i]])]
            generator = generator[0]
        device = torch.device("cpu") if generator is None else generator.device
        shares = shares.to(device, torch.float64 if device.type == "cpu" else torch.float32)  # MPS has no float64
        labels: list[int] = torch.multinomial(shares, batch_size, True, generator=generator).tolist()
        return labels

    def _to_class(self, label: Any) -> int:
        if isinstance(label, str):
            if label not in self.class_names:
                raise ValueError(f"there is no class {label!r}, only {', '.join(self.class_names)}")
            return self.class_names.index(label)
        number = int(label)
        if number != label or not (0 <= number < self.num_classes or number == self.null_label):
            raise ValueError(
                f"class_labels must be names or whole numbers from 0 to {self.num_classes - 1}, got {label}"
            )
        return number

    def _guidance_scales(self, scale: float | None, interval: tuple[float, float] | None) -> list[float]:
        """Return w of each denoising step."""
        timesteps = self.scheduler.timesteps
        if scale is None:
            if interval is not None:
                raise ValueError("guidance_interval needs a guidance_scale")
            return getattr(self.scheduler, "guidance_scales", [1.0] * len(timesteps))
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale must be finite, got {scale}")
        t_high, t_low = interval or (math.inf, -math.inf)
        return [scale if t_low <= t <= t_high else 1.0 for t in timesteps]

    def _null_of(self, asked: dict[str, torch.Tensor], guide: ModelMixin | None) -> dict[str, torch.Tensor]:
        """Return the arguments for the second term of guidance: no label and no condition, or those of the guide."""
        if guide is not None:
            takes = {"class_labels": "num_class_embeds", "condition": "condition_dim"}
            return {name: value for name, value in asked.items() if guide.config.get(takes[name])}
        if not asked:
            raise ValueError("guidance_scale needs a network that takes labels or conditions, or a guide")
        if "class_labels" in asked and self.null_label is None:
            raise ValueError("guidance_scale needs a null label: pass the network's as the pipeline's null_label")
        nulls: dict[str, Any] = {"class_labels": self.null_label, "condition": math.nan}
        return {name: torch.full_like(value, nulls[name]) for name, value in asked.items()}

    def _to_known(
        self, known: Any, mask: Any, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor | None, torch.Tensor | float]:
        """Return y and m of x ← m · (α y + σ z) + (1 − m) · x, in the network's units. Both broadcast with samples."""
        if known is None:
            if mask is not None:
                raise ValueError("a mask needs known values")
            return None, 0.0
        if self.is_points:
            y = torch.tensor(_named_values(known, self.data_columns, "known"))
            if y.shape not in (shape, shape[1:]):
                raise ValueError(f"known must have the shape {shape} or {shape[1:]}, got {tuple(y.shape)}")
            if self.config.data_mean is not None:
                y = (y - y.new_tensor(self.config.data_mean)) / y.new_tensor(self.config.data_std)
            m = ~y.isnan() if mask is None else torch.as_tensor(np.asarray(mask)).bool()
        else:
            if mask is None:
                raise ValueError("known images need a mask, which is true where they are known")
            y = 2 * _to_channels_first(known, self.sample_shape[0]) - 1
            m = torch.as_tensor(np.asarray(mask))
            m = (m > 127 if isinstance(mask, PIL.Image.Image) else m.bool()).unsqueeze(-3)
        for name, values in (("known", y), ("mask", m)):
            try:
                values.expand(shape)
            except RuntimeError:
                raise ValueError(f"{name} doesn't fit samples of the shape {shape}") from None
        y = torch.where(m, y, 0.0)
        if not y.isfinite().all():
            raise ValueError("known values must be finite where the mask says that they are known")
        device, dtype = self._execution_device, self.unet.dtype
        return y.to(device=device, dtype=dtype), m.to(device=device, dtype=dtype)

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

    # A checkpoint carries the code of its pipeline and its model, so that diffusers alone can load it with
    # trust_remote_code=True. With the plugin installed, the plugin's code runs instead of the folder's.

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "DDPMMLPPipeline":
        """Like `DiffusionPipeline.from_pretrained`, but load pickled weights only with `use_safetensors=False`."""
        return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `model_index.json` and copies of the code that it names."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index = json.loads((folder / self.config_name).read_text(encoding="utf-8"))
        index.pop("_name_or_path", None)  # a path of the machine that saved it
        index["_class_name"] = _carry_code(type(self), folder)
        for key in ("data_columns", "class_names", "condition_columns"):
            if index.get(key):  # diffusers' download would take a list of strings for a component
                index[key] = [index[key]]
        for name, component in self.components.items():
            component = getattr(component, "_orig_mod", component)  # what torch.compile wraps
            if not type(component).__module__.startswith("diffusers."):
                index[name] = _carry_code(type(component), folder / name)
        (folder / self.config_name).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Like `DiffusionPipeline.load_config`, but with the installed classes instead of the folder's copies."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        index = loaded[0] if isinstance(loaded, tuple) else loaded
        if not _IS_CARRIED:
            index.update({name: _installed(index.get(name), kind) for name, kind in _COMPONENTS.items()})
        return loaded

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        # Both load_config (for folders) and download (for the hub) read model_index.json here, and import the classes
        # that it names. So it may only name models and schedulers of diffusers or of the installed plugin.
        index = super()._dict_from_json_file(json_file, **kwargs)
        if _IS_CARRIED:
            return index
        if index.get("_class_name") == ["pipeline", cls.__name__]:
            index["_class_name"] = cls.__name__
        for name, kind in _COMPONENTS.items():
            if _installed(index.get(name), kind) is None:
                raise ValueError(
                    f"{json_file} has {index.get(name)} as its {name}, but only a {kind.__name__} of diffusers or of "
                    "this plugin is loaded. If you trust the folder's code, load it with "
                    "DiffusionPipeline.from_pretrained(…, trust_remote_code=True)"
                )
        if any(Path(json_file).parent.glob("unet/*.index.json")):  # an index may name pickles
            raise ValueError(f"{json_file}: weights in several files are not supported")
        return index


def _unwrap(names: list[str] | list[list[str]] | None) -> Any:
    """Undo the list that `save_config` puts around names."""
    return names[0] if names and isinstance(names[0], list) else names


def default_num_inference_steps(scheduler: SchedulerMixin) -> int:
    """Return a scheduler's default number of denoising steps."""
    return getattr(scheduler, "default_num_inference_steps", None) or scheduler.config.num_train_timesteps


def alphas_cumprod_at(scheduler: SchedulerMixin, timesteps: Sequence[float]) -> torch.Tensor:
    """Return ᾱ at timesteps that may lie between those of training, float64 `[timesteps]`.

    The logarithm of the signal-to-noise ratio is interpolated, unless the scheduler has its own `alphas_cumprod_at`.
    """
    if hasattr(scheduler, "alphas_cumprod_at"):
        return scheduler.alphas_cumprod_at(timesteps)
    log_snr = torch.logit(scheduler.alphas_cumprod.double()).cpu().numpy()
    return torch.sigmoid(torch.from_numpy(np.interp(timesteps, np.arange(len(log_snr)), log_snr)))


def _state_of(scheduler: SchedulerMixin) -> dict[str, Any]:
    """Return a copy of a scheduler's attributes, so that a step can be taken again."""
    return {name: [*value] if isinstance(value, list) else value for name, value in vars(scheduler).items()}


def _named_values(values: Any, columns: list[str], what: str) -> np.ndarray:
    """Return a dictionary's values in the columns' order, NaN for missing known values; or an array as float64."""
    if not isinstance(values, Mapping):
        return np.asarray(values, dtype=np.float64)
    unknown = [name for name in values if name not in columns]
    missing = [name for name in columns if name not in values and what == "condition"]
    if unknown or missing:
        problem = f"has no {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
        raise ValueError(f"{what} {problem}: the columns are {', '.join(columns)}")
    return np.array([values.get(name, math.nan) for name in columns], dtype=np.float64)


def _to_channels_first(images: Any, channels: int) -> torch.Tensor:
    """Return a picture, an array or a tensor as images in [0, 1], `[…, channels, height, width]`."""
    if isinstance(images, torch.Tensor):
        return images.double()
    if isinstance(images, PIL.Image.Image):
        array = np.asarray(images.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])) / 255
        array = array.reshape(*array.shape[:2], channels)
    else:
        array = np.asarray(images, dtype=np.float64)
    return torch.from_numpy(np.moveaxis(array, -1, -3))


def _installed(entry: Any, kind: type) -> list[str] | None:
    """Return the installed module and class that an entry of `model_index.json` names; `None` if not of this kind."""
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(name, str) for name in entry):
        return None
    module, name = entry
    for (carried, cls_name), installed in _INSTALLED.items():
        if module in (carried, installed) and name == cls_name:
            cls = getattr(importlib.import_module(installed), name)
            return [installed, name] if issubclass(cls, kind) else None
    cls = getattr(diffusers, name, None) if module == "diffusers" else None
    return entry if isinstance(cls, type) and issubclass(cls, kind) else None


def _carry_code(cls: type, folder: Path) -> list[str]:
    """Copy the file that defines `cls` into `folder`, and return the class's entry for `model_index.json`."""
    source = Path(inspect.getfile(cls))
    if not (folder / source.name).exists() or not source.samefile(folder / source.name):
        shutil.copyfile(source, folder / source.name)
    return [source.stem, cls.__name__]
