"""Where what can be made again is kept: downloads, reference log-probs, large tokenised datasets."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $DPO_LAB_CACHE, else dpo-lab in the user's cache folder. All of it may be deleted at any time."""
    if own := os.environ.get("DPO_LAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-lab"
