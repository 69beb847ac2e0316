"""The state of a training run on disk, from which it goes on after any end, and the signals that end it in order."""

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
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from ..errors import CheckpointError
from ..files import PARTIAL, find_foreign, remove_partial, rename_durably
from ..pipeline import DDPMMLPPipeline

MANIFEST = "manifest.json"  # the SHA-256 of every other file
PROGRESS = "progress_{}.bin"  # what Accelerate doesn't save: the losses and the average of the weights, by process


class Checkpoints:
    """A run's folders `checkpoint-<step>`, each of which appears whole or not at all.

    Weights, optimizer, learning rate and random states are saved by Accelerate, the rest beside them. Nothing that a
    folder holds is run when it is loaded. (FSDP and DeepSpeed read their parts in their own way, which may run some.)

    Args:
        accelerator: whose prepared objects make up the state.
        pipeline: the network's and the scheduler's configurations, which a state belongs to.
        ema: the average of the weights, if there is one.
        output_dir: where the folders are.
        limit: how many of them to keep; by default all.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        pipeline: DDPMMLPPipeline,
        ema: EMAModel | None,
        output_dir: Path,
        limit: int | None = None,
    ):
        self.accelerator, self.pipeline, self.ema = accelerator, pipeline, ema
        self.output_dir, self.limit = output_dir, limit

    def save(self, losses: list[float]) -> None:
        """Save the state after `len(losses)` steps; then let the oldest states go, if there are more than the limit.

        Raises:
            CheckpointError, OSError: if it can't be written, as on a full disk. The states before it stay.
        """
        folder = self.output_dir / f"checkpoint-{len(losses)}"
        partial = folder.with_name(PARTIAL + folder.name)
        try:
            with explain_writing(folder):
                self.accelerator.save_state(partial)
                ema = None if self.ema is None else self.ema.state_dict()
                progress = {"losses": losses, "ema": ema, "data": self._data}
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
        """Clear away what a killed process left half written, and load a state.

        Args:
            name: a folder's name, `"latest"` for the newest whole one, if there is any yet, or `None` to begin anew.

        Returns:
            The loss of every step so far.

        Raises:
            CheckpointError: if there is no such state, or it is broken, another model's, of other data or of another
                number of processes; or if there are later ones, of which this run would make a muddle.
        """
        if self.accelerator.is_main_process:
            for written in (self.output_dir, self.output_dir / "samples"):
                remove_partial(written)
        folder = self._latest() if name == "latest" else self._named(name)
        losses = [] if folder is None else self._load(folder)
        later = [path for path in find_states(self.output_dir) if _step(path) > len(losses)]
        if later:
            raise CheckpointError(
                f"{later[-1]} is of an earlier run, which this one would muddle: go on with "
                "--resume_from_checkpoint latest, remove it, or choose another --output_dir"
            )
        self._remove_old()
        return losses

    @property
    def last_good(self) -> str:
        """The newest state, in the words of an error message."""
        folders = find_states(self.output_dir)
        return f"the last good checkpoint is {folders[-1]}" if folders else "there is no checkpoint to go back to"

    @property
    def _data(self) -> dict[str, Any]:
        """What tells data of points from others, as far as the pipeline knows them."""
        return {name: value for name, value in self.pipeline.config.items() if name.startswith("data_")}

    def _remove_old(self) -> None:
        if self.accelerator.is_main_process and self.limit is not None:
            for old in find_states(self.output_dir)[: -self.limit]:
                if _is_own(old):
                    partial = old.with_name(PARTIAL + old.name)
                    old.rename(partial)  # a state that is there is there whole
                    shutil.rmtree(partial)

    def _latest(self) -> Path | None:
        folders, broken = find_states(self.output_dir), []
        if not folders:
            self.accelerator.print(f"{self.output_dir} holds no checkpoint-<step> yet: beginning at step 0")
            return None
        for folder in reversed(folders):
            fault = _fault(folder)
            if fault is None:
                break
            broken.append(folder)
            self.accelerator.print(f"{folder} is broken ({fault}): it is put aside as {folder.name}.broken")
        else:
            raise CheckpointError(f"{self.output_dir} holds no checkpoint-<step> that is whole")
        self.accelerator.wait_for_everyone()  # until all have seen the same folders
        if self.accelerator.is_main_process:
            for other in broken:
                shutil.rmtree(f"{other}.broken", ignore_errors=True)
                other.rename(f"{other}.broken")
        self.accelerator.wait_for_everyone()
        return folder

    def _named(self, name: str | None) -> Path | None:
        if name is None:
            return None
        for folder in (self.output_dir / name, Path(name)):
            if folder.is_dir():
                fault = _fault(folder)
                if fault is not None:
                    raise CheckpointError(f"can't resume from {folder}: {fault}")
                return folder
        raise CheckpointError(f"there is no folder {name} to resume from")

    def _load(self, folder: Path) -> list[float]:
        try:
            saved_by = len(list(folder.glob(PROGRESS.format("*"))))
            if saved_by != self.accelerator.num_processes:
                raise ValueError(f"it was saved by {saved_by} processes, not {self.accelerator.num_processes}")
            file = folder / PROGRESS.format(self.accelerator.process_index)
            progress = torch.load(file, map_location="cpu", weights_only=True)
            if progress.get("data", self._data) != self._data:
                raise ValueError("it is of other data, or of another --dataset_size, --dataset_noise or --seed")
            self._check_configs(folder)
            if (progress["ema"] is None) != (self.ema is None):
                raise ValueError(f"it was saved with{'out' if self.ema else ''} --use_ema")
            self.accelerator.load_state(folder, load_kwargs={"weights_only": True})
            if self.ema is not None:
                self.ema.load_state_dict(progress["ema"])
                self.ema.to(self.accelerator.device)
        except Exception as error:  # torch's, Accelerate's and safetensors' errors have no base in common
            raise CheckpointError(f"can't resume from {folder}: {error}") from None
        return progress["losses"]

    def _check_configs(self, folder: Path) -> None:
        for name in ("unet", "scheduler"):
            component = getattr(self.pipeline, name)
            for key, value in component.load_config(folder / name).items():
                ours = component.config.get(key)
                if not key.startswith("_") and _plain(ours) != value:
                    raise ValueError(f"its {name} has {key} {value}, not {ours}")


@contextlib.contextmanager
def explain_writing(folder: Path) -> Iterator[None]:
    """Safetensors and torch have errors of their own for a full disk."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"can't write {folder}: {error}") from None


