"""What is said of numbers that are not finite: of a run that diverged, and of a model that did."""

from .errors import UsageError


class NotFiniteError(UsageError):
    """Training has diverged: a loss, a gradient or a weight is not a finite number."""

    def __init__(self, step: int, what: str, learning_rate: float):
        super().__init__(f"at step {step} {what}, at learning rate {learning_rate:.3g}: training has diverged.")
        self.step = step


class NotFiniteImagesError(UsageError):
    """A model gives values that are not finite numbers, which would become black images."""

    def __init__(self, model: str):
        super().__init__(
            f"the model '{model}' gives values that are not finite numbers. It has diverged in training, or overflows "
            "in its precision: use an earlier checkpoint, or load it in float32."
        )
