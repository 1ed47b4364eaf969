"""Display of objects: one line in a console, a small table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping

from latentmill.text.printing import printable


class Shown:
    """Mixin that builds `repr` and the notebook table from `shown`, which must not read storage."""

    def shown(self) -> Mapping[str, object]:
        """Return the values to display, by name."""
        raise NotImplementedError

    def __repr__(self) -> str:
        facts = (f"{name}={printable(str(value))}" for name, value in self.shown().items())
        return f"{type(self).__name__}({', '.join(facts)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(printable(str(value)))}</td></tr>"
            for name, value in self.shown().items()
        )
        caption = f"<caption style='text-align:left'>{type(self).__name__}</caption>"
        return f"<table>{caption}<tbody>{rows}</tbody></table>"