@contextlib.contextmanager
def deferred_signals(accelerator: Accelerator) -> Iterator[list[int]]:
    """Within the block, Ctrl-C and SIGTERM pull Accelerate's trigger instead of stopping the program in the middle of
    a step. Yields the signals that this process has received so far."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals are the main thread's
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
    """A run's folders `checkpoint-<step>`, oldest first."""
    states = folder.glob("checkpoint-*")
    return sorted((path for path in states if path.name.partition("-")[2].isdigit()), key=_step)


def resumes_in(output_dir: Path, name: str | None) -> bool:
    """Whether a run goes on from a folder in `output_dir`, where `name` is what `Checkpoints.begin` takes, which says
    whether that is a state."""
    if name is None or name == "latest":
        return name is not None and bool(find_states(output_dir))
    folders = [folder for folder in (Path(name), output_dir / name) if folder.is_dir()]
    return any(folder.resolve().parent == output_dir.resolve() for folder in folders)


def _is_own(folder: Path) -> bool:
    """Whether a state's folder holds nothing but what was saved there."""
    try:
        files = [MANIFEST, *json.loads((folder / MANIFEST).read_text())]
        own = {*files, *(f"{parent.as_posix()}/" for file in files for parent in Path(file).parents)}
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return find_foreign(folder, own.__contains__) is None


def _step(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def _fault(folder: Path) -> str | None:
    """What is wrong with a state's files, if anything."""
    try:
        expected, found = json.loads((folder / MANIFEST).read_text()), _checksums(folder)
        wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
    except (OSError, ValueError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or can't be read"
    if wrong:
        return f"{wrong[0]} is {'not as it was saved' if wrong[0] in found else 'missing'}"
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


def _plain(value: object) -> object:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value
