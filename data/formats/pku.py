"""PKU-SafeRLHF: two responses with two labels, helpfulness and harmlessness, that often disagree.

Source: the card of PKU-Alignment/PKU-SafeRLHF, CC-BY-NC-4.0.
"""

from dpo.data.format import Format
from dpo.data.parts import as_index, as_text, preferred, prompt_of
from dpo.data.read import Row
from dpo.data.records import Preference


def _convert(row: Row, column: str) -> Preference:
    first, second = (as_text(row.values.get(name), name) for name in ("response_0", "response_1"))
    return preferred(row, prompt_of(row.values), (first, second), as_index(row.values.get(column), column))


_COLUMNS = (("prompt",), ("response_0",), ("response_1",), ("better_response_id",), ("safer_response_id",))

PKU_HELPFULNESS = Format(
    "PKU-SafeRLHF (helpfulness)",
    "better_response_id is the number, 0 or 1, of the more helpful response, however safe it is",
    _COLUMNS,
    lambda row: _convert(row, "better_response_id"),
    label="helpfulness",
)
PKU_HARMLESSNESS = Format(
    "PKU-SafeRLHF (harmlessness)",
    "safer_response_id is the number, 0 or 1, of the less harmful response, however helpful it is",
    _COLUMNS,
    lambda row: _convert(row, "safer_response_id"),
    label="harmlessness",
)
