"""The site: the pages of this repository as they are, and a reference made of the docstrings.

    sphinx-build -W --keep-going -b html -c docs . build/site

The source is the root of the repository, so that links between pages, to benchmarks and to files of the code are the
same relative ones that a git host follows. A link to a file that is no page leads to one that shows it
(`source_pages.py`); docstrings are plain text and made reStructuredText by `docstrings.py`; equations become MathML,
which browsers draw by themselves (`mathml.py`).
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

project = "vqvae-priors"
author = "The vqvae-priors authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings", "source_pages", "mathml"]

root_doc = "docs/index"
include_patterns = [
    "docs/**.md",
    "benchmarks/README.md",
    "examples/README.md",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "safefolder/models/README.md",
]
exclude_patterns = ["**/.*", "build", "runs", "dist", "tests", "vqvae", "priors", "safefolder/models/fashion*"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_inherit_docstrings = False
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "vqvae-priors"
html_show_sphinx = False
html_copy_source = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
templates_path = ["templates"]
pygments_style = "friendly"
