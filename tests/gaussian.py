"""Gaussian data, and the exact network for them."""

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput

from ddpm_mlp_pipeline import DDPMMLPPipeline
from ddpm_mlp_pipeline.data.batches import TensorBatches

VARIANCE = 0.25  # of each coordinate of the Gaussian data


class GaussianModel(ModelMixin, ConfigMixin):
    """The exact ε for data N(0, VARIANCE): E[ε | x_t] = σ x_t / (α² VARIANCE + σ²)."""

    @register_to_config
    def __init__(self, in_channels=2, sample_size=None, scale=1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(scale))
        self.register_buffer("alphas_cumprod", DDPMScheduler().alphas_cumprod, persistent=False)

    def forward(self, sample, timestep, return_dict=True):
        places = torch.as_tensor(timestep).clamp(0, len(self.alphas_cumprod) - 1)
        low = places.detach().floor().long().clamp(max=len(self.alphas_cumprod) - 2)
        log_snr = torch.logit(self.alphas_cumprod)
        log_snr = log_snr[low] + (places - low) * (log_snr[low + 1] - log_snr[low])
        alpha_cumprod = torch.sigmoid(log_snr).reshape(-1, 1)  # one for all, or one for each
        eps = (1 - alpha_cumprod).sqrt() * sample / (alpha_cumprod * VARIANCE + 1 - alpha_cumprod)
        return UNet2DOutput(sample=self.factor * eps)


def gaussian_pipeline(**options):
    pipe = DDPMMLPPipeline(GaussianModel(**options), DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def gaussian_data(number=4000):
    x = torch.randn(number, 2, generator=torch.Generator().manual_seed(9))
    return TensorBatches(VARIANCE**0.5 * x)
