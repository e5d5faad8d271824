"""UNets that know the answer for images of a known distribution, and what is drawn with them."""

import pytest
import torch
from diffusers import ConfigMixin, DDPMScheduler, ModelMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput

from dia_diffusion import DIAUNetPipeline

MEAN, STD = 0.3, 0.4


class GaussianUNet(ModelMixin, ConfigMixin):
    """The exact prediction for images whose pixels are independent, of mean `MEAN` and standard deviation `STD`.

    With x_t = a x_0 + b n, all Gaussian: E[n | x_t] = b (x_t - a mean) / (a² std² + b²), and likewise for x_0 and
    v = a n - b x_0.
    """

    @register_to_config
    def __init__(self, kind="epsilon", sample_size=32, in_channels=1, num_class_embeds=None):
        super().__init__()
        self.class_embedding = None
        self.weight = torch.nn.Parameter(torch.zeros(1))
        signal = DDPMScheduler().alphas_cumprod
        self.sigmas = ((1 - signal) / signal).sqrt().double()

    def noise_level(self, timestep):
        """b / a at a timestep; between two of them interpolated as the schedulers do."""
        timestep = torch.as_tensor(timestep).double().clamp(0, 999)
        low = timestep.floor().long()
        return torch.lerp(self.sigmas[low], self.sigmas[(low + 1).clamp(max=999)], timestep - low)

    def forward(self, sample, timestep, class_labels=None):
        a = (1 + self.noise_level(timestep) ** 2).rsqrt().reshape(-1, 1, 1, 1)
        b = (1 - a**2).sqrt()
        deviation = (sample.double() - a * MEAN) / (a**2 * STD**2 + b**2)
        noise, image = b * deviation, MEAN + a * STD**2 * deviation
        outputs = {"epsilon": noise, "sample": image, "v_prediction": a * noise - b * image}
        return UNet2DOutput(sample=outputs[self.config.kind].to(sample.dtype))


class ShrinkingUNet(GaussianUNet):
    """Tiny images, and a prediction that a scheduler of any schedule can do something with."""

    factor = 0.1

    def __init__(self):
        super().__init__(sample_size=4)

    def forward(self, sample, timestep, class_labels=None):
        return UNet2DOutput(sample=self.factor * sample)


class EDMGaussianUNet(GaussianUNet):
    """The same as seen through EDM's preconditioning (arXiv 2206.00364, table 1), with `c_noise = log(sigma) / 4`."""

    data = 0.5

    def forward(self, sample, timestep, class_labels=None):
        data = self.data
        sigma = (4 * timestep.double()).exp()
        noisy = sample.double() * (sigma**2 + data**2).sqrt()
        image = MEAN + STD**2 * (noisy - MEAN) / (STD**2 + sigma**2)
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
        return UNet2DOutput(sample=((image - skip * noisy) / out).to(sample.dtype))


class FlowGaussianUNet(GaussianUNet):
    """The velocity `n - x_0` at `x_t = (1 - t) x_0 + t n`, whose time is a thousandth of the timestep."""

    def forward(self, sample, timestep, class_labels=None):
        time = timestep.double() / 1000
        deviation = (sample.double() - (1 - time) * MEAN) / ((1 - time) ** 2 * STD**2 + time**2)
        noise, image = time * deviation, MEAN + (1 - time) * STD**2 * deviation
        return UNet2DOutput(sample=(noise - image).to(sample.dtype))


def name_of(value):
    return type(value).__name__ if isinstance(value, SchedulerMixin) else getattr(value, "__name__", str(value))


def generators(count):
    return [torch.Generator().manual_seed(number) for number in range(count)]


def draw(unet, scheduler, steps=100, **arguments):
    pipe = DIAUNetPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    arguments = {"batch_size": 4, "generator": generators(4), "output_type": "latent"} | arguments
    return pipe(num_inference_steps=steps, **arguments).images


def assert_is_the_distribution(images):
    # 4096 pixels: the standard error of both is about 0.006; what is left is the error of 100 steps of first order.
    assert images.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert images.std().item() == pytest.approx(STD, abs=0.045)
