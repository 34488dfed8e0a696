"""A word for each picture, its prompt or its label: from a csv file, or from its name."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from sparke._cli.evaluation.sets import Set
from sparke.backends._pictures import CAPTION_COLUMNS, FILE_COLUMNS
from sparke.errors import ArgumentError

LABEL_COLUMNS = ("label", "class", "mode", "category")
LARGEST = 256 * 2**20
NAMED = 3
"""At most this many files are named in a message."""
NUMBERED = re.compile(r"(?P<words>.+?)[-_ ]?(?<!\d)\d{3,15}", re.ASCII)

Line = tuple[int, str, str]
Prompts = Sequence[Sequence[str]]


def prompts_of(sets: Sequence[Set], tables: Sequence[Path]) -> list[list[str]]:
    """Prompts of every set, from one file for all of them or one for each.

    Raises:
        ArgumentError: as `words_of` raises it, or there is another number of files.
    """
    return words_of(sets, tables, "prompts", ("prompt", *CAPTION_COLUMNS))


def labels_of(sets: Sequence[Set], tables: Sequence[Path]) -> list[list[str]]:
    """Labels of every set, likewise."""
    return words_of(sets, tables, "labels", LABEL_COLUMNS)


def words_of(
    sets: Sequence[Set], tables: Sequence[Path], option: str, columns: Sequence[str]
) -> list[list[str]]:
    """The word of every picture of every set.

    Args:
        sets: whose pictures are looked up.
        tables: one for all sets, or one for each in their order.
        option: of the command line, for messages.
        columns: names that the column of words may have.

    Raises:
        ArgumentError: a file is no such table; a picture has no word, or two; a line names a
            picture that is nowhere.
    """
    if len(tables) == 1:
        return _matched(sets, tables[0], _lines(tables[0], columns))
    if len(tables) != len(sets):
        raise ArgumentError(
            f"--{option} is given {len(tables)} times for {len(sets)} sets; give one file for all "
            "of them, or one for each, in their order."
        )
    return [
        _matched([one], table, _lines(table, columns))[0]
        for one, table in zip(sets, tables, strict=True)
    ]


def prompts_from_names(sets: Sequence[Set]) -> list[list[str]]:
    """``woman-health-worker-0001.png`` is of the prompt "woman health worker".

    Raises:
        ArgumentError: a name does not end in a number of at least three digits.
    """
    return [[_from_name(one, name) for name in one.names] for one in sets]


def look_numbered(sets: Sequence[Set]) -> bool:
    """Whether all names read as those that `sparke generate` gives."""
    return all(
        one.files is not None and all(NUMBERED.fullmatch(Path(name).stem) for name in one.names)
        for one in sets
    )


def first_of_each(
    found: list[Set], prompts: list[list[str]] | None, labels: list[list[str]] | None, most: int
) -> tuple[list[Set], list[list[str]] | None, list[list[str]] | None]:
    """The first `most` pictures of each prompt, with their prompts and labels.

    Raises:
        ArgumentError: a set is left with a single picture.
    """
    kept: list[list[int]] = []
    for i, one in enumerate(found):
        seen: dict[str, int] = {}
        words = [""] * len(one) if prompts is None else prompts[i]
        kept.append([])
        for row, word in enumerate(words):
            seen[word] = seen.get(word, 0) + 1
            if seen[word] <= most:
                kept[-1].append(row)
        if len(kept[-1]) < 2:
            raise ArgumentError(
                f"--per-prompt {most} leaves one picture of {one.label}; diversity needs two."
            )

    def cut(values: list[list[str]] | None) -> list[list[str]] | None:
        if values is None:
            return None
        return [[v[i] for i in rows] for v, rows in zip(values, kept, strict=True)]

    return (
        [one.only(rows) for one, rows in zip(found, kept, strict=True)],
        cut(prompts),
        cut(labels),
    )


def _from_name(one: Set, name: str) -> str:
    match = NUMBERED.fullmatch(Path(name).stem) if one.files is not None else None
    if match is None:
        raise ArgumentError(
            f"no prompt can be read from the name {name!r} of {one.label}; it must end in a number "
            "of at least three digits, as in old-woman-0001.png. Use --prompts FILE."
        )
    return " ".join(re.split(r"[-_\s]+", match["words"])).strip() or match["words"]


def _lines(table: Path, columns: Sequence[str]) -> list[Line]:
    """Number, file and word of each line below the header."""
    wanted = f"a header with the columns file and {columns[0]}"
    try:
        if table.stat().st_size > LARGEST:
            raise ArgumentError(f"{str(table)!r} is over {LARGEST // 2**20} MiB; is it a table?")
        text = table.read_text(encoding="utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        cells = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"{str(table)!r} is not UTF-8 (byte {error.start}); save it as CSV in UTF-8."
        ) from error
    except csv.Error as error:
        raise ArgumentError(f"{str(table)!r} is no csv file: {error}.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, ArgumentError):
            raise
        said = getattr(error, "strerror", None) or error
        raise ArgumentError(f"{str(table)!r} cannot be read: {said}.") from error
    if not cells:
        raise ArgumentError(f"{str(table)!r} is empty; it needs {wanted}.")
    titles = [cell.strip().lower() for cell in cells[0][1]]
    of_file = next((titles.index(t) for t in FILE_COLUMNS if t in titles), None)
    of_word = next((titles.index(t) for t in columns if t in titles), None)
    if of_file is None or of_word is None:
        raise ArgumentError(
            f"{str(table)!r} needs {wanted}, separated by commas; its first line is "
            f"{','.join(cells[0][1])[:80]!r}."
        )
    lines = []
    for number, row in cells[1:]:
        if len(row) != len(titles):
            raise ArgumentError(
                f"{str(table)!r} has {len(row)} cells in line {number} and {len(titles)} titles. "
                'Put text with commas in quotes: "a dog, sitting".'
            )
        file, word = row[of_file].strip(), row[of_word].strip()
        if not file or not word:
            raise ArgumentError(f"{str(table)!r} has an empty cell in line {number}.")
        lines.append((number, file, word))
    return lines


def _plain(name: str) -> str:
    """One spelling for a path: slashes, composed letters."""
    return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/")))


def _matched(sets: Sequence[Set], table: Path, lines: Sequence[Line]) -> list[list[str]]:
    # A line names pictures by their path from the table, or by their path in a set.
    where: dict[str, list[tuple[int, int]]] = {}
    for s, one in enumerate(sets):
        for i, name in enumerate(one.names):
            keys = {_plain(name)}
            if one.files is not None:
                keys.add(_plain(str((one.path / name).absolute())))
            for key in keys:
                where.setdefault(key, []).append((s, i))
    beside = table.parent.absolute()
    words: dict[tuple[int, int], tuple[str, int]] = {}
    lost = []
    for number, file, word in lines:
        absolute = _plain(str(beside / file.replace("\\", "/")))
        spots = {*where.get(_plain(file), ()), *where.get(absolute, ())}
        if not spots and not _exists(absolute):
            lost.append((number, file))
        for s, i in spots:
            before = words.setdefault((s, i), (word, number))
            if before[0] != word:
                raise ArgumentError(
                    f"{str(table)!r} says two things of {sets[s].names[i]!r}: {before[0]!r} in "
                    f"line {before[1]} and {word!r} in line {number}."
                )
    missing = [
        f"{sets[s].label}/{name}"
        for s, one in enumerate(sets)
        for i, name in enumerate(one.names)
        if (s, i) not in words
    ]
    if missing:
        raise ArgumentError(
            f"{str(table)!r} has no line for {len(missing)} of {sum(map(len, sets))} pictures: "
            f"{_few(missing)}. Paths are from the table's folder, or from the set's."
        )
    if lost:
        raise ArgumentError(
            f"{str(table)!r} names {len(lost)} picture{'s' * (len(lost) != 1)} that "
            f"{'are' if len(lost) != 1 else 'is'} nowhere: "
            f"{_few([f'{file} (line {number})' for number, file in lost])}."
        )
    return [[words[s, i][0] for i in range(len(one))] for s, one in enumerate(sets)]


def _exists(path: str) -> bool:
    """Whether a line means a picture of a set that is not measured now."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
