"""A badge on every notebook that opens it on Colab: `python nbs/site/badges.py`.

It is the first line of the text below the title. A second run changes nothing.
"""
import nbformat
from directives import notebooks

IMAGE = "https://colab.research.google.com/assets/colab-badge.svg"
PAGE = "https://colab.research.google.com/github/sac-lit/sac_lit/blob/main/nbs"


def main() -> None:
    for path in notebooks():
        nb = nbformat.read(path, as_version=4)
        opening = next(c for c in nb.cells[1:] if c.cell_type == "markdown")
        badge = f"[![Open in Colab]({IMAGE})]({PAGE}/{path.name})"
        if badge in opening.source: continue
        opening.source = f"{badge}\n\n{opening.source}"
        nbformat.write(nb, path)


if __name__ == "__main__": main()
