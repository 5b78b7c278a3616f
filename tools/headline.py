"""Copy the headline figure of the laptop run to book/headline.svg, where the README shows it.

    python tools/headline.py
"""
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]


def main():
    """Write the first figure of the frontier's laptop run."""
    executed = nbformat.read(ROOT / "runs" / "laptop" / "06_frontier.ipynb", 4)
    figures = (output["data"]["image/svg+xml"] for cell in executed.cells for output in cell.get("outputs", [])
               if "image/svg+xml" in output.get("data", {}))
    (ROOT / "book" / "headline.svg").write_text(next(figures), encoding="utf8")


if __name__ == "__main__":
    main()
