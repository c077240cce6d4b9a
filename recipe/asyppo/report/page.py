"""One HTML file that needs nothing else: template, styles, scripts and data in it, and no other script may run."""

import base64
import hashlib
import json
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent


def render(data: dict[str, Any]) -> str:
    """The page of the data. Its policy names the only scripts and styles that a browser may use, by their hashes."""
    parts = {
        "js": (HERE / "page.js").read_text(),
        "css": (HERE / "page.css").read_text(),
        "uplot_js": (HERE / "uplot/uPlot.iife.min.js").read_text(),
        "uplot_css": (HERE / "uplot/uPlot.min.css").read_text(),
    }
    return Template((HERE / "page.html").read_text()).substitute(
        parts,
        data=embedded(data),
        script_hashes=f"{_hash(parts['js'])} {_hash(parts['uplot_js'])}",
        style_hashes=f"{_hash(parts['css'])} {_hash(parts['uplot_css'])}",
    )


def embedded(data: Any) -> str:
    """JSON that can stand in a script element whatever text is in it: with no ``<``, it cannot end the element."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # A lone surrogate, which Python may have in a text, cannot be written as UTF-8.
    return text.replace("<", "\\u003c").encode("utf-8", errors="replace").decode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
