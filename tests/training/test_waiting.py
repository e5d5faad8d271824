"""Nothing in a step waits for the device, except where figures are logged.

On a CPU there is nothing to wait for: what would wait on a GPU is counted. tests/test_gpu.py has the same on a GPU.
"""

import traceback

import pytest
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dia_diffusion.training import loop
from training_runs import ROOT, fresh_state, run

# Methods that bring values to the host, and operations whose result has a size that depends on values.
METHODS = "item tolist cpu numpy __bool__ __float__ __int__ __index__ __array__".split()
OPERATIONS = "_local_scalar_dense nonzero masked_select _unique2 equal is_nonzero".split()


class EnoughError(Exception):
    """What comes at the end of a run is not asked about."""


class Waits(TorchDispatchMode):
    """Notes what waits, by the step under way: `step` counts from 1."""

    def __init__(self):
        super().__init__()
        self.step, self.found = 0, {}

    def note(self, what):
        lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(str(ROOT / "dia_diffusion"))]
        place = f"{lines[-1].filename}:{lines[-1].lineno}" if lines else "?"
        self.found.setdefault(self.step, []).append(f"{what} at {place}")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function._schema.name.removeprefix("aten::") in OPERATIONS:
            self.note(function._schema.name)
        return function(*arguments, **(keywords or {}))


class Methods(TorchFunctionMode):
    """The methods, which do not all become operations on a CPU."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name = getattr(function, "__name__", "")
        if name in METHODS:
            self.waits.note(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(
    "options",
    [
        {"class_conditional": True, "random_flip": True, "dropout": 0.1, "snr_gamma": 5.0},
        {"objective": "edm", "dia_attention": "se"},
        {"objective": "flow", "use_ema": False, "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: options.get("objective", "ddpm"),
)
def test_steps_wait_for_the_device_only_where_they_log(options, tmp_path, monkeypatch):
    waits = Waits()
    accumulate_gradients = loop.accumulate_gradients

    def counted(*arguments):
        waits.step += 1
        if waits.step == 12:
            raise EnoughError
        return accumulate_gradients(*arguments)

    monkeypatch.setattr(loop, "accumulate_gradients", counted)
    fresh_state()
    often = {"logging_steps": 4, "validation_steps": 100, "checkpointing_steps": 100, "save_images_epochs": 100}
    with pytest.raises(EnoughError), waits, Methods(waits):
        run(tmp_path / "run", max_train_steps=12, **often, **options)
    waiting = {step: found for step, found in waits.found.items() if 0 < step < 12}
    # Reading the losses is seen, so others would be.
    assert waiting.keys() == {4, 8}, waiting
