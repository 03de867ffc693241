"""Sphinx configuration. ``make docs`` builds; the operator pages are written by docs/extension from the catalogue."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extension"), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "extension"), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

# Kernels say nothing on the terminal about their transport, which is this machine alone.
profile = HERE / "_build" / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("c = get_config()\nc.IPKernelApp.log_level = 40\n", encoding="utf-8")
os.environ["IPYTHONDIR"] = str(profile.parent)

import refimpl  # noqa: E402

project = "refimpl"
author = "The refimpl authors"
copyright = "2026, The refimpl authors"
release = version = refimpl.__version__

extensions = ["myst_nb", "sphinx_design", "sphinx.ext.autodoc", "numpydoc", "refimpl_docs"]
exclude_patterns = ["_build", "extension", "examples", "static", "**/.ipynb_checkpoints"]
# A page that shows kept data is left out of a checkout that has no such data (tools and commands that make them are named on the pages).
without_data = [name for name in ("survey", "calibration") if not (HERE / f"{name}.json").exists()]
exclude_patterns += [f"{name}.md" for name in without_data]
source_suffix = {".md": "myst-nb"}
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!refimpl\.).*")]  # types of the standard library and NumPy have no inventory without a network
suppress_warnings = ["config.cache", *(["toc.excluded"] if without_data else [])]

myst_enable_extensions = ["colon_fence", "attrs_inline", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_execution_excludepatterns = ["operators/*", "chapters/*", "bibliography*", "claims*", "architecture*"]
nb_merge_streams = True
nb_code_prompt_show = "Show the code"
nb_code_prompt_hide = "Hide the code"
nb_number_source_lines = False

numpydoc_show_class_members = False
numpydoc_xref_param_type = False
autodoc_typehints = "none"
autodoc_member_order = "bysource"
default_role = "literal"

html_theme = "pydata_sphinx_theme"
html_title = "refimpl"
html_static_path = ["static"]
html_css_files = ["refimpl.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "logo": {"text": "refimpl"},
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "tango",
    "pygments_dark_style": "monokai",
}
html_sidebars = {"index": [], "bibliography": [], "architecture": []}
