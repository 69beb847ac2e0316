"""Save and load the state of a training run, and defer signals until it is saved."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from ..errors import CheckpointError
from ..files import PARTIAL, find_foreign, remove_partial, rename_durably
from ..pipeline import DDPMMLPPipeline

MANIFEST = "manifest.json"  # the SHA-256 of every other file
PROGRESS = "progress_{}.bin"  # what Accelerate doesn't save, by process: the losses, the EMA, what it has to fit


class Checkpoints:
    """A run's folders `checkpoint-<step>`, which are written atomically.

    Accelerate saves weights, optimizer, learning rate and random states; this class saves the rest. Loading a state
    runs no code from it, unless FSDP has saved it in shards (`SHARDED_STATE_DICT`).

    Args:
        accelerator: the accelerator whose prepared objects make up the state.
        pipeline: the pipeline. A state is loaded only into the same configurations of network and scheduler.
        ema: the exponential moving average of the weights, if there is one.
        total_batch_size: number of samples in a batch of all processes.
        output_dir: the folder of the states.
        limit: maximum number of states to keep; by default all.
        any_processes: whether a state may go on with another number of processes, because each draws the random
            numbers of all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: DDPMMLPPipeline,
        ema: EMAModel | None,
        total_batch_size: int,
        output_dir: Path,
        limit: int | None = None,
        any_processes: bool = False,
    ):
        self.accelerator, self.pipeline, self.ema = accelerator, pipeline, ema
        self.total_batch_size, self.output_dir, self.limit = total_batch_size, output_dir, limit
        self.any_processes = any_processes

    def save(self, losses: list[float]) -> None:
        """Save the state after `len(losses)` steps, then delete the oldest states beyond the limit.

        Raises:
            CheckpointError, OSError: if the state can't be written, as on a full disk. Earlier states are unchanged.
        """
        folder = self.output_dir / f"checkpoint-{len(losses)}"
        partial = folder.with_name(PARTIAL + folder.name)
        try:
            with explain_writing(folder):
                self.accelerator.save_state(partial)
                ema = None if self.ema is None else self.ema.state_dict()
                progress = {"losses": losses, "ema": ema, "data": self._data, "batch": self.total_batch_size}
                progress["device"] = self.accelerator.device.type
                progress["random"] = _random_of(self.accelerator.device).get_rng_state()
                torch.save(progress, partial / PROGRESS.format(self.accelerator.process_index))
                self.accelerator.wait_for_everyone()
                if self.accelerator.is_main_process:
                    self.pipeline.unet.save_config(partial / "unet")
                    self.pipeline.scheduler.save_config(partial / "scheduler")
                    (partial / MANIFEST).write_text(json.dumps(_checksums(partial), indent=2))
                    rename_durably(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._remove_old()

    def begin(self, name: str | None) -> list[float]:
        """Delete what killed processes left unfinished, and load a state.

        Args:
            name: a folder's name, `"latest"` for the newest intact state, if there is any, or `None` to start anew.

        Returns:
            The loss of every step so far.

        Raises:
            CheckpointError: if the state is missing, damaged, or of another model, other data or another number of
                processes; or if the folder holds later states, which this run would mix with its own.
        """
        if self.accelerator.is_main_process:
            for written in (self.output_dir, self.output_dir / "samples"):
                remove_partial(written)
        folder = self._latest() if name == "latest" else self._named(name)
        losses = [] if folder is None else self._load(folder)
        later = [path for path in find_states(self.output_dir) if _step(path) > len(losses)]
        if later:
            raise CheckpointError(
                f"{later[-1]} belongs to an earlier run: pass --resume_from_checkpoint latest, delete it, or choose "
                "another --output_dir"
            )
        self._remove_old()
        return losses

    @property
    def last_good(self) -> str:
        """The newest state, for error messages."""
        folders = find_states(self.output_dir)
        return f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint to go back to"

    @property
    def _data(self) -> dict[str, Any]:
        """The part of the pipeline's configuration that identifies the data."""
        return {name: value for name, value in self.pipeline.config.items() if name.startswith("data_")}

    def _remove_old(self) -> None:
        if self.accelerator.is_main_process and self.limit is not None:
            for old in find_states(self.output_dir)[: -self.limit]:
                if _is_own(old):
                    partial = old.with_name(PARTIAL + old.name)
                    old.rename(partial)  # so that an incomplete state never has a state's name
                    shutil.rmtree(partial)

    def _latest(self) -> Path | None:
        folders, broken = find_states(self.output_dir), []
        if not folders:
            self.accelerator.print(f"{self.output_dir} holds no checkpoint-<step> yet: starting at step 0")
            return None
        for folder in reversed(folders):
            if (fault := _fault(folder)) is None:
                break
            broken.append(folder)
            self.accelerator.print(f"{folder} is broken ({fault}): renamed to {folder.name}.broken")
        else:
            raise CheckpointError(f"{self.output_dir} holds no intact checkpoint-<step>")
        self.accelerator.wait_for_everyone()  # all must see the folders before they are renamed
        if self.accelerator.is_main_process:
            for other in broken:
                shutil.rmtree(f"{other}.broken", ignore_errors=True)
                other.rename(f"{other}.broken")
        self.accelerator.wait_for_everyone()
        return folder

    def _named(self, name: str | None) -> Path | None:
        if name is None:
            return None
        folder = next((path for path in (self.output_dir / name, Path(name)) if path.is_dir()), None)
        if folder is None:
            raise CheckpointError(f"there is no folder {name} to resume from")
        if (fault := _fault(folder)) is not None:
            raise CheckpointError(f"can't resume from {folder}: {fault}")
        return folder

    def _load(self, folder: Path) -> list[float]:
        try:
            saved_by, process = len(list(folder.glob(PROGRESS.format("*")))), self.accelerator.process_index
            # With `any_processes`, all have the same progress and random numbers.
            file = folder / PROGRESS.format(process if process < saved_by else 0)
            progress = torch.load(file, map_location="cpu", weights_only=True)
            self._check_processes(saved_by, progress)
            if progress.get("data", self._data) != self._data:
                raise ValueError("its data differ: pass the same data, --dataset_size, --dataset_noise and --seed")
            for name in ("unet", "scheduler"):
                component = getattr(self.pipeline, name)
                own = json.loads(component.to_json_string())
                for key, value in component.load_config(folder / name).items():
                    if not key.startswith("_") and own.get(key) != value:
                        raise ValueError(f"its {name} has {key} {value}, not {own.get(key)}")
            if (progress["ema"] is None) != (self.ema is None):
                raise ValueError(f"it was saved with{'out' if self.ema else ''} --use_ema")
            self.accelerator.load_state(folder, load_kwargs={"weights_only": True})
            if saved_by != self.accelerator.num_processes:
                _random_of(self.accelerator.device).set_rng_state(progress["random"])
            self._lay_out()
            if self.ema is not None:
                self.ema.load_state_dict(progress["ema"])
                self.ema.to(self.accelerator.device)
        except Exception as error:  # the errors of torch, Accelerate and safetensors have no common base class
            raise CheckpointError(f"can't resume from {folder}: {error}") from None
        return progress["losses"]

    def _check_processes(self, saved_by: int, progress: dict[str, Any]) -> None:
        """Refuse another batch of all processes, and another number of processes where that changes the training."""
        number, device = self.accelerator.num_processes, self.accelerator.device.type
        if "batch" not in progress:
            if saved_by == number == 1:
                return
            raise ValueError("it is of an earlier version, whose states go on in one process only")
        if (batch := progress["batch"]) != self.total_batch_size:
            what = f"a batch of its {saved_by} processes had {batch} samples in all, not {self.total_batch_size}"
            how = f"--train_batch_size {batch // number}" if batch % number == 0 else "another number of processes"
            raise ValueError(f"{what}: pass {how}")
        if saved_by == number:
            return
        if not self.any_processes or self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(f"it was saved by {saved_by} processes, not {number}")
        if progress["device"] != device:
            raise ValueError(
                f"its {saved_by} processes ran on {progress['device']}, whose random numbers {device} lacks"
            )

    def _lay_out(self) -> None:
        """Give the optimizer's state the memory layout of its parameters: the fused Adam reads both as they lie."""
        for optimizer in self.accelerator._optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if value.shape == parameter.shape and value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter).copy_(value)


