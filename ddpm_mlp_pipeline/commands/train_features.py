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
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
    from torch.utils.data import DataLoader

    from ..data.batches import Batch, TensorBatches
    from ..data.images import load_labelled_images, mirror_half
    from ..files import PARTIAL, check_names, move_into
    from ..judge.features import FeatureNetwork
    from ..progress import progress_bar
    from ..training.options import option, widths_of
    from .presets import parse_options


@dataclasses.dataclass(kw_only=True)
class FeatureTrainingArguments:
    """The options of the classifier's training."""

    dataset_name: str = option(help="a data set with images and labels, and the splits train and test")
    label_column: str = option("label", "column of the labels")
    output_dir: str = option(help="folder for the network")
    overwrite_output_dir: bool = option(False, "replace an existing network")
    block_out_channels: str = option("32,64,128", "width at each resolution, separated by commas")
    layers_per_block: int = option(1, "convolutions at each resolution")
    train_batch_size: int = option(128, "batch size")
    num_epochs: int = option(8, "passes over the data set")
    learning_rate: float = option(3e-3, "peak learning rate of AdamW, with a one-cycle schedule")
    label_smoothing: float = option(0.0, "share of each target that is spread over all classes")
    max_shift: int = option(2, "maximum shift of the images, in pixels")
    random_flip: bool = option(
        False, "mirror half of the images, left to right, and take means of both for the features"
    )
    mixed_precision: str = option("no", "precision of the forward pass", choices=["no", "bf16"])
    seed: int = option(0, "seed of the weights and of the order of the data")

    def __post_init__(self) -> None:
        least = {"train_batch_size": 1, "num_epochs": 1, "layers_per_block": 1, "max_shift": 0}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise ConfigurationError(f"{name} must be at least {number}, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")


def shift(images: torch.Tensor, max_shift: int) -> torch.Tensor:
    """Shift each image, `[batch, channels, height, width]`, at random by up to `max_shift` pixels; add zeros."""
    number, channels, height, width = images.shape
    padded = F.pad(images, (max_shift,) * 4)
    of_row, of_column = torch.randint(2 * max_shift + 1, (2, number, 1), device=images.device)
    rows = (of_row + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (of_column + torch.arange(width, device=images.device))[:, None, None, :]
    places = (torch.arange(length, device=images.device) for length in (number, channels))
    image, channel = torch.meshgrid(*places, indexing="ij")
    return padded[image[:, :, None, None], channel[:, :, None, None], rows, columns]


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
    widths = widths_of(args.block_out_channels)
    network = FeatureNetwork(
        images.shape[2],
        images.shape[1],
        num_classes=len(class_names),
        block_out_channels=widths,
        layers_per_block=args.layers_per_block,
        mirrored=args.random_flip,
    )

    output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    device = accelerator.device
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.learning_rate, fused=True)
    data = TensorBatches(images, labels).to_accelerator(device)
    loader: DataLoader[Batch] = DataLoader(
        data, args.train_batch_size, shuffle=True, drop_last=True, collate_fn=lambda batch: batch
    )
    steps = args.num_epochs * len(loader)
    lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    with progress_bar(total=steps, desc="training") as progress:
        for _ in range(args.num_epochs):
            for batch in loader:
                x_0, targets, _ = batch.to(device)
                if args.random_flip:
                    x_0 = mirror_half(x_0, torch.rand(len(x_0), device=device))
                with accelerator.autocast():
                    logits = network.logits(shift(x_0, args.max_shift))
                    loss = F.cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
                loss.backward()
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
