"""Feature extractors by name: the spaces in which sets of images are compared. Each is a short subclass of
`FeatureExtractor` in a file of its own."""
