"""How good images are: the Fréchet distance and other scores, the features that they are taken in, and reports."""
