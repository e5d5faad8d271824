"""A page to try a model in a browser: `dia app`. Needs the extra `app` (Gradio)."""
