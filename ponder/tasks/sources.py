"""Where real data come from, under which licence, and where they lie: the folder that PONDER_DATA names.

Nothing is downloaded. A file is found under its upstream name, plain or gzipped, and its text is held to the checksum.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ponder.errors import UserError
from ponder.tasks.checksums import SHA256


@dataclass(frozen=True)
class Source:
    """Official origin of a data set."""

    url: str
    licence: str
    citation: str


SOURCES = {
    "text/tinyshakespeare": Source(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "public domain",
        "@misc{karpathy2015charrnn, author={Karpathy, Andrej}, title={char-rnn}, year={2015}, "
        "howpublished={https://github.com/karpathy/char-rnn}}",
    ),
    "text/wikitext2": Source(
        "https://github.com/pytorch/examples/tree/main/word_language_model/data/wikitext-2",
        "CC BY-SA 3.0",
        "@article{merity2016pointer, title={Pointer Sentinel Mixture Models}, author={Merity, Stephen and Xiong, "
        "Caiming and Bradbury, James and Socher, Richard}, journal={arXiv:1609.07843}, year={2016}}",
    ),
    "babi/": Source(
        "http://www.thespermwhale.com/jaseweston/babi/tasks_1-20_v1-2.tar.gz",
        "CC BY 3.0",
        "@article{weston2015towards, title={Towards AI-Complete Question Answering: A Set of Prerequisite Toy Tasks}, "
        "author={Weston, Jason and Bordes, Antoine and Chopra, Sumit and Rush, Alexander M. and van Merrienboer, Bart "
        "and Joulin, Armand and Mikolov, Tomas}, journal={arXiv:1502.05698}, year={2015}}",
    ),
    "clrs/": Source(
        "https://pypi.org/project/dm-clrs/2.0.3 (its samplers; see ponder/tasks/clrs.py)",
        "Apache-2.0",
        "@inproceedings{velickovic2022clrs, title={The CLRS Algorithmic Reasoning Benchmark}, author={Velickovic, "
        "Petar and Badia, Adria Puigdomenech and Budden, David and Pascanu, Razvan and Banino, Andrea and Dashevskiy, "
        "Misha and Hadsell, Raia and Blundell, Charles}, booktitle={ICML}, year={2022}}",
    ),
    "sudoku/clue17": Source(
        "https://github.com/wise-irbe/dlx (data/sudoku17.txt)",
        "Apache-2.0",
        "@misc{royle2005minimum, author={Royle, Gordon}, title={Minimum Sudoku}, year={2005}}",
    ),
    "sudoku/top1465": Source(
        "http://magictour.free.fr/top1465",
        "Apache-2.0",
        "@misc{magictour2005top1465, title={Top 1465 hardest sudokus}, howpublished={http://magictour.free.fr}}",
    ),
}


def source_of(name: str) -> Source | None:
    """The origin of a file, or None where the file is the user's own. `name` is relative to the data folder."""
    return next((source for prefix, source in SOURCES.items() if name.startswith(prefix)), None)


@contextlib.contextmanager
def reading_from(folder: str) -> Iterator[None]:
    """PONDER_DATA is `folder` inside, and what it was afterwards."""
    before = os.environ.get("PONDER_DATA")
    os.environ["PONDER_DATA"] = folder
    try:
        yield
    finally:
        os.environ.pop("PONDER_DATA")
        if before is not None:
            os.environ["PONDER_DATA"] = before


def data_folder() -> Path | None:
    """PONDER_DATA, or None where it is not set."""
    named = os.environ.get("PONDER_DATA")
    return Path(named).expanduser() if named else None


def find(*names: str) -> Path:
    """Path of the first of `names` that is there, plain or gzipped, its text checked.

    Args:
      names: relative to the data folder, without ".gz"; other names of the same data after the first.

    Raises:
      UserError: none is there (the line says where to get it and where to put it), or its text is not as published.
    """
    folder = data_folder()
    if folder is not None:
        for name in names:
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    _check(path, name)
                    return path
    source = source_of(names[0])
    origin = f"get it from {source.url} and " if source else ""
    where = f"put it at {folder / names[0]} (or .gz)" if folder else "set PONDER_DATA to the folder that holds it"
    raise UserError(f"no data file {names[0]}: {origin}{where}")


def read(path: Path) -> bytes:
    """The file's bytes, unzipped if its name ends in .gz. Raises UserError where it cannot be read."""
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({error}): fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The file as UTF-8. Raises UserError where it is something else."""
    try:
        return read(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}): convert it, as with iconv -t utf-8") from error


def _check(path: Path, name: str) -> None:
    if name in SHA256 and digest(path) != SHA256[name]:
        source = source_of(name)
        again = f": fetch it again from {source.url}" if source else ""
        raise UserError(f"{path} is damaged or another version (SHA-256 of its text){again}")


def digest(path: Path) -> str:
    """SHA-256 of the file's bytes, unzipped; remembered until the file changes. Raises UserError as `read` does."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return _digest(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, modified: int, size: int) -> str:
    return hashlib.sha256(read(path)).hexdigest()
