"""Where what can be made again is kept (downloads, reference log-probs, large datasets), and what a file holds."""

import hashlib
import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $DPO_LAB_CACHE, else dpo-lab in the user's cache folder. All of it may be deleted at any time."""
    if own := os.environ.get("DPO_LAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-lab"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
