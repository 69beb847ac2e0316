"""Export a checkpoint: `python -m export CHECKPOINT BUNDLE` is the same as `ddpm-export CHECKPOINT BUNDLE`."""

from ddpm_mlp_pipeline.commands.console import export

if __name__ == "__main__":
    export()
