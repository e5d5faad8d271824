"""Training from the installed package: `accelerate launch -m dia_diffusion.train [options]`, or `dia train [options]`.

It is what `train_unet.py` does.
"""

import sys

from .cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
