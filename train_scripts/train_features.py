"""Train the feature network of the Fréchet distance: python train_scripts/train_features.py --help"""

from ddpm_mlp_pipeline.commands.console import train_features

if __name__ == "__main__":
    train_features()
