"""Train a DDPM on a table: accelerate launch train_scripts/train_table.py --dataset FILE --output_dir FOLDER"""

from ddpm_mlp_pipeline.commands.console import train_table

if __name__ == "__main__":
    train_table()
