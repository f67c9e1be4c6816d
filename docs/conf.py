"""Sphinx configuration. Build with `sphinx-build -W --keep-going -b html docs docs/_build`."""

import os
import re
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent / "_ext")]

import jaxinfer  # noqa: E402

project = "jaxinfer"
author = "The jaxinfer authors"
project_copyright = "the jaxinfer authors"
release = version = jaxinfer.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "command_reference",
    "plain_docstrings",
]
exclude_patterns = ["_build", "examples"]
default_role = "code"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "groupwise"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "sphinx_book_theme"
html_title = "jaxinfer"
html_theme_options = {"show_toc_level": 2, "use_download_button": False}

OUTSIDE = re.compile(r"\]\(((?:\.\./)+(?:bench|checkpoints|jaxinfer)/[^)#]*\.md)(?:#[^)]*)?\)")


def link_files(app, docname, source):
    """Links Markdown files outside of docs/, such as results, as files and not as pages."""
    source[0] = OUTSIDE.sub(r"](path:\1)", source[0])


def once(app, what, name, obj, skip, options):
    """Describes what `jaxinfer` itself exports there, and not again with a package below."""
    below = what == "module" and app.env.docname != "api/jaxinfer"
    return True if below and getattr(jaxinfer, name, None) is obj else None


def setup(app):
    app.connect("source-read", link_files)
    app.connect("autodoc-skip-member", once)
