"""Run notebooks in place, clean them, export the library: `python nbs/site/run.py [name ...]`.

Without names, all notebooks in the order of reading; the README is written too. Cells that
nbdev's tests leave out (`eval: false`, and the flags in settings.ini) are not run and keep their
outputs. A second run leaves no difference.
"""
import os
import re
import sys
from pathlib import Path

import nbformat
import readme
from directives import NBS, notebooks
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

ROOT = NBS.parent
ENV = {  # what digits and figures depend on; nobody watches
    "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "IN_TEST": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


class Client(NotebookClient):
    "Runs a notebook by nbdev's rules; nbclient by itself knows no directives."
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        directives = dict(re.findall(r"^#\| *(\w+)(?:: *(\w+))?", cell.source, re.M))
        flags = set(get_config().tst_flags.split())
        left_out = directives.get("eval", "").lower() == "false" or directives.keys() & flags
        if left_out: return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(path: Path) -> None:
    "Execute one notebook in its folder and clean it. After an error it is unchanged on disk."
    nb = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = Client(nb, timeout=600, kernel_name="python3", record_timing=False,
                    coalesce_streams=True, resources=resources)
    client.execute()
    nbformat.write(nb, path)
    nbdev_clean(fname=str(path))  # no execution counts, no memory addresses; outputs stay


def main(names: list[str]) -> None:
    os.chdir(ROOT)  # where nbdev looks for settings.ini
    paths = [NBS / f"{Path(n).stem}.ipynb" for n in names] or notebooks()
    missing = [p.name for p in paths if not p.exists()]
    if missing: sys.exit(f"nbs/ holds no {', '.join(missing)}")
    os.environ.pop("IN_TEST", None)  # nbdev exports nothing in a test
    nbdev_export()  # first, since notebooks import the ones before them
    os.environ |= ENV
    for path in paths:
        print(path.name, flush=True)
        run(path)
    readme.main()


if __name__ == "__main__": main(sys.argv[1:])
