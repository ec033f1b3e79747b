"""Small parts of HTML that several sections of the page are made of."""

import html
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def escape(text: Any) -> str:
    """Return `text` as HTML that shows it and does nothing else.

    Prompts and responses are data: markup in them is shown as it was written, control characters are shown as their
    Unicode pictures, and halves of surrogate pairs, which UTF-8 cannot hold, as question marks.
    """
    visible = _CONTROL.sub(lambda found: chr(0x2400 + min(ord(found.group()), 0x21)), str(text))
    return html.escape(visible.encode("utf-8", "replace").decode("utf-8"), quote=True)


def number(value: float, decimals: int, signed: bool = False) -> str:
    """Write `value` with a true minus sign, and a plus sign where `signed`."""
    return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")


def plain_table(values: dict[str, Any]) -> str:
    """Names and values, two columns."""
    rows = "".join(
        f"<tr><td><code>{escape(k)}</code></td><td>{escape(v)}</td></tr>" for k, v in values.items()
    )
    return f'<div class="scroll"><table class="plain"><tbody>{rows}</tbody></table></div>'
