"""Images as latents of a VAE: loading it, encoding a data set once into the cache, and rows of latents."""

from ..door import open_door

__getattr__, __all__ = open_door(
    __name__,
    autoencoder="VAE downsampling_factor encode_posterior load_vae vae_digest",
    encoding="encode_images",
    rows="LatentDataset",
    scaling="scale_latents unscale_latents",
    shape="LatentShape find_latent_shape",
)
