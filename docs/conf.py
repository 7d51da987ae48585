"""The site: `sphinx-build -W --keep-going -n docs docs/_build`. Notebooks are shown, never run."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]

from outside_pages import copy_pages  # noqa: E402

import torchrl_recall  # noqa: E402

copy_pages(HERE)

project = "torchrl_recall"
author = "The torchrl_recall authors"
copyright = "2026, the torchrl_recall authors"
version = release = torchrl_recall.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "myst_nb",
    "mathml",
    "outside_pages",
    "references",
]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore = [("py:class", "optional")]

default_role = "py:obj"
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 72
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
# Types are words, such as "int or TensorSpec", not names to look up.
napoleon_use_param = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_use_keyword = False

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = False

html_theme = "furo"
html_title = f"torchrl_recall {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_copy_source = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"
