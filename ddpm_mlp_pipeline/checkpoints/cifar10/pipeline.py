# Comes with the package: the code is the package's own. (A checkpoint that you save carries a copy of it.)
from ddpm_mlp_pipeline.pipeline import DDPMMLPPipeline

__all__ = ["DDPMMLPPipeline"]
