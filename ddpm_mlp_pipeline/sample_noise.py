"""The runtime's noise in torch, so that a checkpoint draws the same samples as its bundle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.overrides import TorchFunctionMode

from .runtime.noise import draw_labels, normal

BEYOND = 4  # the first number of a stream that the runtime doesn't use


class SampleNoise(torch.Generator):
    """A generator with the noise of some of a seed's samples, which depends on their numbers only, as in the runtime.

    ```python
    with SampleNoise(seed=0, samples=range(100, 200)) as noise:
        pipeline(100, noise, latents=noise.latents((100, 2)), callback_on_step_end=noise.next_step)
    ```

    Each step has its own noise. Where a scheduler draws more than once in a step, or `resample` repeats it, the
    runtime has no such noise: these samples depend on their numbers, too, but are others than the bundle's.

    Args:
        seed: in [0, 2⁶³).
        samples: the numbers of the samples, below 2³².

    Attributes:
        of_known: the generator for the noise of known values, which has a stream of its own.
    """

    def __new__(cls, *_: Any, **__: Any) -> SampleNoise:
        return super().__new__(cls)

    def __init__(self, seed: int, samples: range):
        self.key, self.samples, self.step = seed, samples, 0
        self.of_known = torch.Generator()
        self._drawn: Counter[bool] = Counter()  # in this step, of known values and others
        self._mode = _Drawing(self)

    def __enter__(self) -> SampleNoise:
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]

    def latents(self, shape: Sequence[int]) -> torch.Tensor:
        """Return x_T, float32 of the shape `[samples, …]`."""
        return self._normal(shape, 0, 0)

    def next_step(self, pipe: DiffusionPipeline, step: int, t: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Go on to the noise of the next step: a `callback_on_step_end`."""
        self.step = step + 1
        self._drawn.clear()
        return {}

    def randn(self, shape: Sequence[int], is_known: bool) -> torch.Tensor:
        """Return the step's next noise, float32 of the shape `[samples, …]`."""
        stream = int(is_known) + BEYOND * self._drawn[is_known]
        self._drawn[is_known] += 1
        return self._normal(shape, self.step if is_known else self.step + 1, stream)

    def _normal(self, shape: Sequence[int], draw: int, stream: int) -> torch.Tensor:
        values = normal(self.key, self.samples, math.prod(shape[1:]), range(draw, draw + 1), stream)
        return torch.tensor(values.reshape(tuple(shape)))


class _Drawing(TorchFunctionMode):
    """While active, torch's functions return a `SampleNoise`'s numbers where they are called with it.

    Stock schedulers call `torch.randn`, which hands the generator to C++, where nothing can be overridden.
    """

    def __init__(self, noise: SampleNoise):
        self.noise = noise

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options, noise = kwargs or {}, self.noise
        generator = options.get("generator")
        if func is torch.randn and (generator is noise or generator is noise.of_known):
            values = noise.randn(args[0], is_known=generator is noise.of_known)
            return values.to(device=options.get("device"), dtype=options.get("dtype"))
        if func is torch.multinomial and generator is noise:
            return torch.from_numpy(draw_labels(noise.key, noise.samples, args[0].tolist()))
        return func(*args, **options)
