"""What every page of the report is: one HTML file with its style, its script and plotly.js, which needs no network."""

import base64
import hashlib
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from dymoe.analysis.figures import clip
from dymoe.numbers import number

LONGEST = 400  # characters of a question or an answer


def render(template: str, **parts: Any) -> str:
    """A page as HTML text.

    Args:
        template: its file below `templates`, which extends the layout.
        parts: what the template shows; text is escaped.
    """
    library, script = get_plotlyjs(), source("script.js.jinja")
    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {source('dark.css.jinja')} }} }}"
    colours = f":root {{ {source('light.css.jinja')} }}\n{dark}\n"
    return (
        environment()
        .get_template(template)
        .render(
            style=Markup(colours + source("style.css.jinja") + source("tokens.css.jinja")),
            library=Markup(library),
            script=Markup(script),
            policy=_policy(library, script),
            **parts,
        )
    )


@cache
def environment() -> Environment:
    """The report's templates; text that they show is escaped."""
    templates = Environment(
        loader=PackageLoader("dymoe.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    templates.filters.update(clip=clip, number=number, shorten=_shorten)
    return templates


def _shorten(text: str) -> str:
    """At most LONGEST characters of a text, saying how many were left out."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"


def source(name: str) -> str:
    """A file below `templates` as it stands."""
    loader = environment().loader
    assert loader is not None
    return loader.get_source(environment(), name)[0]


def _policy(*scripts: str) -> str:
    """Content security policy: no network at all, and no script but those whose text is given here."""
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
