"""DPO: the sigmoid loss on preference pairs. `python recipes/dpo.py data.train=FILE` runs it as a script."""

if __name__ == "dpo":
    # A recipe run as a script puts this folder first on the path, and this file is then found in place of the
    # package of the same name: hand over to the package.
    import sys
    from importlib import import_module
    from pathlib import Path

    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    del sys.modules["dpo"]
    import_module("dpo")

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage


def dpo(data: DataConfig) -> tuple[Run, ...]:
    """One stage: DPO, beta 0.1 (Rafailov et al. 2023); the rate that the other recipes are measured by."""
    return one_stage("dpo", data, beta=0.1, learning_rate=1e-4)


if __name__ == "__main__":
    main(dpo)
