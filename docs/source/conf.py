# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Sphinx configuration: `make docs`."""

import importlib
import os
import pkgutil
import re
import shutil
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torchrl_dvla

warnings.filterwarnings("ignore", category=UserWarning)

# -- project --------------------------------------------------------------------------------------
project = "torchrl_dvla"
author = "the torchrl_dvla authors"
copyright = author
release = torchrl_dvla.__version__
version = ".".join(release.split(".")[:2])
language = "en"

# -- extensions, as TorchRL has them --------------------------------------------------------------
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
]
# Links into the documentation of others need the network, and a build must not depend on it.
if os.environ.get("DVLA_DOCS_INTERSPHINX") == "1":
    extensions.append("sphinx.ext.intersphinx")
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
    "tensordict": ("https://docs.pytorch.org/tensordict/stable/", None),
    "torchrl": ("https://docs.pytorch.org/rl/stable/", None),
}

source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["decisions/template.md"]
templates_path = ["_templates"]
master_doc = "index"

# Records and measurements are read on their own as well, so they live beside this folder. They are
# copied in, for a link between two files of a linked folder would be looked up outside of it.
for folder in ("decisions", "measurements"):
    source = Path(__file__).resolve().parents[1] / folder
    shutil.rmtree(Path(__file__).parent / folder, ignore_errors=True)
    shutil.copytree(source, Path(__file__).parent / folder)  # keeps the times of the files

# -- docstrings -----------------------------------------------------------------------------------
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Keyword Args", "params_style"), ("Reference", "notes_style")]
autosummary_generate = True
# A package's page lists what its __init__ exports, wherever it is defined.
autosummary_imported_members = True
autosummary_ignore_module_all = False
# What two packages export is indexed where it is defined.
modules = pkgutil.iter_modules(torchrl_dvla.__path__, "torchrl_dvla.")
exports = {one.name: importlib.import_module(one.name).__all__ for one in modules if one.ispkg}
exported_elsewhere = {
    f"{package}.{name}"
    for package in exports
    for name in exports[package]
    for home in exports
    if home != package
    and name in exports[home]
    and getattr(sys.modules[package], name).__module__.startswith(f"{home}.")
}
autosummary_context = {"exported_elsewhere": exported_elsewhere}
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings name types and shapes
# A wrapped TorchRL class must show its own signature, not that of its metaclass.
autodoc_class_signature = "mixed"

# -- Markdown -------------------------------------------------------------------------------------
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# -- HTML -----------------------------------------------------------------------------------------
html_theme = "pydata_sphinx_theme"
html_title = f"{project} {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": project},
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "show_nav_level": 2,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def name_default_configs(app, what, name, obj, options, signature, return_annotation):
    """A default configuration by its name, not by the values of all its fields."""
    fields = r"\((?:[^()]|\([^()]*\))*\)"
    return re.sub(rf"(\w+Config){fields}", r"\1()", signature or "") or None, return_annotation


def setup(app):
    app.connect("autodoc-process-signature", name_default_configs)
