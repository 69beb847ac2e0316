"""`OnnxSampler`: sampling from a bundle, with numpy and onnxruntime only."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..errors import BundleError, ConfigurationError, DivergenceError
from .bundle import read_file, read_info, table_name
from .columns import TableCodec
from .deadline import DrawTimes
from .external_data import has_external_data
from .noise import normal
from .request import Asked, Request, numbered, resolve
from .step_table import EPS, X_0, StepTable, X, Z

if TYPE_CHECKING:
    from typing import Unpack

NOISE_CHUNK = 2**16  # values of noise drawn at once: large enough to hide numpy's overhead, and fits the CPU's cache
MAX_KEPT = 2**16  # values in a workspace that is kept for the next draw: preparing larger ones costs little
MAX_WORKSPACES = 32  # kinds of workspaces kept
WARM_UP = 3  # draws before the first one with a deadline


@dataclass(frozen=True, eq=False)
class DenoisingStep:
    """The result of one denoising step.

    Attributes:
        index: number of the step, from 0.
        timestep: the timestep given to the network.
        sample: float32 `[samples, *sample_shape]`, in the network's units. `OnnxSampler.to_data_units` turns it
            into points or images. Later steps do not change the array.
    """

    index: int
    timestep: float
    sample: npt.NDArray[np.float32]


class Sampler(Protocol):
    """A source of points or images, drawn batch by batch: [`OnnxSampler`], or with torch `CheckpointSampler`.

    Attributes:
        sample_shape: shape of one sample: `(dimension,)` for points, `(channels, height, width)` for images.
    """

    sample_shape: tuple[int, ...]

    @property
    def is_points(self) -> bool:
        """Whether the samples are points rather than images."""
        return len(self.sample_shape) == 1

    @property
    def data_columns(self) -> list[str]:
        """Names of the coordinates of points; empty for images."""

    @property
    def class_names(self) -> list[str]:
        """Names of the network's classes; empty if it takes no labels."""

    @property
    def condition_columns(self) -> list[str]:
        """Names of the condition's numbers; empty if the network takes no condition."""

    @property
    def codec(self) -> TableCodec | None:
        """What turns points into rows of a table, and back; `None` if they are no table's."""

    @property
    def scheduler(self) -> str:
        """Name of the scheduler's class."""

    def __len__(self) -> int:
        """Number of denoising steps."""

    def batches(
        self,
        samples: int | range,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[np.ndarray, None, None]:
        """Draw samples as [`OnnxSampler.sample`] does, and yield them batch by batch, in order."""


class OnnxSampler(Sampler):
    """Draw points or images from a bundle, a folder that `ddpm-export` writes.

    Samples of a seed are numbered. Sample i is the same, up to float32 rounding, whichever are drawn with it and in
    whatever batches, so that several machines can draw parts of one set.

    Args:
        bundle: the folder, with `unet.onnx`, `step_table.json` and `bundle.json`.
            (A bundle may have further, nested tables.)
        num_threads: number of CPU threads; by default one for each core.
        provider: what ONNX Runtime runs the network on, by default the CPU: one of its execution providers,
            such as `"cuda"`, `"coreml"` or `"openvino"`.
        clock: the time in seconds, which `deadline_ms` is measured with.

    Attributes:
        table: the step table that samples are drawn with by default.
        tables: all step tables by number of network calls, for the same weights: the default and the nested ones.

    Raises:
        BundleError: if a file is missing, can't be read, or doesn't fit the others.
        ConfigurationError: if `num_threads` is less than 1, or if this ONNX Runtime has no such provider.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        num_threads: int | None = None,
        provider: str = "cpu",
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.folder = Path(bundle)
        self.provider = _find_provider(provider)
        if num_threads is not None and num_threads < 1:
            raise ConfigurationError(f"num_threads must be at least 1, got {num_threads}")
        if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
            self.num_threads = num_threads or len(os.sched_getaffinity(0))
        else:
            self.num_threads = num_threads or os.cpu_count() or 1
        self.info = read_info(self.folder / "bundle.json")
        path = self.folder / "step_table.json"
        self.table = StepTable.parse(read_file(self.folder, path.name, self.info), path)
        self.tables = {len(self.table): self.table}
        for num_calls, table in self._read_nested_tables().items():
            self.tables.setdefault(num_calls, table)
        self._network = self._read_network()
        self.sample_shape: tuple[int, ...] = tuple(self.info["sample_shape"])
        if self.is_points:
            self._data_mean, self._data_std = (
                np.asarray(self.info[name], dtype=np.float32) for name in ("data_mean", "data_std")
            )
        self._sessions: dict[int, ort.InferenceSession] = {}
        self._workspaces: dict[tuple[Any, ...], list[_Workspace]] = {}
        self._clock, self._times = clock, dict[int, DrawTimes]()
        self._check_network(self._session(self.num_threads))
        self._warm_up()

    @property
    def data_columns(self) -> list[str]:
        return list(self.info.get("data_columns") or ())

    @property
    def class_names(self) -> list[str]:
        return list(self.info.get("class_names") or ())

    @property
    def condition_columns(self) -> list[str]:
        return list(self.info.get("condition_columns") or ())

    @functools.cached_property
    def codec(self) -> TableCodec | None:
        columns = self.info["columns"]
        return None if columns is None else TableCodec(columns)

    @property
    def scheduler(self) -> str:
        return self.table.scheduler

    def __len__(self) -> int:
        return len(self.table)

    def sample(
        self,
        samples: int | range = 1,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
        num_calls: int | None = None,
        deadline_ms: float | None = None,
        **asked: Unpack[Asked],
    ) -> npt.NDArray[np.float32]:
        """Draw samples, optionally with given labels, conditions or known values.

        The noise of sample i depends on the seed and i only, so that samples of different classes can be compared.

        Args:
            samples: how many, from number 0; or the range of their numbers, below 2³².
            seed: in [0, 2⁶³); the same seed gives the same samples.
            batch_size: largest number of samples in a network evaluation. It bounds memory and doesn't change samples.
            on_step: called after each denoising step with the number of samples in its batch, for a progress bar.
                Calls come from several threads, one at a time.
            num_calls: draw with the table of that number of network calls, a key of `tables`.
            deadline_ms: draw with the largest of `tables` that takes at most that many milliseconds, estimated from
                the draws of one batch so far; with the smallest, if none does. All samples are drawn as one
                batch. Which table is taken depends on the machine and its load, and so do the samples. A deadline is
                not a guarantee: a draw that has begun is finished.
            class_labels: one class for all samples, or one for each, as names from `class_names` or as numbers.
                Without labels, conditions and known values, each label is drawn from the bundle's `class_shares`, if
                it has them. Otherwise, the default is the null label, "any class".
            condition: in its own units, as a dictionary by column name or as an array, `[condition_dim]` for all
                samples or `[samples, condition_dim]`.
            guidance_scale: w of classifier-free guidance; by default as exported; 1 for no guidance. A guided step
                costs two network evaluations.
            guidance_interval: `(t_high, t_low)`, the range of timesteps to guide at; by default all.
            known: values that the samples must have, one array for all samples or one for each. Points: in the data's
                units, by column name or as an array, with NaN for coordinates to draw. Images: a picture, or an array
                in [0, 1], `[height, width, channels]`.
            mask: bool, true where `known` holds: `[dimension]` or `[height, width]`, or a picture that is white there.
            resample: number of times that each step is taken, so that the drawn part fits the known part: see
                [`StepTable.repeated`][].

        Returns:
            float32: points in the data's own units, `[samples, dimension]`, or images in [0, 1],
            `[samples, height, width, channels]`.

        Raises:
            ConfigurationError: if an argument is out of range or doesn't fit the network.
            DivergenceError: if a sample is not finite; the message names the step.
        """
        if deadline_ms is not None:
            if num_calls is not None:
                raise ConfigurationError("deadline_ms chooses the number of calls: leave out num_calls")
            return self._draw_in_time(numbered(samples), seed, batch_size, on_step, deadline_ms, asked)
        if batch_size >= 1 and len(numbered(samples)) == 1:
            begun, table = self._clock(), self._table_of(num_calls)
            return self._draw_measured(begun, table, numbered(samples), seed, on_step, asked)
        return np.concatenate([*self.batches(samples, seed, batch_size, on_step, num_calls, **asked)])

    def _draw_in_time(
        self,
        samples: range,
        seed: int,
        batch_size: int,
        on_step: Callable[[int], Any] | None,
        deadline_ms: float,
        asked: Asked,
    ) -> npt.NDArray[np.float32]:
        """Draw one batch with the largest table that fits the deadline, and measure how long it takes."""
        begun = self._clock()
        if not deadline_ms > 0:
            raise ConfigurationError(f"deadline_ms must be positive, got {deadline_ms}")
        if len(samples) > batch_size:
            raise ConfigurationError(
                f"deadline_ms is for one batch: draw at most batch_size samples, {batch_size}, got {len(samples)}"
            )
        tables = [*self.tables.values()]
        played = tables
        if asked.keys() & {"guidance_scale", "guidance_interval", "resample"}:  # they change what a table costs
            played = [resolve(self.info, table, samples, **asked)[1] for table in tables]
        chosen = self._times_of(len(samples)).choose(played, deadline_ms / 1000)
        table = next(table for table, as_played in zip(tables, played, strict=True) if as_played is chosen)
        return self._draw_measured(begun, table, samples, seed, on_step, asked)

    def _draw_measured(
        self,
        begun: float,
        table: StepTable,
        samples: range,
        seed: int,
        on_step: Callable[[int], Any] | None,
        asked: Asked,
    ) -> npt.NDArray[np.float32]:
        """Draw one batch in this thread, and measure how long it takes since `begun`."""
        request, table = resolve(self.info, table, samples, **asked)
        session = self._session(self.num_threads)
        first_call = self._clock()
        for x in self._steps(session, table, request, samples, seed):  # noqa: B007
            if on_step is not None:
                on_step(len(samples))
        network = self._clock() - first_call
        result = self.to_data_units(self._finite(x, session, table, request, samples, seed))
        self._times_of(len(samples)).record(table, network, self._clock() - begun - network)
        return result

    def _times_of(self, batch: int) -> DrawTimes:
        return self._times.setdefault(batch, DrawTimes())

    def _warm_up(self) -> None:
        """Prepare to draw one sample: make each table's workspace, and measure the smallest of several tables.

        So the first draw takes no longer than the others, and the first one with a deadline has an estimate.
        """
        asked: Asked = {"class_labels": 0} if self.info.get("null_label", 0) is None else {}
        session, one = self._session(self.num_threads), range(1)
        for table in self.tables.values():
            if self._is_kept(table, 1):
                request, _ = resolve(self.info, table, one, **asked)
                with self._workspace(session, table, request, 1):
                    pass
        if len(self.tables) > 1:
            for _ in range(WARM_UP):
                with contextlib.suppress(DivergenceError):
                    self._draw_measured(self._clock(), self.tables[min(self.tables)], one, 0, None, asked)

    def _table_of(self, num_calls: int | None) -> StepTable:
        """Return the table of a number of calls, by default the default one."""
        if num_calls is None:
            return self.table
        if num_calls not in self.tables:
            numbers = ", ".join(map(str, sorted(self.tables)))
            raise ConfigurationError(f"this bundle has no table of {num_calls} calls, only of {numbers}")
        return self.tables[num_calls]

    def batches(
        self,
        samples: int | range,
        seed: int = 0,
        batch_size: int = 512,
        on_step: Callable[[int], Any] | None = None,
        num_calls: int | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[npt.NDArray[np.float32], None, None]:
        """Draw samples as [`sample`][OnnxSampler.sample] does, and yield them batch by batch, in order.

        Batches run in parallel, one thread each, because a batch's operations are too small to divide among cores. At
        most two batches for each thread are held in memory.
        """
        if batch_size < 1:
            raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}")
        numbers = numbered(samples)
        request, table = resolve(self.info, self._table_of(num_calls), numbers, **asked)
        batch_size = min(batch_size, math.ceil(len(numbers) / self.num_threads))
        batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
        workers = min(self.num_threads, len(batches))
        session = self._session(max(1, self.num_threads // workers))
        stop, lock = threading.Event(), threading.Lock()

        def draw(part: range) -> npt.NDArray[np.float32]:
            for x in self._steps(session, table, request, part, seed):  # noqa: B007
                if stop.is_set():
                    break
                if on_step is not None:
                    with lock:
                        on_step(len(part))
            return self.to_data_units(self._finite(x, session, table, request, part, seed))

        if workers == 1:
            yield from map(draw, batches)
            return
        with ThreadPoolExecutor(workers) as pool:
            waiting: deque[Future[npt.NDArray[np.float32]]] = deque()
            try:
                for part in batches:
                    waiting.append(pool.submit(draw, part))
                    if len(waiting) == 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:  # also after Ctrl-C, or when the caller closes the generator
                stop.set()
                for future in waiting:
                    future.cancel()

    def _finite(
        self,
        x: npt.NDArray[np.float32],
        session: ort.InferenceSession,
        table: StepTable,
        request: Request,
        samples: range,
        seed: int,
    ) -> npt.NDArray[np.float32]:
        """Return the last samples if they are finite, or raise a `DivergenceError` that names the step."""
        if not np.isfinite(x).all():  # NaN and infinity survive later steps, so the last sample shows them
            steps = enumerate(self._steps(session, table, request, samples, seed))
            k = next((k for k, x in steps if not np.isfinite(x).all()), len(table) - 1)
            raise DivergenceError.at_step(k, float(table.timesteps[k]))
        return x

    def steps(
        self,
        samples: int | range = 1,
        seed: int = 0,
        *,
        latents: npt.NDArray[np.float32] | None = None,
        noises: Iterable[npt.NDArray[np.float32]] | None = None,
        num_calls: int | None = None,
        **asked: Unpack[Asked],
    ) -> Generator[DenoisingStep, npt.NDArray[np.float32] | None, None]:
        """Draw one batch, and yield the result of each denoising step.

        A sample that is sent to the generator replaces the one that it has just yielded.

        Args:
            samples: how many, or the range of their numbers, as for [`sample`][OnnxSampler.sample].
            seed: in [0, 2⁶³).
            latents: x_T to start from instead of the seed's, float32 `[samples, *sample_shape]`.
            noises: noise for each step that adds any, in place of the seed's, each of the shape of `latents`.
            num_calls: draw with the table of that number of network calls, a key of `tables`.
            asked: labels, conditions and known values, as for [`sample`][OnnxSampler.sample].

        Raises:
            ConfigurationError: if an argument is out of range, has the wrong shape, or doesn't fit the network.
        """
        batch = numbered(samples)
        if latents is not None and latents.shape != (len(batch), *self.sample_shape):
            raise ConfigurationError(
                f"latents must have the shape {(len(batch), *self.sample_shape)}, got {latents.shape}"
            )
        request, table = resolve(self.info, self._table_of(num_calls), batch, **asked)
        session = self._session(self.num_threads)
        given = None if noises is None else iter(noises)
        results = self._steps(session, table, request, batch, seed, latents, given)
        replacement = None
        for k, t in enumerate(table.timesteps.tolist()):
            replacement = yield DenoisingStep(k, t, results.send(replacement).copy())

    def first_input(self, samples: int | range = 1, seed: int = 0) -> npt.NDArray[np.float32]:
        """Return the network's input in the first call, float32 `[samples, *sample_shape]`."""
        return self._latents(numbered(samples), seed) * np.float32(self.table.initial_scale)

    def _latents(self, samples: range, seed: int) -> npt.NDArray[np.float32]:
        """Draw x_T, of variance 1."""
        latents = normal(seed, samples, math.prod(self.sample_shape), range(1))
        return latents.reshape(len(samples), *self.sample_shape)

    def predict(
        self, sample: npt.NDArray[np.floating], timestep: float, **asked: Unpack[Asked]
    ) -> npt.NDArray[np.float32]:
        """Evaluate the network once, without guidance.

        Args:
            sample: x_t, `[batch, *sample_shape]`, in the network's units.
            timestep: t of all samples.
            asked: `class_labels` and `condition`, as for [`sample`][OnnxSampler.sample], but the default is always
                the null label.

        Returns:
            The network's output, float32 `[batch, channels, …]`: the noise prediction, followed by as many channels
            for the variance if it is learned.
        """
        info = {**self.info, "class_shares": None}
        samples = range(len(sample))
        request, _ = resolve(info, self.table.guided(1.0), samples, **asked)
        feeds = {"sample": sample.astype(np.float32), "timestep": np.array(timestep, dtype=np.float32)}
        feeds |= request.of(samples, seed=0).inputs  # without shares of classes, the seed has no effect
        output: npt.NDArray[np.float32]
        (output,) = self._session(self.num_threads).run(["out_sample"], feeds)
        return output

    def _steps(
        self,
        session: ort.InferenceSession,
        table: StepTable,
        request: Request,
        samples: range,
        seed: int,
        latents: npt.NDArray[np.float32] | None = None,
        noises: Iterator[npt.NDArray[np.float32]] | None = None,
    ) -> Generator[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, None]:
        """Yield the sample after each step; a sample that is sent replaces it.

        The next step overwrites the array. The last one is the caller's.
        """
        if not 0 <= seed < 2**63:
            raise ConfigurationError(f"seed must be in [0, 2⁶³), got {seed}")
        if samples != request.samples or request.class_shares is not None:
            request = request.of(samples, seed)
        if latents is None and noises is None:
            latents, noises = _noise(seed, samples, self.sample_shape, table.is_stochastic)
        if latents is None:
            latents = self._latents(samples, seed)
        if noises is None:
            noises = _noise_of_steps(seed, samples, self.sample_shape, table.is_stochastic)
        with self._workspace(session, table, request, len(samples)) as work:
            yield from self._play(work, table, request, samples, seed, latents, noises)

    def _play(
        self,
        work: _Workspace,
        table: StepTable,
        request: Request,
        samples: range,
        seed: int,
        latents: npt.NDArray[np.float32],
        noises: Iterator[npt.NDArray[np.float32]],
    ) -> Generator[npt.NDArray[np.float32], npt.NDArray[np.float32] | None, None]:
        shape, history, network, x = work.shape, work.history, work.network, work.x
        # The terms x, ε, x̂_0 and z of the last network calls. The newest call overwrites the oldest.
        history.fill(0)
        np.multiply(latents.reshape(-1), np.float32(table.initial_scale), out=history[0, X])
        for k, (t, w, is_stochastic, to_x_0, to_next) in enumerate(work.rows):
            place = k % len(history)
            now = history[place]
            v = network(place, t, w)
            if work.clip is not None:
                x_0 = now[X_0]
                to_x_0.dot(now[: EPS + 1], out=x_0)
                np.minimum(np.maximum(x_0, -work.clip, out=x_0), work.clip, out=x_0)
            if is_stochastic:
                now[Z].reshape(shape)[...] = next(noises)
                if table.log_variance is not None:
                    a, b = table.log_variance[k].astype(np.float32)
                    now[Z].reshape(shape)[...] *= np.exp((a * v + b) / 2)
            to_next.dot(work.terms, out=x)
            if request.known is not None and request.mask is not None and table.alphas_cumprod is not None:
                # x ← m (√ᾱ′ y + √(1 − ᾱ′) z′) + (1 − m) x, with ᾱ′ of the next call, or 1 after the last
                y = request.known
                if k + 1 < len(table):
                    z = normal(seed, samples, math.prod(self.sample_shape), range(k, k + 1), stream=1).reshape(shape)
                    alpha_cumprod = table.alphas_cumprod[k + 1]
                    y = np.float32(np.sqrt(alpha_cumprod)) * y + np.float32(np.sqrt(1 - alpha_cumprod)) * z
                x.reshape(shape)[...] = request.mask * y + (1 - request.mask) * x.reshape(shape)
            following = history[(k + 1) % len(history), X]
            following[:] = x
            is_last = k + 1 == len(table)  # another draw may take the workspace then
            if (replacement := (yield (x.copy() if is_last else x).reshape(shape))) is not None:
                following[:] = replacement.ravel()

    def _is_kept(self, table: StepTable, batch: int) -> bool:
        """Tell whether a workspace is kept for later draws: if it is small and of one of the bundle's tables."""
        size = max(batch * math.prod(self.sample_shape), len(table)) * table.history
        return size <= MAX_KEPT and any(table is kept for kept in self.tables.values())

    @contextlib.contextmanager
    def _workspace(
        self, session: ort.InferenceSession, table: StepTable, request: Request, batch: int
    ) -> Iterator[_Workspace]:
        """Yield a workspace that no other draw uses meanwhile, prepared by an earlier draw of the same kind if any."""
        shape = (batch, *self.sample_shape)
        free = self._workspaces.setdefault((id(session), table, batch), []) if self._is_kept(table, batch) else []
        while len(self._workspaces) > MAX_WORKSPACES:
            self._workspaces.pop(next(iter([*self._workspaces])), None)  # the oldest
        try:
            work = free.pop()  # in one step, so that two threads never get the same one
        except IndexError:
            work = _Workspace(session, table, request, shape, self._channels)
        try:
            work.network.give(request)
            yield work
        finally:
            free.append(work)

    def to_data_units(self, sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Turn samples in the network's units, `[batch, *sample_shape]`, into points or images as in `sample`."""
        if self.is_points:
            return sample * self._data_std + self._data_mean
        return (sample / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)

    def _read_nested_tables(self) -> dict[int, StepTable]:
        tables = {}
        for num_calls in self.info["nested_tables"]:
            path = self.folder / table_name(num_calls)
            table = StepTable.parse(read_file(self.folder, path.name, self.info), path)
            if len(table) != num_calls:
                raise BundleError(f"{path} must have {num_calls} steps, but has {len(table)}")
            if (table.log_variance is None) != (self.table.log_variance is None):
                raise BundleError(f"{path} must have a log_variance if step_table.json has one, and only then")
            tables[num_calls] = table
        return tables

    def _read_network(self) -> bytes:
        path = self.folder / "unet.onnx"
        network = read_file(self.folder, path.name, self.info)
        try:
            refers_elsewhere = has_external_data(network)
        except ValueError as error:
            raise BundleError(f"can't load {path}: {error}") from None
        if refers_elsewhere:
            raise BundleError(
                f"{path} gives the location of weights in other files, which a bundle may not: export again"
            )
        return network

    def _session(self, num_threads: int) -> ort.InferenceSession:
        if num_threads not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = num_threads
            options.log_severity_level = 4  # errors are raised, and need not be logged as well
            options.add_session_config_entry("session.load_model_format", "ONNX")
            try:
                session = ort.InferenceSession(self._network, options, providers=[self.provider])
            except Exception as error:  # the only base class of onnxruntime's errors
                raise BundleError(f"can't load {self.folder / 'unet.onnx'}: {error}") from None
            if self.provider not in session.get_providers():  # ONNX Runtime has taken the CPU instead
                raise ConfigurationError(f"{self.provider} is installed, but can't be used on this machine")
            self._sessions[num_threads] = session
        return self._sessions[num_threads]

    def _check_network(self, session: ort.InferenceSession) -> None:
        found = {value.name: value for value in (*session.get_inputs(), *session.get_outputs())}
        inputs, path = self.info["inputs"], self.folder / "unet.onnx"
        if set(found) != {*inputs, "out_sample"}:
            raise BundleError(
                f"{path} must have the inputs {', '.join(inputs[:-1])} and {inputs[-1]} and the output out_sample, "
                f"but has {', '.join(found)}"
            )
        channels, *size = self.sample_shape
        learns_variance = tuple(found["out_sample"].shape[1:]) == (2 * channels, *size)
        self._channels = 2 * channels if learns_variance or self.table.log_variance is not None else channels
        for name, expected in (("sample", self.sample_shape), ("out_sample", (self._channels, *size))):
            if tuple(found[name].shape[1:]) != expected:
                raise BundleError(
                    f"bundle.json says that a sample has the shape {self.sample_shape}, but the network's {name} has "
                    f"{tuple(found[name].shape[1:])}"
                )
        for table in self.tables.values():
            if table.is_guided.any():
                resolve(self.info, table, range(1))
        try:
            labels = None if self.info.get("null_label", 0) is not None else 0
            self.predict(np.zeros((1, *self.sample_shape)), 0, class_labels=labels)
        except Exception as error:  # such as inputs of another type, which the names and shapes don't show
            raise BundleError(f"{path} can't be run: {error}") from None


def _find_provider(name: str) -> str:
    """Return the execution provider of a name, in any case and with or without its ending."""
    available: list[str] = ort.get_available_providers()
    short = {provider.removesuffix("ExecutionProvider").lower(): provider for provider in available}
    found = short.get(name.removesuffix("ExecutionProvider").lower())
    if found is None:
        raise ConfigurationError(f"this ONNX Runtime has no provider {name!r}, only {', '.join(short)}")
    return found


class _Workspace:
    """All that a draw of one batch with a table needs besides its request: arrays, and the network bound to them.

    Attributes:
        shape: shape of x.
        history: float32 `[calls remembered, 4, size]`, with the terms of each call.
        terms: the same, `[calls remembered · 4, size]`.
        network: the network, bound to the history.
        x: float32 `[size]`, a step's result.
        rows: t, w, whether noise is added, `to_x_0`, and `to_next` in the order of `terms`, for each call.
        clip: largest magnitude of the predicted x_0, or `None`.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        table: StepTable,
        request: Request,
        shape: tuple[int, ...],
        channels: int,
    ):
        self.shape = shape
        self.history = np.zeros((table.history, 4, math.prod(shape)), dtype=np.float32)
        self.terms = self.history.reshape(-1, self.history.shape[-1])
        self.network = _Network(session, self.history, shape, request, channels, bool(table.is_guided.any()))
        self.x = np.empty(self.history.shape[-1], dtype=np.float32)
        calls = np.arange(len(table))[:, None]
        places = (calls - np.arange(table.history)) % table.history
        to_next = table.to_next[calls, places].reshape(len(table), -1).astype(np.float32)
        to_x_0, is_stochastic = table.to_x_0.astype(np.float32), table.is_stochastic.tolist()
        timesteps, w = table.timesteps.tolist(), table.guidance_scales.tolist()
        self.rows = [*zip(timesteps, w, is_stochastic, to_x_0, to_next, strict=True)]
        self.clip = None if table.clip_range is None else np.float32(table.clip_range)


class _Network:
    """The network's calls in one batch. ONNX Runtime reads x from the history and writes ε into it, without copies.

    Args:
        session: the network's session.
        history: float32 `[calls remembered, 4, size]`, with the terms of each call.
        shape: shape of x.
        request: a request with the network's other inputs; `give` sets their values.
        channels: number of the output's channels: those of x, or twice as many with a learned variance.
        is_guided: whether any call is guided.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        history: npt.NDArray[np.float32],
        shape: tuple[int, ...],
        request: Request,
        channels: int,
        is_guided: bool,
    ):
        self.session, self.batch, self.is_guided = session, shape[0], is_guided
        self.inputs = self._buffers(request, self.batch)
        self.x, self.eps = (history[:, term].reshape(-1, *shape) for term in (X, EPS))
        self.timestep = np.empty((), dtype=np.float32)
        self.output = None if channels == shape[1] else np.empty((shape[0], channels, *shape[2:]), dtype=np.float32)
        outputs = self.eps if self.output is None else [self.output] * len(history)
        self.calls = [self._bind(x, output, self.inputs) for x, output in zip(self.x, outputs, strict=True)]
        if is_guided:  # both halves in one batch
            self.both = np.empty((2 * shape[0], *shape[1:]), dtype=np.float32)
            self.outputs = np.empty((2 * shape[0], channels, *shape[2:]), dtype=np.float32)
            self.halves = self._buffers(request, 2 * self.batch)
            self.guided_call = self._bind(self.both, self.outputs, self.halves)

    @staticmethod
    def _buffers(request: Request, rows: int) -> dict[str, npt.NDArray[Any]]:
        return {name: np.empty((rows, *values.shape[1:]), values.dtype) for name, values in request.inputs.items()}

    def give(self, request: Request) -> None:
        """Set the network's inputs besides x and the timestep to those of a request."""
        for name, values in request.inputs.items():
            self.inputs[name][:] = values
            if self.is_guided:
                self.halves[name][: self.batch] = values
                self.halves[name][self.batch :] = request.null[name]

    def __call__(self, place: int, t: float, guidance_scale: float) -> npt.NDArray[np.float32] | None:
        """Write the call's ε to its place in the history; return v if the network predicts the variance."""
        self.timestep[...] = t
        x, eps = self.x[place], self.eps[place]
        batch, channels = x.shape[:2]
        if guidance_scale == 1:
            self.session.run_with_iobinding(self.calls[place])
            if self.output is None:
                return None
            eps[...] = self.output[:, :channels]
            return self.output[:, channels:]
        self.both[:batch] = self.both[batch:] = x
        self.session.run_with_iobinding(self.guided_call)
        conditional, null = self.outputs[:batch, :channels], self.outputs[batch:, :channels]
        w = np.float32(guidance_scale)
        eps[...] = w * conditional + (1 - w) * null
        return self.outputs[:batch, channels:]

    def _bind(
        self, x: npt.NDArray[np.float32], output: npt.NDArray[np.float32], inputs: dict[str, npt.NDArray[Any]]
    ) -> ort.IOBinding:
        binding = self.session.io_binding()
        for name, values in {"sample": x, "timestep": self.timestep, **inputs}.items():
            binding.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)
        binding.bind_output("out_sample", "cpu", 0, np.float32, output.shape, output.ctypes.data)
        return binding


