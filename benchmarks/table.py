"""Print the results of all benchmarks as one Markdown table.

python benchmarks/table.py [FOLDER]
"""

import json
import sys
from pathlib import Path

from measuring import RESULTS, format_row


def make_table(folder: Path) -> str:
    """Make the table of all results in a folder, under the machine, the date and the versions of each."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines += [f"**{path.stem}** ({result['machine']}, {result['date']}, {versions})", ""]
        lines += ["| case | figure | against | ratio, median (extremes) |", "|---|---:|---|---:|"]
        lines += [*map(format_row, result["rows"]), ""]
    return "\n".join(lines)


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    print(make_table(folder) or f"There are no results in {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
