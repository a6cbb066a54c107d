"""TextBlob's part-of-speech tagger: Brill's rules and a lexicon. Tags are those of the Penn treebank."""

from __future__ import annotations

TAGS = "tags"  # the condition of sentences whose tokens are their tags


def tagged(text: str, key: str = "metrics") -> list[tuple[str, str]]:
    """(word, tag) of every word and punctuation mark of a text.

    Raises ValueError, which names the setting `key`, without the package textblob.
    """
    try:
        from textblob.en import tag
    except ImportError as error:
        raise ValueError(
            f"{key}: textblob cannot be imported ({error}): pip install 'flowmap-distillation[text]'"
        ) from error
    return tag(text, tokenize=True)