def _random_of(device: torch.device) -> Any:
    """Return the module of torch that has the state of a device's random numbers."""
    return torch.random if device.type == "cpu" else torch.get_device_module(device)


@contextlib.contextmanager
def explain_writing(folder: Path) -> Iterator[None]:
    """Turn the errors of safetensors and torch for a full disk into a `CheckpointError`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"can't write {folder}: {error}") from None


@contextlib.contextmanager
def deferred_signals(accelerator: Accelerator) -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM set Accelerate's trigger instead of stopping the program in the middle of a step.

    Yield the list of the signals that this process has received so far.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can handle signals
        return

    def note(signum: int, frame: object) -> None:
        received.append(signum)
        accelerator.set_trigger()

    previous = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def find_states(folder: Path) -> list[Path]:
    """Return a run's folders `checkpoint-<step>`, oldest first."""
    states = folder.glob("checkpoint-*")
    return sorted((path for path in states if path.name.partition("-")[2].isdigit()), key=_step)


def resumes_in(output_dir: Path, name: str | None) -> bool:
    """Return whether a run with `--resume_from_checkpoint name` resumes from a folder in `output_dir`.

    `Checkpoints.begin` checks whether that folder is a state.
    """
    if name is None or name == "latest":
        return name is not None and bool(find_states(output_dir))
    folders = [folder for folder in (Path(name), output_dir / name) if folder.is_dir()]
    return any(folder.resolve().parent == output_dir.resolve() for folder in folders)


def _is_own(folder: Path) -> bool:
    """Return whether a state's folder holds only files of the state."""
    try:
        files = [MANIFEST, *json.loads((folder / MANIFEST).read_text())]
        own = {*files, *(f"{parent.as_posix()}/" for file in files for parent in Path(file).parents)}
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return find_foreign(folder, own.__contains__) is None


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _fault(folder: Path) -> str | None:
    """Return what is wrong with a state's files; `None` if they are intact."""
    try:
        expected, found = json.loads((folder / MANIFEST).read_text()), _checksums(folder)
        wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or can't be read"
    if wrong:
        return f"{wrong[0]} is {'damaged' if wrong[0] in found else 'missing'}"
    return None


def _checksums(folder: Path) -> dict[str, str]:
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            sha = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    sha.update(chunk)
            checksums[path.relative_to(folder).as_posix()] = sha.hexdigest()
    return checksums
