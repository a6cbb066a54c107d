"""Sources of sentences: WordNet's definitions, files of text or JSONL, and data sets of Hugging Face. Text is never
code.

A source returns every sentence with its attributes (text values by name) and its keys, which it may not share with a
held-out sentence. An empty sentence is counted; a line that is not UTF-8 or not JSON is refused with file and line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from flowmap.base.schema import added
from flowmap.data.images.listing import NOT_REGULAR, Tally, walk
from flowmap.data.safe_files import lines_of
from flowmap.data.sources import class_names_of, optional


@dataclass(frozen=True)
class Sentence:
    """A text of one line without spaces at its ends; attributes by name; keys: the entries that it belongs to.

    sides: the texts (left, right) that it stands between, where its source has them; either may be empty.
    """

    text: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    sides: tuple[str, str] | None = None


class TextSource(Protocol):
    """Sentences in a fixed order."""

    def read(self) -> tuple[list[Sentence], Counter]:
        """All of them, and counts of what was left out ("empty"). ValueError names what cannot be read."""
        ...

    def identity(self) -> dict[str, Any]: ...


ENDINGS = (".txt", ".jsonl")
WORDNET_FILES = {"data.noun": "noun", "data.verb": "verb", "data.adj": "adjective", "data.adv": "adverb"}
# WordNet's lexicographer files, in the order of their numbers (lexnames(5WN))
CATEGORIES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body "
    "noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location "
    "noun.motive noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process "
    "noun.quantity noun.relation noun.shape noun.state noun.substance noun.time verb.body verb.change "
    "verb.cognition verb.communication verb.competition verb.consumption verb.contact verb.creation "
    "verb.emotion verb.motion verb.perception verb.possession verb.social verb.stative verb.weather "
    "adj.ppl"
).split()


@dataclass(frozen=True)
class WordNet:
    """The definitions of WordNet 3.0 in `root` (`python -m flowmap.data.fetch wordnet`), with part_of_speech and
    category.

    part_of_speech has 4 values, category 45. examples: the example sentences as well. The keys are the lemmas:
    definitions of one word belong together.
    """

    root: str = ".data/wordnet"
    examples: bool = False
    kind: ClassVar[str] = "wordnet"

    def read(self) -> tuple[list[Sentence], Counter]:
        found: list[Sentence] = []
        counts: Counter[str] = Counter()
        for name, part in WORDNET_FILES.items():
            path = Path(self.root) / name
            if not path.is_file():
                raise ValueError(
                    f"sentences.root: {path} is not there; `python -m flowmap.data.fetch wordnet` brings it"
                )
            for number, line in enumerate(lines_of(path), 1):
                if not line.startswith("  "):  # the licence, at the top
                    found += self._entry(line, part, f"{path}:{number}", counts)
        return found, counts

    def _entry(self, line: str, part: str, where: str, counts: Counter) -> Iterator[Sentence]:
        entry, bar, gloss = line.partition(" | ")
        fields = entry.split()
        try:
            category, num_words = CATEGORIES[int(fields[1])], int(fields[3], 16)
            keys = tuple(fields[4 + 2 * i].split("(")[0].lower() for i in range(num_words))
        except (IndexError, ValueError):
            raise ValueError(f"{where}: is no line of a WordNet data file") from None
        definition, *examples = gloss.strip().split('; "')
        for text in [definition, *(examples if self.examples else [])]:
            text = one_line(text.rstrip('"; '))
            if not bar or not text:
                counts["empty"] += 1
                continue
            yield Sentence(text, {"part_of_speech": part, "category": category}, keys)

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "examples": self.examples}


@dataclass(frozen=True)
class TextFiles:
    """A file, or every file below a folder that is not hidden: lines of .txt, or mappings with `text` and attributes in
    .jsonl.

    Lines of .txt have the attribute "file", the file's name without its suffix (yelp/positive.txt: "positive"). key:
    the column of a .jsonl that names the entry of a sentence, so that entries are not split. left, right: the columns
    of a .jsonl with the texts before and after `text`, for data.infill; without a key, sentences between the same two
    texts are one entry, unless both texts are empty.
    """

    root: str = "???"
    text: str = "text"
    key: str | None = None
    left: str | None = added(None)
    right: str | None = added(None)
    kind: ClassVar[str] = "files"

    def __post_init__(self):
        check_sides(self.left, self.right)

    def read(self) -> tuple[list[Sentence], Counter]:
        paths = self._paths(Path(self.root))
        if not paths:
            raise ValueError(f"sentences.root: {self.root!r} is no file, and holds no *.txt or *.jsonl")
        found: list[Sentence] = []
        counts: Counter[str] = Counter()
        for path in paths:
            for number, line in enumerate(lines_of(path), 1):
                sentence = self._sentence(line, path, f"{path}:{number}") if line.strip() else None
                if sentence is None or not sentence.text:
                    counts["empty"] += 1
                else:
                    found.append(sentence)
        return found, counts

    def _paths(self, root: Path) -> list[Path]:
        """The file itself, or the files below the folder that are not hidden. A device or a pipe is refused when it is
        read.
        """
        if not root.is_dir():
            return [root] if root.is_file() else []
        found = (root / name for name, kind in walk(str(root), Tally()) if kind in ("file", NOT_REGULAR))
        return sorted(path for path in found if path.suffix.lower() in ENDINGS)

    def _sentence(self, line: str, path: Path, where: str) -> Sentence:
        if path.suffix.lower() != ".jsonl":
            if self.left is not None:
                raise ValueError(f"{where}: is a line of text; sentences.left and right are columns of .jsonl files")
            return Sentence(one_line(line), {"file": path.stem})
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: is not JSON: {error}") from error
        return as_sentence(row, self.text, self.key, None, where, sides_of(self.left, self.right))

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **{k: v for k, v in asdict(self).items() if k != "root"}}


@dataclass(frozen=True)
class HuggingFaceText:
    """Column `text` of a data set: a hub id, a folder of save_to_disk, or one that load_dataset reads.

    columns: those that are attributes. key: the column that names the entry of a row. left, right: as of files.
    Numbers of a ClassLabel become their names. Code of a data set never runs.
    """

    path: str = "???"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text: str = "text"
    columns: tuple[str, ...] = ()
    key: str | None = None
    left: str | None = added(None)
    right: str | None = added(None)
    kind: ClassVar[str] = "huggingface"

    def __post_init__(self):
        check_sides(self.left, self.right)

    def read(self) -> tuple[list[Sentence], Counter]:
        rows = self._rows()
        names: dict[str, Any] = {c: class_names_of(rows.features[c]) for c in self.columns}
        sides = sides_of(self.left, self.right)
        found: list[Sentence] = []
        counts: Counter[str] = Counter()
        for i, row in enumerate(rows):
            named = {
                c: names[c][row[c]] if names[c] and isinstance(row[c], int) and row[c] >= 0 else row[c]
                for c in self.columns
            }
            sentence = as_sentence({**row, **named}, self.text, self.key, self.columns, f"{self.split}[{i}]", sides)
            if sentence.text:
                found.append(sentence)
            else:
                counts["empty"] += 1
        return found, counts

    def _rows(self) -> Any:
        datasets = optional("datasets")
        try:
            if (Path(self.path) / "state.json").is_file():
                rows = datasets.load_from_disk(self.path)
            elif (Path(self.path) / "dataset_dict.json").is_file():
                rows = datasets.load_from_disk(self.path)[self.split]
            else:
                rows = datasets.load_dataset(self.path, self.name, split=self.split, revision=self.revision)
        except Exception as error:  # builders, file systems and the hub each have errors of their own
            said = " ".join(str(error).split())[:300]
            raise ValueError(
                f"sentences.path: {self.path!r} with split {self.split!r} cannot be used: {said}"
            ) from error
        named = [column for column in (self.key, self.left, self.right) if column]
        for column in (self.text, *self.columns, *named):
            if column not in rows.features:
                raise ValueError(
                    f"sentences: {column!r} is no column of {self.path}; allowed: {', '.join(rows.features)}"
                )
        return rows

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, **asdict(self)}


TEXT_SOURCES = {"wordnet": WordNet, "files": TextFiles, "huggingface": HuggingFaceText}


def one_line(text: str) -> str:
    """The words of a text with single spaces between them."""
    return " ".join(text.split())


def as_sentence(
    row: Any,
    text: str,
    key: str | None,
    columns: tuple[str, ...] | None,
    where: str,
    sides: tuple[str, str] | None = None,
) -> Sentence:
    """A row as a sentence, with attributes from `columns`, or all its texts and whole numbers. ValueError names what is
    missing.
    """
    for name in (text, *(sides or ())):
        if not isinstance(row, Mapping) or not isinstance(row.get(name), str):
            raise ValueError(f"{where}: has no text {name!r}")
    others = (text, key, *(sides or ()))
    wanted = (
        columns
        if columns is not None
        else [k for k, v in row.items() if k not in others and isinstance(v, (str, int, bool))]
    )
    given = {name: str(row[name]) for name in wanted if row.get(name) is not None}
    around = None if sides is None else (one_line(row[sides[0]]), one_line(row[sides[1]]))
    between = "\n".join(around) if around is not None and any(around) else None  # two empty texts are no entry
    entry = str(row[key]) if key is not None and row.get(key) is not None else between
    return Sentence(one_line(row[text]), given, () if entry is None else (entry,), around)


def check_sides(left: str | None, right: str | None) -> None:
    """Raise ValueError if one of the columns is named and the other is not."""
    if (left is None) != (right is None):
        missing = "left" if left is None else "right"
        raise ValueError(f"{missing}: is missing: sentences.left and right are given together")


def sides_of(left: str | None, right: str | None) -> tuple[str, str] | None:
    """Both columns, or None."""
    return None if left is None or right is None else (left, right)
