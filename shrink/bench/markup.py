"""Pages of our own: one file with its style sheet and scripts in it, and a policy that lets nothing else in."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shrink.errors import MissingDependency, printable

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["AT_MOST_BYTES", "STYLE", "inert", "template", "text"]

AT_MOST_BYTES = 1_500_000
"""What a page may take."""

STYLE = "report.css"

_TEMPLATES = Path(__file__).parent / "templates"


@cache
def text(name: str) -> str:
    """A file of the templates."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def template(
    name: str,
    scripts: Sequence[str],
    context: dict[str, Any],
    styles: Sequence[str] = (),
    *,
    folder: Path = _TEMPLATES,
) -> str:
    """The page of a template in `folder`, with the style sheet of all pages.

    Its content security policy allows the scripts, the style sheet, and `styles`, those that a script adds.

    Raises:
        MissingDependency: jinja2 is not installed.
    """
    environment = _environment(folder)
    from markupsafe import Markup

    css = text(STYLE)
    sources = " ".join(map(_hash, scripts)) or "'none'"
    policy = (
        f"default-src 'none'; script-src {sources}; style-src {' '.join(map(_hash, (css, *styles)))}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # Ours, and hashed: it goes in as it is.
    given = {"css": Markup(css), "scripts": [Markup(script) for script in scripts]}
    return environment.get_template(name).render({**context, **given, "policy": policy}) + "\n"


def _environment(folder: Path) -> Environment:
    try:
        import jinja2
    except ImportError:
        raise MissingDependency("jinja2", "bench") from None

    def shown(value: object) -> object:
        """Whatever is put into a page: text from the document cannot change how the rest of the page reads."""
        return printable(value, at_most=AT_MOST_BYTES) if type(value) is str else value

    loader = jinja2.FileSystemLoader(folder)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=shown)
    return environment


def _hash(part: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"


def inert(value: object) -> Any:
    """JSON that cannot end the element it stands in. Raises MissingDependency."""
    try:
        from markupsafe import Markup
    except ImportError:
        raise MissingDependency("jinja2", "bench") from None

    data = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
