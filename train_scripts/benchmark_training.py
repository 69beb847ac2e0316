"""Compare ways of training: python train_scripts/benchmark_training.py --help"""

from ddpm_mlp_pipeline.commands.console import benchmark_training

if __name__ == "__main__":
    benchmark_training()
