"""The frame of every page: one HTML file with its style inline, which asks the network for nothing."""

from __future__ import annotations

from html import escape
from importlib import resources

from launch.report.palette import color_css

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_document(title: str, body: str, *, footer: str) -> str:
    """A whole page. `body` and `footer` are markup, `title` is text.

    Its content security policy forbids every request; pictures are inline SVG or JPEG data, and there is no script.
    """
    style = resources.files("launch.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)} · reelscale</title>\n<style>{style}\n{color_css()}</style></head>\n"
        f"<body><main>{body}<footer>{footer} This file loads nothing from anywhere.</footer></main></body></html>\n"
    )
