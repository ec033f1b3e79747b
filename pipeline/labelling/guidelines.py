"""Guidelines that annotators judge by, and their versions."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from tieback.cli.errors import UsageError
from tieback.pipeline.labelling.markdown import to_html


@dataclass(frozen=True)
class Guidelines:
    """A version of the guidelines.

    Args:
        text: as written, in Markdown.
        html: as the page shows it; None where it is shown as written.
        version: the first digits of the text's SHA-256, which each judgement made by it names.
    """

    text: str
    html: str | None
    version: str


def read_guidelines(path: Path) -> Guidelines:
    """Read a file of guidelines.

    Raises:
        UsageError: it is not there, empty, or no text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--guidelines {path} cannot be read ({error}).") from error
    if not text.strip():
        raise UsageError(f"--guidelines {path} is empty.")
    return Guidelines(text, to_html(text), hashlib.sha256(text.encode()).hexdigest()[:12])


def keep_guidelines(guidelines: Guidelines, output: Path) -> Path:
    """Write this version beside the judgements, which name it, for whoever reads them later."""
    path = output.with_suffix(f".guidelines-{guidelines.version}.md")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(guidelines.text, encoding="utf-8")
    return path
