"""diffusers' own tests of UNet2DModel, run on DIAUNet2DModel.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    make test-peers DIFFUSERS=diffusers      # or: python tools/peer_tests.py diffusers [arguments of pytest]

The clone should have the version of the installed diffusers; what PyPI distributes holds no tests. Without a clone the
script says so and ends with status 0. Tests that need weights from the Hub are left out.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import pytest

from dia_diffusion import DIAUNet2DModel

TESTS = "tests/models/unets/test_models_unet_2d.py"
OFFLINE = "not pretrained_hub and not output_pretrained"


def main() -> int:
    source = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else None
    if source is None or not (source / TESTS).is_file():
        print(
            f"Left out: diffusers' own tests of UNet2DModel, for want of {TESTS}. Clone diffusers "
            f"{diffusers.__version__} and name the clone: make test-peers DIFFUSERS=FOLDER."
        )
        return 0
    # The tests import the class by this name.
    diffusers.UNet2DModel = DIAUNet2DModel
    return pytest.main(["-q", "--rootdir", str(source), "-k", OFFLINE, str(source / TESTS), *sys.argv[2:]])


if __name__ == "__main__":
    sys.exit(main())
