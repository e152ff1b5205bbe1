"""Progress bars: in a terminal and in a notebook, nowhere else, so that logs and files stay readable."""

from importlib.util import find_spec
from typing import Any

from tqdm.notebook import tqdm as widget
from tqdm.std import tqdm


def bar(*, total: int, name: str, unit: str, done: int = 0, shown: bool = True) -> Any:
    """Return a bar to `update`, a context as well; `disable` tells whether it is seen.

    Args:
        total: how many there are to do.
        name: of what is done.
        unit: of what is counted, in the singular.
        done: how many are done already.
        shown: False: never.
    """
    drawn: Any = widget if in_notebook() and find_spec("ipywidgets") is not None else tqdm
    hidden = not shown or (False if in_notebook() else None)  # None: seen where the stream is a terminal
    return drawn(total=total, initial=done, desc=name, unit=unit, disable=hidden)


def in_notebook() -> bool:
    """Tell whether a notebook's kernel runs this process; its streams are no terminals, but draw bars."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and type(shell).__name__ in ("ZMQInteractiveShell", "Shell")  # Jupyter's, Colab's
