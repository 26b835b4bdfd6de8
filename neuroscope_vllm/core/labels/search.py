"""Full-text search over labels: SQLite's FTS5, in memory. Torch-free."""

from __future__ import annotations

import sqlite3
import threading
import unicodedata
from collections.abc import Iterable

from neuroscope_vllm.core.errors import ConfigError

# Contentless: only the index is held, 7 MiB for 131k labels.
_TABLE = (
    "CREATE VIRTUAL TABLE found USING "
    "fts5(text, content='', tokenize='porter unicode61 remove_diacritics 2')"
)


class TextIndex:
    """Texts by number, built once, searched from any thread."""

    def __init__(self, texts: Iterable[tuple[int, str]]) -> None:
        """
        Raises:
            ConfigError: This Python's SQLite has no FTS5.
        """
        self._texts = {number: _fold(text) for number, text in texts}
        self._lock = threading.Lock()
        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._database.execute(_TABLE)
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"labels can not be searched, because this Python's SQLite has no full-text search "
                f"({error}); use a Python whose sqlite3 has FTS5, as python.org's, conda's, uv's "
                f"and the Linux distributions' do."
            ) from error
        with self._database:
            self._database.executemany(
                "INSERT INTO found(rowid, text) VALUES (?, ?)", self._texts.items()
            )

    def find(self, query: str, limit: int) -> list[int]:
        """Numbers of the texts that hold every word of the query, best first.

        Texts with the words (in any case, accent and English inflection) come first, then those
        with words that begin so, both by BM25, then those that hold them anywhere, the shortest
        first. The query has no syntax: quotes and operators are looked for as they stand.
        """
        words = list(dict.fromkeys(_fold(query).split()))
        # FTS5 drops what is no letter or digit; c++ must not find c.
        plain = [word for word in words if word.isalnum()]
        other = [word for word in words if not word.isalnum()]
        found: dict[int, None] = {}
        for suffix in ("", "*") if plain else ():
            if len(found) < limit:
                matches = self._match(" ".join(f'"{word}"{suffix}' for word in plain))
                found |= dict.fromkeys(self._holding(other, matches))
        if words and len(found) < limit:
            parts = self._holding(words, list(self._texts))
            found |= dict.fromkeys(sorted(parts, key=lambda n: (len(self._texts[n]), n)))
        return list(found)[:limit]

    def _match(self, expression: str) -> list[int]:
        statement = "SELECT rowid FROM found WHERE found MATCH ? ORDER BY rank, rowid"
        with self._lock:
            return [number for (number,) in self._database.execute(statement, (expression,))]

    def _holding(self, words: list[str], numbers: list[int]) -> list[int]:
        """Those whose texts hold all words, anywhere."""
        texts = self._texts
        for word in words:
            numbers = [number for number in numbers if word in texts[number]]
        return numbers


def _fold(text: str) -> str:
    """As it is compared: full-width as ASCII, without case, and what SQLite can store."""
    storable = text.encode("utf-8", "replace").decode()
    return unicodedata.normalize("NFKC", storable).casefold()
