# Comes with the package: the code is the package's own. (A checkpoint that you save carries a copy of it.)
from ddpm_mlp_pipeline.models.mlp import MLPModel

__all__ = ["MLPModel"]
