"""How a page is put together: template, style, script and figures in one file that reaches for nothing outside itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eclectus.tasks.report.figures import Figure

HERE = Path(__file__).parent


def render(template: str, drawn: list[Figure], **values: Any) -> str:
    """The page of a template beside this file. drawn: every figure that it has a place for."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    specs = json.dumps({figure.name: figure.spec for figure in drawn}, ensure_ascii=False, sort_keys=True)
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(
        **values,
        # Inside a script element only "<" could end it early; JSON may write it as an escape.
        specs=Markup(specs.replace("<", "\\u003c")),
        plotly=Markup(get_plotlyjs()),
        css=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup((HERE / "page.js").read_text("utf-8")),
    )
