"""Entry points for `accelerate launch`, installed as `ddpm_mlp_pipeline.train_scripts`."""
