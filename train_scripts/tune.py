"""Tune a checkpoint to a few network calls: accelerate launch train_scripts/tune.py --checkpoint CHECKPOINT …"""

from ddpm_mlp_pipeline.commands.console import tune

if __name__ == "__main__":
    tune()
