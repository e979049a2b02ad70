"""Packaging: every value comes from settings.ini, the file that nbdev reads too."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lib = cfg["lib_path"]
extras = "video", "onnx", "timm", "geo", "notebooks", "dev"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=[lib, f"{lib}.results"],
    package_dir={f"{lib}.results": "nbs/results"},  # what the notebooks read, and no code
    package_data={lib: ["py.typed"], f"{lib}.results": ["*.json", "*.jpg", "*.png"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in extras},
    entry_points={"nbdev": [f"{lib}={lib}._modidx:d"], "console_scripts": [f"sac={lib}:main"]},
)
