"""Export a checkpoint: python -m export CHECKPOINT BUNDLE, the same as ddpm-export."""

from ddpm_mlp_pipeline.commands.console import export

if __name__ == "__main__":
    export()
