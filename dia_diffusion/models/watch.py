"""Watch one forward pass: how each tensor was made, through which weights, and which module put it out.

A `TorchFunctionMode` sees every call of a function of torch, and hooks see every call of a module; what functions do
that torch.jit has compiled, a `TorchDispatchMode` sees. Nothing is computed again and no value is read, so tensors on
`meta` and fake tensors serve as well.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import UsageError
from .samples import MainInput, main_input, names_of, tensors_in, undisturbed

ADDITIONS = {"add", "radd", "iadd", "sub", "rsub", "isub", "addcmul", "lerp"}
# What a parameter does in these is to scale or to shift: a layer scale or a position embedding is no layer.
_POINTWISE = {"add", "radd", "iadd", "mul", "rmul", "imul", "sub", "rsub", "isub", "div", "truediv", "addcmul", "cat"}
# What these take from a tensor is its shape.
_FRESH = {f"{kind}_like" for kind in ("zeros", "ones", "empty", "full", "rand", "randn")}
_FRESH |= {f"new_{kind}" for kind in ("zeros", "ones", "empty", "full", "tensor")}


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class Step(NamedTuple):
    """One tensor, as one call made it."""

    name: str  # of the function, without underscores; "" for what came from outside
    inputs: tuple[int, ...]  # numbers of the tensors that it was made of, without parameters and buffers
    weight: bool  # whether a parameter of two or more dimensions took part, as in a layer
    arguments: tuple  # of the function
    shape: tuple[int, ...]
    floating: bool  # whether it holds floating-point or complex numbers


class Output(NamedTuple):
    """A tensor that a module put out."""

    module: str
    element: int | None  # its number where the module puts out several; None where the tensor is all
    order: int  # number of calls of modules that had ended before


class Given(NamedTuple):
    """A tensor that a module was given."""

    argument: str  # its name
    place: int


class Addition(NamedTuple):
    """A sum of two tensors of one shape."""

    sides: tuple[int, int]
    total: int
    modules: tuple[str, ...]  # those that were running, from the outside


class ForwardWatch(TorchFunctionMode):
    """Notes of one forward pass.

    Args:
        model (`nn.Module`), batch (`int`): The model that is watched, and the number of samples that it is given.

    Attributes:
        steps (list of `Step`): By number; a tensor that is changed in place gets another number.
        outputs (`dict[int, list[Output]]`): The modules that put out a tensor, from the inside.
        given (`dict[str, dict[int, Given]]`): For each module the vectors `(B, E)` that it was given.
        calls (`Counter`): How often each module was called.
        additions (list of `Addition`): In order of execution.
    """

    def __init__(self, model: nn.Module, batch: int):
        super().__init__()
        self.batch = batch
        self.steps: list[Step] = []
        self.outputs: dict[int, list[Output]] = {}
        self.given: dict[str, dict[int, Given]] = {}
        self.calls: Counter[str] = Counter()
        self.additions: list[Addition] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._ended = 0
        self._numbers: dict[int, int] = {}  # by the identity of a tensor
        self._versions: dict[int, int] = {}  # how often it had been changed in place
        self._alive: list[Any] = []  # or an identity would come a second time
        # Tensors that depend on no input, and whether they are or come from a parameter of several dimensions.
        self._constants = {id(buffer): False for buffer in model.buffers()}
        self._constants |= {id(parameter): parameter.ndim > 1 for parameter in model.parameters()}

        # Whether features came from nowhere: functions that torch.jit has compiled show their operations alone.
        self.unseen = False
        self._depth = 0

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor's current version."""
        if id(tensor) not in self._numbers:
            self.unseen |= tensor.ndim > 1 and _is_floating(tensor)
            self._add(tensor, "", (), False, ())
        return self._numbers[id(tensor)]

    def _is_constant(self, tensor: Tensor) -> bool:
        # Offloading fetches parameters as new ones.
        return id(tensor) in self._constants or isinstance(tensor, nn.Parameter)

    def _add(self, tensor: Tensor, name: str, inputs: tuple[int, ...], weight: bool, arguments: tuple) -> None:
        self._numbers[id(tensor)] = len(self.steps)
        self._versions[id(tensor)] = _version(tensor)
        self._alive.append(tensor)
        self.steps.append(Step(name, inputs, weight, arguments, tuple(tensor.shape), _is_floating(tensor)))

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.is_inside:
            return function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        # An attribute such as `x.mT`.
        name = function.__self__.__name__ if name == "__get__" else name.strip("_")
        return self.note(function, name, args, kwargs or {})

    def note(self, function: Callable, name: str, args: tuple, kwargs: dict) -> Any:
        """Call a function of torch, note what it made, and return that."""
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        constants = [tensor for tensor in tensors if self._is_constant(tensor)]
        inputs = tuple(self.number(tensor) for tensor in tensors if not self._is_constant(tensor))
        inputs = () if name in _FRESH else inputs
        weighted = any(self._constants.get(id(tensor), tensor.ndim > 1) for tensor in constants)
        # The packed weights of a quantized layer are no tensor.
        weighted = weighted or any(isinstance(value, torch.ScriptObject) for value in args)
        self._depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._depth -= 1
        made = [args[0]] if name == "setitem" else [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        # A cast to the type that it has returns the tensor itself.
        made = [tensor for tensor in made if self._versions.get(id(tensor), -1) != _version(tensor)]
        if not tensors or not made:
            return result
        if not inputs:
            # Learned queries, repeated for each sample, are features as an input is.
            constant = [
                value for value in made if value.ndim < 3 or len(value) != self.batch or not _is_floating(value)
            ]
            self._constants |= {id(tensor): weighted for tensor in constant}
            self._alive += constant
            made = [tensor for tensor in made if id(tensor) not in self._constants]
        weight = weighted and name not in _POINTWISE
        sides = self._sides(name, args, kwargs)
        for tensor in made:
            self._constants.pop(id(tensor), None)
            self._add(tensor, name, inputs, weight, (*args, *kwargs.values()))
        if sides is not None and len(made) == 1 and _is_floating(made[0]):
            shapes = {self.steps[side].shape for side in sides}
            if shapes == {tuple(made[0].shape)}:
                self.additions.append(Addition(sides, self.number(made[0]), tuple(self._running)))
        return result

    def _sides(self, name: str, args: tuple, kwargs: dict) -> tuple[int, int] | None:
        """Return the two sides of an addition that both depend on the inputs."""
        args = (*args, *(kwargs[key] for key in ("input", "other", "end") if key in kwargs))
        if name not in ADDITIONS or len(args) < 2:
            return None
        first, second = args[:2]
        if name == "addcmul":
            # input + tensor1 * tensor2: the product is a side that no call made.
            if len(args) < 3 or self._is_constant(first):
                return None
            factors = tuple(self.number(factor) for factor in args[1:3] if not self._is_constant(factor))
            shape = tuple(torch.broadcast_shapes(*(factor.shape for factor in args[1:3])))
            self.steps.append(Step("mul", factors, False, args[1:3], shape, True))
            return self.number(first), len(self.steps) - 1
        if not all(isinstance(side, Tensor) and not self._is_constant(side) for side in (first, second)):
            return None
        return self.number(first), self.number(second)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self._names[module]
        self._running.append(name)
        self.calls[name] += 1
        named = [*zip(names_of(module, args), args, strict=True), *kwargs.items()]
        given = [(Given(key, index), value) for index, (key, value) in enumerate(named)]
        vectors = [(place, value) for place, value in given if isinstance(value, Tensor) and value.ndim == 2]
        numbered = {self.number(value): place for place, value in vectors if value.is_floating_point()}
        self.given.setdefault(name, {}).update(numbered)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        name = self._running.pop()
        for index, value in enumerate(tree_leaves(output)):
            if isinstance(value, Tensor) and not self._is_constant(value):
                element = None if isinstance(output, Tensor) else index
                self.outputs.setdefault(self.number(value), []).append(Output(name, element, self._ended))
        self._ended += 1

    @property
    def is_inside(self) -> bool:
        """True while a function that is noted is running."""
        return self._depth > 0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the model's forward pass inside of this context."""
        handles = []
        for module in self._names:
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


class OperationWatch(TorchDispatchMode):
    """Notes of the operations that no function of torch was called for."""

    def __init__(self, watch: ForwardWatch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.watch.is_inside:
            return operation(*args, **(kwargs or {}))
        return self.watch.note(operation, operation._schema.name.partition("::")[2].strip("_"), args, kwargs or {})


def watch_forward(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], batch_dim: int = 0
) -> tuple[ForwardWatch, MainInput]:
    """Run a model once in evaluation mode, leave it as it was, and return the notes and the input that tells the number
    of samples, in dimension `batch_dim`."""
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"{type(model).__name__} is compiled by torch.jit, which shows neither its functions nor its modules: take "
            "the model before torch.jit.script or torch.jit.trace."
        )
    main = main_input(model, args, kwargs)
    for operations in (False, True):
        watch = ForwardWatch(model, main.tensor(args, kwargs).shape[batch_dim])
        for tensor in tensors_in((tuple(args), dict(kwargs))):
            watch.number(tensor)
        watch.unseen = False
        with undisturbed(model), watch.watching(), OperationWatch(watch) if operations else contextlib.nullcontext():
            model(*args, **kwargs)
        if not watch.unseen:
            break
    return watch, main
