"""Images from saved pipelines: loading, samplers by name, images by number, and `dia sample`."""
