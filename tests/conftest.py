"""`pytest tests` runs all but the tests marked `slow`; `pytest tests --run-slow` runs those too."""
import os

import pytest

# Before anything imports torch or matplotlib, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers share the cores (pytest.ini)
os.environ["MPLBACKEND"] = "agg"               # no window
os.environ["HF_HUB_OFFLINE"] = "1"             # no test needs a network


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow (minutes each)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --run-slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--run-slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))
