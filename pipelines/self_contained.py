"""Pipelines that bring their own code, so that a folder they save runs where only diffusers is installed.

diffusers runs code of a saved pipeline, with `trust_remote_code=True`, if `model_index.json` names a file and a class
as the pipeline's class, or a file `<component>/<library>.py` as the library of a component. From the Hub it fetches
only the files so named: hence one file for the pipeline and one for the UNet.
"""

import ast
import importlib
import inspect
import json
import sys
from importlib.util import resolve_name
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers import ModelMixin

from .weights import check_weights

# Module of a class in this package, and the name of the file that holds its code in a saved pipeline.
_FILES = {"dia_diffusion.models.unet": "dia_unet", "dia_diffusion.pipelines.pipeline_dia_unet": "pipeline_dia_unet"}

# What the first versions wrote, which saved no code, in place of a file.
_EARLIER = {"dia_diffusion.unet": "dia_diffusion.models.unet"}
# Sources of the modules in _FILES, read when this package was imported: what happens to its files while a model trains
# must not get into what the run saves.
_SOURCES: dict[str, str] = {}

_HEADER = '''"""Code that diffusers runs to load this pipeline, if it is asked to with `trust_remote_code=True`.

It is part of {package} {version} (Apache-2.0): {modules}.
Where that is installed, `dia_diffusion.DIAUNetPipeline.from_pretrained` loads the pipeline without it.
"""
'''
_IMPORTS = """
try:
{imports}
except ImportError as error:
    raise ImportError(
        "The code that this pipeline brings along was written for {versions}, "
        f"and cannot run with what is installed here ({{error}}). Install those, or {package} in a newer version."
    ) from error
"""


class SelfContained:
    """A mixin for a `DiffusionPipeline` that saves code beside the weights, and needs none where the package is."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a pipeline as diffusers does, and refuse one whose weights are not those of its networks."""
        pipeline = super().from_pretrained(*args, **kwargs)
        check_weights(pipeline, kwargs.get("variant"), given=kwargs)
        return pipeline

    def save_config(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `model_index.json`, and the code of the pipeline and its components. All ways to save call this."""
        for name, library in self._libraries().items():
            folder = Path(save_directory, "" if name == "_class_name" else name)
            folder.mkdir(parents=True, exist_ok=True)
            source = _SOURCES.get(library) or inspect.getsource(sys.modules[library])
            (folder / f"{_file_name(library)}.py").write_text(source, encoding="utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """Return the text of `model_index.json`, which names the files of the code."""
        index = json.loads(super().to_json_string())
        for name, library in self._libraries().items():
            class_name = type(self).__name__ if name == "_class_name" else index[name][1]
            index[name] = [_file_name(library), class_name]
        own = [index[name] for name in self._libraries() if name != "_class_name"]
        if own and len(own) == sum(isinstance(part, ModelMixin) for part in self.components.values()):
            # AutoModel finds the code by this. It would look there for models of diffusers, too, if there were any.
            index["auto_map"] = {"AutoModel": ".".join(own[0])}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _libraries(self) -> dict[str, str]:
        """Return the modules of the classes of the pipeline and its components that come from this package."""
        modules = {name: value[0] for name, value in self.config.items() if isinstance(value, list | tuple)}
        modules["_class_name"] = type(self).__module__
        return {name: module for name, module in modules.items() if module and _package(module) == _package(__name__)}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Call [`~diffusers.ConfigMixin.extract_init_dict`] without the entry for AutoModel, of which it would warn."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The class that was asked for is at hand: diffusers need not look for the one in the folder.
        return super()._dict_from_json_file(*args, **kwargs) | {"_class_name": cls.__name__}

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a configuration as diffusers does, with the installed classes in place of the folder's code."""
        loaded = super().load_config(*args, **kwargs)
        installed = {file: module for module, file in _FILES.items() if module in sys.modules} | _EARLIER
        for component in (loaded[0] if isinstance(loaded, tuple) else loaded).values():
            if isinstance(component, list) and component[0] in installed:
                component[0] = installed[component[0]]
        return loaded


def keep_sources() -> None:
    """Read the code that pipelines will be saved with."""
    _SOURCES.update((name, single_file_source(importlib.import_module(name))) for name in _FILES)


def single_file_source(module: ModuleType) -> str:
    """Return the source of a module and of all that it imports from its own package, as one file.

    The text stays as it is written, comments and all; only the imports are gathered at the top. Imports must stand
    before everything but the docstring.
    """
    parts = _with_own_imports(module)
    package = _package(module.__name__)
    header = _HEADER.format(
        package=package.replace("_", "-"),
        version=sys.modules[package].__version__,
        modules=", ".join(part.__name__.rpartition(".")[2] for part in parts),
    )
    return "\n".join([header + _imports_of_others(parts), *map(_section, parts)])


def _imports_of_others(modules: list[ModuleType]) -> str:
    """Return the imports of these modules from outside of their package: Python's own, then the others, whose failure
    is explained."""
    plain, members = set(), {}
    for module in modules:
        for node in _imports(module):
            if isinstance(node, ast.Import):
                plain.add(ast.unparse(node))
            elif _package(_absolute_name(node, module)) != _package(module.__name__):
                members.setdefault(node.module, set()).update(map(ast.unparse, node.names))
    lines = sorted(plain) + [f"from {name} import {', '.join(sorted(members[name]))}" for name in sorted(members)]
    standard = [line for line in lines if _package(line.split()[1]) in sys.stdlib_module_names]
    others = [line for line in lines if line not in standard]
    installed = sorted({_package(line.split()[1]) for line in others})
    return "\n".join(standard) + _IMPORTS.format(
        imports="\n".join(f"    {line}" for line in others),
        versions=" and ".join(f"{name} {sys.modules[name].__version__}" for name in installed),
        package=_package(modules[0].__name__).replace("_", "-"),
    )


def _section(module: ModuleType) -> str:
    """Return the code of a module after its imports, under its name and the first paragraph of its docstring."""
    source = inspect.getsource(module)
    start = max((node.end_lineno for node in _imports(module)), default=ast.parse(source).body[0].end_lineno)
    title = f"---- {module.__name__.rpartition('.')[2]}: {inspect.getdoc(module)}".split("\n\n")[0]
    heading = "\n".join(f"# {line}".rstrip() for line in title.splitlines())
    return f"\n{heading}\n\n" + "\n".join(source.splitlines()[start:]).strip("\n") + "\n"


def _with_own_imports(module: ModuleType) -> list[ModuleType]:
    """Return the module, after all modules of its package that it imports, each once."""
    parts = {}
    for node in _imports(module):
        if isinstance(node, ast.ImportFrom) and _package(_absolute_name(node, module)) == _package(module.__name__):
            imported = importlib.import_module(_absolute_name(node, module))
            parts |= dict.fromkeys(_with_own_imports(imported))
    return [*parts, module]


def _imports(module: ModuleType) -> list[ast.Import | ast.ImportFrom]:
    nodes = ast.parse(inspect.getsource(module)).body
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def _absolute_name(node: ast.ImportFrom, module: ModuleType) -> str:
    return resolve_name("." * node.level + node.module, module.__package__)


def _package(module_name: str) -> str:
    return module_name.split(".")[0]


def _file_name(library: str) -> str:
    # Where the code came with a pipeline, its module is already named after the file.
    return _FILES.get(library, library.rpartition(".")[2])
