"""Images as latents of a VAE: loading it, encoding a data set once into the cache, and rows of latents."""
