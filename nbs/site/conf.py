"""Sphinx's configuration; build.py names the folders."""
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils import nodes

sys.path.insert(0, str(Path(__file__).parent))   # for excerpts and links
settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parents[2] / "settings.ini")
settings = settings["DEFAULT"]

project, author = settings["title"], settings["author"]
version, copyright = settings["version"], settings["copyright"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.viewcode", "sphinx_copybutton", "excerpts", "links"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"   # of outputs
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
viewcode_follow_imported_members = False
add_module_names = False
python_maximum_signature_line_length = 72
python_display_short_literal_types = True
toc_object_entries = False
pygments_style = "friendly"

html_theme = "sphinx_book_theme"
html_title = project
html_baseurl = ""
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_logo = "static/logo.svg"
html_favicon = "static/logo.svg"
html_show_sourcelink = html_copy_source = False
html_use_index = html_domain_indices = False
html_permalinks_icon = "#"
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_persistent": [], "use_download_button": False, "use_fullscreen_button": False,
    "show_toc_level": 2, "show_navbar_depth": 1,
    "logo": {"text": project, "alt_text": "Three frames, one inside the others"},
    "pygments_light_style": "friendly", "pygments_dark_style": "github-dark",
}
mathjax_path = "tex-svg.js"   # copied into _static: equations need no network
mathjax3_config = {"options": {"enableMenu": False}, "svg": {"fontCache": "global"}}
copybutton_selector = "div.cell_input pre, div.highlight-sh pre, div.highlight-bibtex pre"


def as_written(app, doctree) -> None:
    "Equations reach MathJax as they are: Sphinx's environment for several lines allows no tag."
    for node in doctree.findall(nodes.math_block):
        if node.get("nowrap"): continue
        node.children = [nodes.Text(rf"\[{node.astext()}\]")]
        node["no-wrap"] = True


def setup(app) -> None: app.connect("doctree-read", as_written)
