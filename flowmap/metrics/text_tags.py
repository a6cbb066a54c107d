"""The kind of phrase that a sentence is, by TextBlob's part-of-speech tagger (base/tagger.py).

The rules here read the tags of the Penn treebank. They are for definitions: a noun's is a noun phrase, a verb's begins
with a bare verb, an adjective's with an adjective, a participle or "of", an adverb's with another preposition. Their
accuracy on real definitions is the ceiling of any figure made with them (metrics/text_conditioned.py, Phrase).
"""

from __future__ import annotations

from collections.abc import Sequence

KINDS = ("noun", "verb", "adjective", "adverb")
DETERMINERS = ("DT", "PDT", "PRP$", "PRP", "CD", "WP", "EX")
MODIFIERS = ("JJ", "JJR", "JJS", "VBN", "VBD", "RB", "CC", ",")
BREAKS = ("CC", ",", ":", ".")

Tagged = Sequence[tuple[str, str]]


def kind_of_phrase(words: Tagged) -> str | None:
    """The part of speech of the phrase's head, one of KINDS; brackets are skipped. None if nothing is left."""
    words = _outside_brackets(words)
    tags = [tag for _, tag in words]
    start = next((i for i, tag in enumerate(tags) if not tag.startswith("RB") and tag not in BREAKS), None)
    if start is None or (start and tags[start - 1] in BREAKS):  # adverbs alone, or "slowly and in a ... manner"
        return "adverb" if any(tag.startswith("RB") for tag in tags) else None
    return _by_first(words[start][0].lower(), tags[start:])


def _by_first(word: str, tags: Sequence[str]) -> str | None:
    first, second = tags[0], tags[1] if len(tags) > 1 else ""
    if first in ("VB", "VBP", "VBZ") or (first == "TO" and second.startswith("VB")):
        return "verb"
    if first in ("IN", "TO"):
        return "adjective" if word == "of" or second in ("CC", "VBG") else "adverb"
    if first in DETERMINERS:
        return "noun"
    if first.startswith("NN"):  # no noun phrase has a determiner after its noun: the tagger took a verb for a noun
        return "verb" if second in ("DT", "PRP$") else "noun"
    if first.startswith("JJ") or first in ("VBN", "VBD"):
        head = next((tag for tag in tags if tag not in MODIFIERS), "")
        return "noun" if head.startswith("NN") else "adjective"
    return "adjective" if first == "VBG" else None


def _outside_brackets(words: Tagged) -> list[tuple[str, str]]:
    kept, depth = [], 0
    for word, tag in words:
        depth += word == "("
        if not depth and word != ")":
            kept.append((word, tag))
        depth -= word == ")" and depth > 0
    return kept
