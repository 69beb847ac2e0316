"""Train a DDPM on points: accelerate launch train_scripts/train_points.py --dataset heart --output_dir runs/heart"""

from ddpm_mlp_pipeline.commands.console import train_points

if __name__ == "__main__":
    train_points()
