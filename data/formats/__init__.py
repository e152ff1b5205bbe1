"""The formats that are known, one file for each family of data sets."""

from dpo.data.format import Format
from dpo.data.formats.arena import ARENA, ARENA_55K
from dpo.data.formats.distilabel import DISTILABEL
from dpo.data.formats.helpsteer import HELPSTEER2, HELPSTEER2_PREFERENCE, HELPSTEER3
from dpo.data.formats.nectar import NECTAR
from dpo.data.formats.oasst import OASST
from dpo.data.formats.pairs import CONVERSATIONS, CORRECTION, PAIR, TRANSCRIPTS
from dpo.data.formats.pku import PKU_HARMLESSNESS, PKU_HELPFULNESS
from dpo.data.formats.rewardbench import REWARD_BENCH, REWARD_BENCH_2
from dpo.data.formats.several import RANKED, RATED, VOTED
from dpo.data.formats.sharegpt import SHAREGPT
from dpo.data.formats.shp import SHP
from dpo.data.formats.single import DEMONSTRATION, PROMPTS, THUMBS
from dpo.data.formats.summaries import SUMMARIES
from dpo.data.formats.ultrafeedback import ULTRAFEEDBACK

PUBLISHED: tuple[Format, ...] = (
    HELPSTEER3,
    HELPSTEER2_PREFERENCE,
    HELPSTEER2,
    PKU_HELPFULNESS,
    PKU_HARMLESSNESS,
    SHP,
    SUMMARIES,
    NECTAR,
    ULTRAFEEDBACK,
    ARENA,
    ARENA_55K,
    OASST,
    REWARD_BENCH,
    REWARD_BENCH_2,
    DISTILABEL,
    SHAREGPT,
)
"""Shapes that single data sets have."""

GENERAL: tuple[Format, ...] = (
    CORRECTION,
    PAIR,
    TRANSCRIPTS,
    CONVERSATIONS,
    THUMBS,
    RANKED,
    VOTED,
    RATED,
    DEMONSTRATION,
    PROMPTS,
)
"""Shapes for files of one's own, which many published sets have as well."""

FORMATS: tuple[Format, ...] = (*PUBLISHED, *GENERAL)
"""All formats, most specific first."""

__all__ = ["FORMATS", "GENERAL", "PUBLISHED"]
