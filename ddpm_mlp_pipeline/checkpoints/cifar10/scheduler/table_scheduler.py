# Comes with the package: the code is the package's own. (A checkpoint that you save carries a copy of it.)
from ddpm_mlp_pipeline.table_scheduler import StepTableScheduler

__all__ = ["StepTableScheduler"]
