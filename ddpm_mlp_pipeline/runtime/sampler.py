"""`OnnxSampler`: sampling from a bundle, with numpy and onnxruntime only."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..errors import BundleError, ConfigurationError, DivergenceError
from .bundle import read_file, read_info
from .external_data import has_external_data
from .noise import normal
from .step_table import EPS, X_0, StepTable, X, Z

MAX_SAMPLES = 2**32  # a sample's index is one word of the noise's counter


# Numbers of noise drawn at once: enough to make numpy's overhead small, few enough to stay in the cache
NOISE_CHUNK = 2**16


@dataclass(frozen=True, eq=False)
class DenoisingStep:
    """One sampling step's outcome.

    Attributes:
        index: of the step, from 0.
        timestep: what the network was told.
        sample: float32 `[num_samples, *sample_shape]`, in the network's units: `OnnxSampler.to_data_units` turns it
            into points or images. It is the caller's to keep.
    """

    index: int
    timestep: float
    sample: npt.NDArray[np.float32]


class Sampler(Protocol):
    """Whatever draws points or images batch by batch: [`OnnxSampler`], or with torch `CheckpointSampler`.

    Attributes:
        sample_shape: of one sample: `(dimension,)` of points, `(channels, height, width)` of images.
    """

    sample_shape: tuple[int, ...]

    @property
    def is_points(self) -> bool:
        """Whether the samples are points rather than images."""
        return len(self.sample_shape) == 1

    @property
    def data_columns(self) -> list[str]:
        """Names of the points' coordinates."""

    @property
    def scheduler(self) -> str:
        """Name of the scheduler's class."""

    def __len__(self) -> int:
        """Number of the sampling steps."""

    def batches(
        self,
        num_samples: int,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
    ) -> Generator[np.ndarray, None, None]:
        """Draw samples, and yield them batch by batch, in order: see [`OnnxSampler.sample`]."""


