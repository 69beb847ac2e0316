"""Train a classifier of labelled images, the feature network of the Fréchet distance:
python train_scripts/train_features.py --dataset_name NAME --output_dir FOLDER"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError, DatasetError
from .parser import command, command_imports

with command_imports("training", __name__):
    import torch
    import torch.nn.functional as F
    from accelerate.utils import set_seed
    from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from torch.utils.data import DataLoader, TensorDataset

    from ..data.images import load_labelled_images
    from ..files import PARTIAL, check_names, move_into
    from ..judge.features import FeatureNetwork
    from ..progress import progress_bar
    from ..training.options import option
    from .presets import parse_options


@dataclasses.dataclass(kw_only=True)
class FeatureTrainingArguments:
    """The options of the classifier's training."""

    dataset_name: str = option(help="a data set with images and labels, and the splits train and test")
    label_column: str = option("label", "column of the labels")
    output_dir: str = option(help="folder for the network")
    overwrite_output_dir: bool = option(False, "replace an existing network")
    train_batch_size: int = option(128, "batch size")
    num_epochs: int = option(8, "passes over the data set")
    learning_rate: float = option(3e-3, "peak learning rate of Adam, with a one-cycle schedule")
    max_shift: int = option(2, "maximum shift of the images, in pixels")
    seed: int = option(0, "seed of the weights and of the order of the data")

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "num_epochs"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_options(FeatureTrainingArguments, argv, __doc__)
    output_dir = Path(args.output_dir)
    check_names(output_dir, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME], args.overwrite_output_dir)
    set_seed(args.seed)
    images, labels, class_names = load_labelled_images(args.dataset_name, args.label_column, "train")
    test_images, test_labels, _ = load_labelled_images(args.dataset_name, args.label_column, "test")
    assert labels is not None  # a column is named
    assert test_labels is not None
    if images.shape[2] != images.shape[3]:
        raise DatasetError(f"the images of {args.dataset_name} must be square, got {tuple(images.shape[2:])}")
    network = FeatureNetwork(images.shape[2], images.shape[1], num_classes=len(class_names))

    output_dir.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    loader = DataLoader(TensorDataset(images, labels), args.train_batch_size, shuffle=True, drop_last=True)
    steps = args.num_epochs * len(loader)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    with progress_bar(total=steps, desc="training") as progress:
        for _ in range(args.num_epochs):
            for batch, targets in loader:
                shifts = torch.randint(-args.max_shift, args.max_shift + 1, (2,)).tolist()
                logits = network.logits(batch.roll(shifts, dims=(2, 3)).to(device))
                F.cross_entropy(logits, targets.to(device)).backward()
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
                progress.update()

    network.eval()
    with torch.no_grad():
        batches = zip(test_images.split(500), test_labels.split(500), strict=True)
        right = sum((network.logits(batch.to(device)).argmax(1).cpu() == targets).sum() for batch, targets in batches)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=output_dir) as folder:
        network.save_pretrained(folder)
        move_into(Path(folder), output_dir, last=CONFIG_NAME)
    print(f"{args.output_dir}: {int(right)} of {len(test_images)} test images classified correctly")


if __name__ == "__main__":
    main()
