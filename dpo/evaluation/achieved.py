"""All that is measured on a policy, whatever it was trained with, and the files that keep it unit by unit."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from dpo.estimates import Estimate
from dpo.evaluation.pairs import HeldOut
from dpo.evaluation.probes import Probed
from dpo.evaluation.samples import Spoken

SAMPLES_FILE, PAIRS_FILE, PROBES_FILE = "samples.jsonl", "pairs.jsonl", "probes.json"


@final
@dataclass(frozen=True)
class Achieved:
    """What a model achieved."""

    spoken: Spoken | None = None
    """Its own answers, or None where none were asked for."""
    held_out: HeldOut | None = None
    """How far it moved on the held-out pairs, or None where the data has none."""
    probed: Probed | None = None
    """What the probes found, or None where none were asked for."""

    def estimates(self) -> dict[str, Estimate]:
        """Return means with intervals, by the ledger's names."""
        found: dict[str, Estimate] = {}
        for one in (self.held_out, self.spoken, self.probed):
            found |= {} if one is None else one.estimates()
        return found

    def groups(self) -> dict[str, "Achieved"]:
        """Return what was achieved on the pairs and prompts of each group; empty where the data names none."""
        spoken = {} if self.spoken is None else self.spoken.groups()
        held_out = {} if self.held_out is None else self.held_out.groups()
        return {name: Achieved(spoken.get(name), held_out.get(name)) for name in sorted({*spoken, *held_out})}

    def write(self, folder: Path) -> None:
        """Write a file for each of the parts that there are."""
        for one, name in ((self.spoken, SAMPLES_FILE), (self.held_out, PAIRS_FILE), (self.probed, PROBES_FILE)):
            if one is not None:
                one.write(folder / name)

    @classmethod
    def read(cls, folder: Path) -> "Achieved":
        """Return what `write` wrote; a part without a file is None.

        Raises:
            CheckpointError: a file is damaged; names its line.
        """
        samples, pairs, probes = folder / SAMPLES_FILE, folder / PAIRS_FILE, folder / PROBES_FILE
        return cls(
            Spoken.read(samples) if samples.exists() else None,
            HeldOut.read(pairs) if pairs.exists() else None,
            Probed.read(probes) if probes.exists() else None,
        )
