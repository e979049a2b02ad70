"""`pytest tests` runs all but the tests marked `slow`, `--run-slow` those too, `-m quick` a part.

The quick part holds what answers in half a minute: functions and figures of the pages; no
training, no processes, no site.
"""
import os

import pytest
from xdist.scheduler import LoadScopeScheduling

# Before anything imports torch or matplotlib, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores (pytest.ini)
os.environ["MPLBACKEND"] = "agg"               # no window
os.environ["HF_HUB_OFFLINE"] = "1"             # no test needs a network
os.environ["IN_TEST"] = "1"                    # no progress bars

QUICK = {  # files of the quick part
    "test_core", "test_fusion", "test_loss_and_sampling", "test_pages", "test_step",
    "test_thresholds", "test_views"}
NOT_QUICK = "slow", "trains"
LONG = [  # files that take longest begin first, so that all workers end together
    "test_resume", "test_notebooks", "test_train", "test_step", "test_experiments", "test_site",
    "test_package", "test_presets", "test_switches", "test_processes", "test_speed",
    "test_encoders", "test_few_labels", "test_export"]


WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
if WORKER and hasattr(os, "sched_setaffinity"):   # a share of the cores for each worker, and for
    CORES = sorted(os.sched_getaffinity(0))       # all that it starts: none waits for the other's
    share = CORES[int(WORKER[2:])::int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    os.sched_setaffinity(0, share or CORES)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --run-slow")
    config.addinivalue_line("markers", "trains: trains, or starts processes; not in the quick part")
    config.addinivalue_line("markers", "quick: answers in seconds")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    place = {name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))   # a stable sort
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if item.path.stem in QUICK and not marks & set(NOT_QUICK): item.add_marker("quick")
        if "slow" in marks and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))


class FileByFile(LoadScopeScheduling):
    "The tests of a file stay on one worker, and share its fixtures; notebooks go one by one."
    def _split_scope(self, nodeid):
        file, _, name = nodeid.partition("::")
        return nodeid if name.startswith("test_runs[") else file


def pytest_xdist_make_scheduler(config, log):
    return FileByFile(config, log)
