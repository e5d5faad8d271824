"""Write the table of docs/backbones.md: for each network of the tests, the branches that one forward pass shows.

    python tools/backbones_table.py [--check]

With `--check` it only says whether the page is as the command would write it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "models")]

from networks import NETWORKS  # noqa: E402

from dia_diffusion import find_branches  # noqa: E402

PAGE = ROOT / "docs" / "backbones.md"
START, END = "<!-- table: tools/backbones_table.py -->\n", "<!-- end of table -->\n"


def table() -> str:
    """Return the table as Markdown: one line a network, sorted as in `networks.py`."""
    lines = [
        "| network | class | branches | state starts from | not gated, and the first reason |",
        "|---|---|---|---|---|",
    ]
    for name, network in NETWORKS.items():
        model = network.make()
        found = find_branches(model, **network.inputs(2))
        context = "zero" if found.context is None else found.context.describe()
        reason = re.sub(r"^.*?: ", "", found.not_gated[0]) if found.not_gated else ""
        left_out = f"{len(found.not_gated)}: {reason}" if reason else ""
        lines.append(f"| {name} | `{type(model).__name__}` | {len(found)} | {context} | {left_out} |".replace("'", "`"))
    return "\n".join(lines) + "\n"


def main() -> int:
    page = PAGE.read_text()
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    new = before + START + table() + END + after
    if "--check" in sys.argv:
        print("as written" if new == page else f"{PAGE} is out of date: run python tools/backbones_table.py")
        return int(new != page)
    PAGE.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
