"""Words in quotation marks: HunyuanImage's pipeline reads them as a second text, which no network here is given."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

WORD_LETTER = (
    "[^\\W\u3000-\u9fff]"  # of scripts with spaces between words: an apostrophe next to one may be part of a word
)
IN_SINGLE_QUOTES = rf"(?<!{WORD_LETTER})'.*?'(?!{WORD_LETTER})"  # 'open', and neither dog's nor the dogs' and the cats'
IN_QUOTES = re.compile(
    "|".join((IN_SINGLE_QUOTES, '".*?"', "\u2018.*?\u2019(?!" + WORD_LETTER + ")", "\u201c.*?\u201d"))
)
SECOND_TEXT = "words in quotation marks, which HunyuanImage reads as a second text that flowmap does not give it"


def quoted(prompt: str) -> bool:
    """Whether some of its words are in quotation marks; apostrophes are none."""
    return IN_QUOTES.search(prompt) is not None


def warn_of_quoted(pipeline: Any, prompts: Sequence[str]) -> None:
    """Warn once for each loaded pipeline, with the number of prompts of the first batch that has any."""
    count = sum(map(quoted, prompts))
    if count and not getattr(pipeline, "warned_of_quoted", False):
        pipeline.warned_of_quoted = True
        warnings.warn(
            f"prompt: {count} of {len(prompts)} have {SECOND_TEXT}; later batches are not counted", stacklevel=2
        )
