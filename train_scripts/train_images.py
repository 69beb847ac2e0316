"""Train a DDPM on images: accelerate launch train_scripts/train_images.py --dataset_name NAME --output_dir FOLDER"""

from ddpm_mlp_pipeline.commands.console import train_images

if __name__ == "__main__":
    train_images()
