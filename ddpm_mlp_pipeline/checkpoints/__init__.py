"""The checkpoints that come with the package."""

from pathlib import Path

from ..errors import ConfigurationError

FEATURES = Path(__file__).parent / "mnist_features"  # the feature network that Fréchet distances are taken on


def pretrained(name: str) -> Path:
    """The folder of a checkpoint that the package ships, for `DDPMMLPPipeline.from_pretrained`.

    Raises:
        ConfigurationError: if there is no such checkpoint; it lists those there are.
    """
    folders = {path.parent.name: path.parent for path in Path(__file__).parent.glob("*/model_index.json")}
    if name not in folders:
        raise ConfigurationError(f"no shipped checkpoint is called {name!r}; there are: {', '.join(sorted(folders))}")
    return folders[name]
