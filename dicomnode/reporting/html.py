"""A report as one HTML file that needs nothing else: style, pictures and charts are in it, and it may load nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dicomnode.plaintext import seen
from dicomnode.reporting import charts
from dicomnode.reporting.blocks import Chart, StudyReport

__all__ = ["render"]

FOLDER = Path(__file__).parent


@cache
def _environment() -> Environment:
    """Everything is escaped; a name that the template does not get is an error."""
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=seen)
    environment.filters["svg"] = _svg
    return environment


def _svg(chart: Chart) -> Markup:
    return Markup(charts.svg(chart))  # escaped there


def render(report: StudyReport) -> str:
    """The whole file. The same report gives the same text."""
    style = Markup((FOLDER / "report.css").read_text(encoding="utf-8"))
    return _environment().get_template("report.html").render(report=report, style=style)
