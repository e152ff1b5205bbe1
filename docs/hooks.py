"""Links from a page to files of the repository that are no pages: they lead to the repository itself.

The pages are read in two places. In the repository `../losses/ipo.py` is a file beside them; in the built site it is
none, so that the link must name the repository's address. A link to nothing is a warning, which a strict build takes
for a failure.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.hooks")

LINK = re.compile(r"\]\(((?!https?://|#|mailto:)[^)#\s]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001  (mkdocs names them)
    """Return the page with each link that leaves the documentation leading to the repository."""
    docs, here = Path(config.docs_dir), Path(page.file.abs_src_path).parent

    def led(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(here / found[1]))
        if target.is_relative_to(docs):
            return found[0]
        if not target.exists():
            log.warning("%s: the link %r leads to nothing in the repository.", page.file.src_uri, found[1])
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.extra['repository']}/{kind}/main/{target.relative_to(docs.parent).as_posix()}"

    return LINK.sub(led, markdown)
