"""A page to try a model in a browser: `dia app`. Needs the extra `app` (Gradio)."""

from ..door import open_door

__getattr__, __all__ = open_door(__name__, command="launch_app", making="Maker Request", page="make_app")
