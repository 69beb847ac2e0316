"""The checkpoints that come with the package."""

from pathlib import Path

from ..errors import ConfigurationError

# The feature networks that Fréchet distances are taken on, by the images' number of channels
FEATURES = {1: Path(__file__).parent / "mnist_features", 3: Path(__file__).parent / "cifar10_features"}


def shipped() -> dict[str, Path]:
    """The folders of the checkpoints that the package ships, by name."""
    return {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/model_index.json"))}


def pretrained(name: str) -> Path:
    """The folder of a checkpoint that the package ships, for `DDPMMLPPipeline.from_pretrained`.

    Raises:
        ConfigurationError: if there is no such checkpoint; it lists those there are.
    """
    folders = shipped()
    if name not in folders:
        raise ConfigurationError(f"no shipped checkpoint is called {name!r}; there are: {', '.join(folders)}")
    return folders[name]