class OnnxSampler(Sampler):
    """Draws points or images from a bundle folder that `ddpm-export` wrote.

    Sample i of a seed is the same, up to the rounding of float32, however many are asked for and in whatever batches.

    Args:
        bundle: the folder, with `unet.onnx`, `step_table.json` and `bundle.json`.
        num_threads: CPU threads to use; by default, one for each core.

    Raises:
        BundleError: if a file is missing, can't be read, or doesn't fit the others.
    """

    def __init__(self, bundle: str | os.PathLike[str], num_threads: int | None = None):
        self.folder = Path(bundle)
        if num_threads is not None and num_threads < 1:
            raise ConfigurationError(f"num_threads must be at least 1, got {num_threads}")
        self.num_threads = num_threads or _num_cores()
        self.info = read_info(self.folder / "bundle.json")
        path = self.folder / "step_table.json"
        self.table = StepTable.parse(read_file(self.folder, path.name, self.info), path)
        self._network = self._read_network()
        self.sample_shape: tuple[int, ...] = tuple(self.info["sample_shape"])
        self._on_step_lock = threading.Lock()
        self._sessions: dict[int, ort.InferenceSession] = {}
        self._check_network(self._session(self.num_threads))

    @property
    def data_columns(self) -> list[str]:
        columns: list[str] = self.info["data_columns"]
        return columns

    @property
    def scheduler(self) -> str:
        return self.table.scheduler

    def __len__(self) -> int:
        return len(self.table)

    def sample(
        self,
        num_samples: int = 1,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Draw samples.

        Args:
            num_samples: how many.
            seed: in [0, 2⁶³); the same seed gives the same samples.
            batch_size: at most so many go through the network together; it bounds memory and changes no sample.
            on_step: called after each step with the number of samples that it moved, for a progress bar; one call at a
                time, but from several threads.

        Returns:
            float32: points in the data's own units, `[num_samples, dimension]`, or images in [0, 1],
            `[num_samples, height, width, channels]`.

        Raises:
            ConfigurationError: if a number is out of range.
            DivergenceError: if a sample is not finite; it names the step.
        """
        return np.concatenate([*self.batches(num_samples, seed, batch_size, on_step)])

    def batches(
        self,
        num_samples: int,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
    ) -> Generator[npt.NDArray[np.float32], None, None]:
        """Draw samples, as [`sample`][OnnxSampler.sample] does, and yield them batch by batch, in order.

        Batches are independent, so they run side by side, one thread each: that keeps the cores busier than sharing
        every small operation of one batch among them. At most two for each thread are held in memory.
        """
        if num_samples < 1 or batch_size < 1:
            raise ConfigurationError(f"num_samples and batch_size must be at least 1, got {num_samples}, {batch_size}")
        if num_samples > MAX_SAMPLES:
            raise ConfigurationError(f"a seed has {MAX_SAMPLES} samples at most, got {num_samples}")
        batch_size = min(batch_size, math.ceil(num_samples / self.num_threads))
        samples = [range(i, min(i + batch_size, num_samples)) for i in range(0, num_samples, batch_size)]
        workers = min(self.num_threads, len(samples))
        session = self._session(max(1, self.num_threads // workers))
        if workers == 1:
            yield from (self._draw(session, part, seed, on_step) for part in samples)
            return
        stop = threading.Event()
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[npt.NDArray[np.float32]]] = deque()
            try:
                for part in samples:
                    waiting.append(pool.submit(self._draw, session, part, seed, on_step, stop))
                    if len(waiting) == 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # also after Ctrl-C, or where the caller wants no more
                stop.set()
                for future in waiting:
                    future.cancel()

    def steps(
        self,
        num_samples: int = 1,
        seed: int = 0,
        *,
        latents: npt.NDArray[np.float32] | None = None,
        noises: Iterable[npt.NDArray[np.float32]] | None = None,
    ) -> Generator[DenoisingStep, npt.NDArray[np.float32] | None, None]:
        """Sample one batch, and yield what every step makes of it: the process, to be drawn or measured.

        Send the generator a sample, and the next step starts from that instead of the one that it has yielded.

        Args:
            num_samples: size of the batch.
            seed: in [0, 2⁶³).
            latents: x_T to start from instead of the seed's, float32 `[num_samples, *sample_shape]`.
            noises: the noise of the steps that add any, one after the other, instead of the seed's.

        Raises:
            ConfigurationError: if a number is out of range, or `latents` has another shape.
        """
        if num_samples < 1:
            raise ConfigurationError(f"num_samples must be at least 1, got {num_samples}")
        if latents is not None and latents.shape != (num_samples, *self.sample_shape):
            raise ConfigurationError(
                f"latents must have the shape {(num_samples, *self.sample_shape)}, got {latents.shape}"
            )
        session = self._session(self.num_threads)
        samples = self._steps(session, range(num_samples), seed, latents, None if noises is None else iter(noises))
        replacement = None
        for k, t in enumerate(self.table.timesteps.tolist()):
            replacement = yield DenoisingStep(k, t, samples.send(replacement))

    def first_input(self, num_samples: int = 1, seed: int = 0) -> npt.NDArray[np.float32]:
        """What the network sees in the first call, float32 `[num_samples, *sample_shape]`."""
        return self._latents(range(num_samples), seed) * np.float32(self.table.initial_scale)

    def _latents(self, samples: range, seed: int) -> npt.NDArray[np.float32]:
        """x_T, of variance 1."""
        latents = normal(seed, samples, math.prod(self.sample_shape), range(1))
        return latents.reshape(len(samples), *self.sample_shape)

    def predict(self, sample: npt.NDArray[np.floating], timestep: float) -> npt.NDArray[np.float32]:
        """The network alone: ε for x_t, float32 `[batch, *sample_shape]`, both in the network's units."""
        feeds = {"sample": sample.astype(np.float32), "timestep": np.array(timestep, dtype=np.float32)}
        eps: npt.NDArray[np.float32]
        (eps,) = self._session(self.num_threads).run(["out_sample"], feeds)
        return eps

    def _draw(
        self,
        session: ort.InferenceSession,
        samples: range,
        seed: int,
        on_step: Callable[[int], Any] | None,
        stop: threading.Event | None = None,
    ) -> npt.NDArray[np.float32]:
        for x in self._steps(session, samples, seed):  # noqa: B007
            if stop is not None and stop.is_set():
                break
            if on_step is not None:
                with self._on_step_lock:  # batches run in threads of their own
                    on_step(len(samples))
        if not np.isfinite(x).all():  # which it stays from step to step, so that it is enough to look at the end
            steps = enumerate(self._steps(session, samples, seed))
            k = next((k for k, x in steps if not np.isfinite(x).all()), len(self) - 1)
            raise DivergenceError.at_step(k, float(self.table.timesteps[k]))
        return self.to_data_units(x)

    def _steps(
        self,
        session: ort.InferenceSession,
        samples: range,
        seed: int,
        latents: npt.NDArray[np.float32] | None = None,
        noises: Iterator[npt.NDArray[np.float32]] | None = None,
    ) -> Generator[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, None]:
        """Yield the sample after each step; one that is sent takes its place."""
        if not 0 <= seed < 2**63:
            raise ConfigurationError(f"seed must be in [0, 2⁶³), got {seed}")
        table, shape = self.table, (len(samples), *self.sample_shape)
        size = math.prod(shape)
        if noises is None:
            noises = _noise_of_steps(seed, samples, self.sample_shape, table.is_stochastic)
        if latents is None:
            latents = self._latents(samples, seed)

        # What the table's coefficients multiply: for each call of the network that is remembered, x, ε, x̂_0 and z. The
        # newest takes the oldest's place. The network reads x and writes ε in place.
        history = np.zeros((table.history, 4, size), dtype=np.float32)
        history[0, X].reshape(shape)[...] = latents
        history[0, X] *= np.float32(table.initial_scale)
        terms = history.reshape(-1, size)
        timestep = np.empty((), dtype=np.float32)
        networks = []
        for x, eps in zip(history[:, X], history[:, EPS], strict=True):
            networks.append(network := session.io_binding())
            network.bind_input("sample", "cpu", 0, np.float32, shape, x.ctypes.data)
            network.bind_input("timestep", "cpu", 0, np.float32, (), timestep.ctypes.data)
            network.bind_output("out_sample", "cpu", 0, np.float32, shape, eps.ctypes.data)

        clip_range, is_stochastic = table.clip_range, table.is_stochastic.tolist()
        to_x_0 = table.to_x_0.astype(np.float32)
        calls = np.arange(len(table))[:, None]
        places = (calls - np.arange(table.history)) % table.history
        to_next = table.to_next[calls, places].reshape(len(table), -1).astype(np.float32)  # in the order of the places
        for k, t in enumerate(table.timesteps.tolist()):
            place = k % table.history
            now = history[place]
            timestep[...] = t
            session.run_with_iobinding(networks[place])
            if clip_range is not None:
                to_x_0[k].dot(now[: EPS + 1], out=now[X_0])
                now[X_0].clip(-clip_range, clip_range, out=now[X_0])
            if is_stochastic[k]:
                now[Z].reshape(shape)[...] = next(noises)
            x = to_next[k].dot(terms)
            history[(k + 1) % table.history, X] = x
            if (replacement := (yield x.reshape(shape))) is not None:
                history[(k + 1) % table.history, X] = replacement.ravel()

    def to_data_units(self, sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Turn samples in the network's units, `[batch, *sample_shape]`, into points or images as `sample` returns."""
        if self.is_points:
            mean, std = (np.asarray(self.info[name], dtype=np.float32) for name in ("data_mean", "data_std"))
            return sample * std + mean
        return (sample / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)

    def _read_network(self) -> bytes:
        path = self.folder / "unet.onnx"
        network = read_file(self.folder, path.name, self.info)
        try:
            refers_elsewhere = has_external_data(network)
        except ValueError as error:
            raise BundleError(f"can't load {path}: {error}") from None
        if refers_elsewhere:
            raise BundleError(f"{path} gives the location of weights in other files: refused")
        return network

    def _session(self, num_threads: int) -> ort.InferenceSession:
        if num_threads not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = num_threads
            options.log_severity_level = 4  # the error is raised; there is no need to log it, too
            options.add_session_config_entry("session.load_model_format", "ONNX")
            try:
                session = ort.InferenceSession(self._network, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # onnxruntime's errors have no base class but this
                raise BundleError(f"can't load {self.folder / 'unet.onnx'}: {error}") from None
            self._sessions[num_threads] = session
        return self._sessions[num_threads]

    def _check_network(self, session: ort.InferenceSession) -> None:
        found = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
        if set(found) != {"sample", "timestep", "out_sample"}:
            raise BundleError(
                f"{self.folder / 'unet.onnx'} must have the inputs sample and timestep and the output out_sample, "
                f"but has {', '.join(found)}"
            )
        for name in ("sample", "out_sample"):
            if tuple(found[name].shape[1:]) != self.sample_shape:
                raise BundleError(
                    f"bundle.json says that a sample has the shape {self.sample_shape}, but the network's {name} has "
                    f"{tuple(found[name].shape[1:])}"
                )
        try:
            self.predict(np.zeros((1, *self.sample_shape)), 0)
        except Exception as error:  # whatever its declarations promise: other types, or nodes that don't fit
            raise BundleError(f"{self.folder / 'unet.onnx'} can't be run: {error}") from None


def _noise_of_steps(
    seed: int, samples: range, sample_shape: tuple[int, ...], is_stochastic: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.float32]]:
    """The noise of each step that adds any, `[len(samples), *sample_shape]`, drawn for many steps at once."""
    dimension = math.prod(sample_shape)
    steps = len(is_stochastic)
    chunk = max(1, NOISE_CHUNK // (len(samples) * dimension))
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        if not is_stochastic[start:stop].any():
            continue
        noises = normal(seed, samples, dimension, range(start + 1, stop + 1))  # draw 0 is the initial sample
        noises = noises.reshape(stop - start, len(samples), *sample_shape)
        yield from noises[is_stochastic[start:stop]]


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
