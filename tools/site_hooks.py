"""Hooks of mkdocs: pages from the root of the repository, and links that leave the site.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages of the site. Links to a file that is no page point to
the repository, whose address is read from pyproject.toml.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def repository() -> str:
    """Return the address of the repository."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def on_config(config: Any) -> Any:
    """Set what pyproject.toml says once."""
    config.repo_url = repository()
    config.edit_uri = None
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from the root of the repository."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=move_links((ROOT / source).read_text())))
    return files


def on_page_markdown(markdown: str, **others: Any) -> str:
    """Point links out of docs/ to the repository."""
    return re.sub(r"\]\(\.\./([^)]*)\)", lambda link: f"]({target(link[1])})", markdown)


def move_links(markdown: str) -> str:
    """Rewrite the relative links of a page that stands in the root for its place in docs/."""
    return re.sub(r"\]\((?!https?:|#)([^)]*)\)", lambda link: f"]({target(link[1])})", markdown)


def target(path: str) -> str:
    """Return where a link to a path, relative to the root of the repository, points to."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    name, mark, anchor = path.partition("#")
    return PAGES[name] + mark + anchor if name in PAGES else f"{repository()}/blob/main/{path}"
