# Comes with the package: the code is the package's own. (A checkpoint that you save carries a copy of it.)
from ddpm_mlp_pipeline.models.unet import SmallUNet2DModel

__all__ = ["SmallUNet2DModel"]
