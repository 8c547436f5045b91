"""Settings of the documentation's site. `make docs` builds it from the Markdown files in this folder."""

from importlib.metadata import version as installed

project = "sdft"
author = "the sdft authors"
copyright = "2026, the sdft authors"
version = release = installed("sdft")
extensions = ["myst_parser", "sphinx_copybutton"]
myst_heading_anchors = 3  # levels of headings that a link may name
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sdft {version}"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
