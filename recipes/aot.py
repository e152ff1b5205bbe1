"""AOT: preference between distributions, quantile by quantile, on preference pairs. Runs as a script as well."""

from dpo.data import DataConfig
from dpo.run import main
from dpo.settings import Run, one_stage
from dpo.train import Loop


def aot(data: DataConfig) -> tuple[Run, ...]:
    """One stage: paired AOT, beta 0.01 (Melnyk et al. 2024), 64 pairs sorted at once; DPO's rate.

    Fewer than 8 pairs in an optimiser step are hardly worth sorting, and the run says so: whatever their number, about
    one of them is compared with itself, as DPO does, and a single pair is nothing but DPO.
    """
    return one_stage(
        "aot", data, beta=0.01, pairing="paired", learning_rate=1e-4, loop=Loop(gradient_accumulation_steps=16)
    )


if __name__ == "__main__":
    main(aot)
