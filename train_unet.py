"""Train a diffusion UNet with shared attention: `accelerate launch train_unet.py [options]`.

Without options: on the embedded digits, the whole job. `--help` lists the options, which have the names of diffusers'
`train_unconditional.py` wherever that script has them.
"""

import sys

from dia_diffusion.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
