"""What both pages are made with: templates that escape all text, and the style."""

from importlib import resources

import jinja2
from markupsafe import Markup

TEMPLATES = resources.files("perlhf.reports") / "templates"


def environment() -> jinja2.Environment:
    """Templates of this package; an unknown name is an error."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("perlhf.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def style() -> Markup:
    """The style sheet, to stand in the page."""
    return Markup((TEMPLATES / "report.css").read_text(encoding="utf-8"))
