"""Images from a saved pipeline, with any scheduler, each a function of the seed and its number."""
