"""Write a trained checkpoint's model card, and push both to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

from ..errors import ConfigurationError
from ..files import PARTIAL, whole_file
from ..pipeline import DDPMMLPPipeline
from .options import TrainingArguments

CARD = """---
{metadata}
---

# {name}

A small DDPM, trained with ddpm-mlp-pipeline, a plugin for 🤗 diffusers.

{picture}```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)
samples = pipeline(batch_size=16)[0]
{of_a_class}```

With the plugin installed, `DDPMMLPPipeline.from_pretrained` does the same and runs no code from this folder;
`ddpm-export` turns the folder into one that samples without PyTorch.

## Training

{parameters:,} parameters, {steps:,} optimizer steps, with these options:

```yaml
{options}```
"""
CARD_NAME = "README.md"
# Options that the card omits
LOCAL = ["output_dir", "overwrite_output_dir", "logging_dir", "resume_from_checkpoint", "report_to"]


def write_model_card(args: TrainingArguments, pipeline: DDPMMLPPipeline, num_steps: int, dataset: str) -> None:
    """Write a run's `README.md`, with samples, options and an example. An existing one is replaced.

    Args:
        args: the run's options.
        pipeline: the trained pipeline.
        num_steps: number of optimizer steps.
        dataset: the data set's name, which goes into the card's metadata if it is an image data set on the hub.
    """
    folder = Path(args.output_dir)
    data = ModelCardData(
        library_name="diffusers",
        tags=["ddpm", "points" if pipeline.is_points else "unconditional-image-generation", "ddpm-mlp-pipeline"],
        datasets=None if pipeline.is_points or Path(dataset).exists() else [dataset],  # names on the hub
    )
    options = {
        name: value for name, value in dataclasses.asdict(args).items() if value is not None and name not in LOCAL
    }
    of_a_class = ""
    if pipeline.class_names:
        label = json.dumps(pipeline.class_names[0], ensure_ascii=False)
        of_a_class = f"samples = pipeline(batch_size=16, class_labels={label})[0]\n"
    text = CARD.format(
        metadata=data.to_yaml(),
        name=folder.resolve().name,
        picture="![Samples, beside the data](samples.png)\n\n" if (folder / "samples.png").exists() else "",
        repo_id=args.hub_model_id or folder.resolve().name,
        of_a_class=of_a_class,
        parameters=pipeline.unet.num_parameters(),
        steps=num_steps,
        options=yaml.safe_dump(options),
    )
    with whole_file(folder / CARD_NAME, overwrite=True) as path:
        ModelCard(text).save(path)


def create_repo(args: TrainingArguments) -> str:
    """Create the run's repository unless it exists. Call it before training, so that a missing login costs no work.

    Returns:
        The repository's full name, with the user or organisation.

    Raises:
        ConfigurationError: if the hub can't be reached or refuses.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    with _explained(f"can't push to the hub as {name}"):
        return HfApi().create_repo(name, private=args.hub_private_repo or None, exist_ok=True).repo_id


def push(repo_id: str, args: TrainingArguments) -> str:
    """Push a run's folder without its training states and logs.

    Returns:
        The URL of the commit.

    Raises:
        ConfigurationError: if the hub can't be reached or refuses.
    """
    ignored = ["checkpoint-*", f"{args.logging_dir}/*", f"{PARTIAL}*"]
    with _explained(f"{args.output_dir} is complete, but can't be pushed to the hub as {repo_id}"):
        commit = HfApi().upload_folder(repo_id=repo_id, folder_path=args.output_dir, ignore_patterns=ignored)
    return commit.commit_url


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigurationError(f"{what}: {str(error).strip().splitlines()[0]}") from None
