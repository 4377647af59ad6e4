"""How a page is put together: template, style, script and charts in one file that refers to nothing outside itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eclectus.tasks.report.drawing import draw_svg

HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page of a template in this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters["svg"] = draw_svg
    return environment.get_template(template).render(
        **values,
        css=Markup((HERE / "page.css").read_text("utf-8")),
        script=Markup((HERE / "page.js").read_text("utf-8")),
    )
