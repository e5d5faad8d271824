"""Images to learn from and to compare with: data sets, decoding, rows of pixels, and pictures of many."""