def _noise(
    seed: int, samples: range, sample_shape: tuple[int, ...], is_stochastic: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], Iterator[npt.NDArray[np.float32]]]:
    """Return x_T, of variance 1, and the noises of `_noise_of_steps`. If these are few, draw all of them at once."""
    used, dimension = np.flatnonzero(is_stochastic), math.prod(sample_shape)
    draws = int(used[-1]) + 2 if len(used) else 1
    shape = (len(samples), *sample_shape)
    if draws * len(samples) * dimension > NOISE_CHUNK:
        latents = normal(seed, samples, dimension, range(1))[0]
        return latents.reshape(shape), _noise_of_steps(seed, samples, sample_shape, is_stochastic)
    noises = normal(seed, samples, dimension, range(draws)).reshape(draws, *shape)
    return noises[0], (noises[k + 1] for k in used.tolist())


def _noise_of_steps(
    seed: int, samples: range, sample_shape: tuple[int, ...], is_stochastic: npt.NDArray[np.bool_]
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the noise of each step that adds any, `[len(samples), *sample_shape]`, drawn for many steps at once."""
    dimension, steps = math.prod(sample_shape), len(is_stochastic)
    chunk = max(1, NOISE_CHUNK // (len(samples) * dimension))
    for start in range(0, steps, chunk):
        stop = min(start + chunk, steps)
        if not is_stochastic[start:stop].any():
            continue
        noises = normal(seed, samples, dimension, range(start + 1, stop + 1))  # draw 0 is the initial sample
        noises = noises.reshape(stop - start, len(samples), *sample_shape)
        yield from noises[is_stochastic[start:stop]]
