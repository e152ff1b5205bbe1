"""Preferences: any supported file in, tokenised examples out.

`check(config)` reads, recognises and checks a file without a tokenizer; `prepare(checked, tokenizer, view)` turns
the rows it kept into token ids. On the way every row is either kept or counted under a named reason.
"""

if __name__ != "dpo.data":
    raise ImportError("Import dpo.data, not data: the bare name would make a second copy of every class.")

from dpo.data.check import BadRow, Drop
from dpo.data.config import DataConfig, Filter, Source
from dpo.data.examples import Example
from dpo.data.format import Format
from dpo.data.formats import FORMATS
from dpo.data.load import Checked, check
from dpo.data.prepare import Prepared, held_out_pairs, prepare
from dpo.data.read import Row, read
from dpo.data.recognise import check_columns, recognise, rename
from dpo.data.records import Demonstration, Judgement, Message, Pair, Preference, Prompt, Ranking
from dpo.data.render import Overlong, Rendered, Renderer
from dpo.data.report import Report, Summary
from dpo.data.split import split
from dpo.data.views import View

__all__ = [
    "FORMATS",
    "BadRow",
    "Checked",
    "DataConfig",
    "Demonstration",
    "Drop",
    "Example",
    "Filter",
    "Format",
    "Judgement",
    "Message",
    "Overlong",
    "Pair",
    "Preference",
    "Prepared",
    "Prompt",
    "Ranking",
    "Rendered",
    "Renderer",
    "Report",
    "Row",
    "Source",
    "Summary",
    "View",
    "check",
    "check_columns",
    "held_out_pairs",
    "prepare",
    "read",
    "recognise",
    "rename",
    "split",
]
