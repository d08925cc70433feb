"""What hosts accept: hosts.toml, read and checked, and what a set of files would meet on one of them."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

from shrink.errors import BadInput, UsageError, printable
from shrink.files import read_all
from shrink.split import SMALLEST_LIMIT

__all__ = ["Cannot", "Host", "all_hosts", "by_name", "limit", "parse", "size_in_bytes", "warnings"]

_TABLE = Path(__file__).with_name("hosts.toml")
_TABLE_AT_MOST = 1_000_000

_UNITS = {"kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SIZE = re.compile(r"(under )?([1-9][0-9]*) (" + "|".join(_UNITS) + ")")
_OF = ("page", "file")


@dataclass(frozen=True)
class Cannot:
    """What a host cannot do, of a page or of any file that lies there, and who says so."""

    what: str
    of: str
    source: str
    stated: date | None = None


@dataclass(frozen=True)
class Host:
    """One host. Sizes stand as its source writes them, such as `25 MiB`; None where it publishes none.

    `read` is the day the source was looked up, `stated` the day that the source itself bears.
    """

    name: str
    title: str
    sources: tuple[str, ...]
    read: date
    stated: date | None = None
    file: str | None = None
    site: str | None = None
    files: int | None = None
    files_per_folder: int | None = None
    note: str = ""
    cannot: tuple[Cannot, ...] = ()

    @property
    def file_bytes(self) -> int | None:
        """The largest file it takes."""
        return None if self.file is None else size_in_bytes(self.file)

    @property
    def site_bytes(self) -> int | None:
        """The most that all files may have together."""
        return None if self.site is None else size_in_bytes(self.site)


def size_in_bytes(text: str) -> int:
    """`25 MiB` in bytes; `under 2 GiB` is one byte less. Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size")
    under, number, unit = match.groups()
    return int(number) * _UNITS[unit] - (1 if under else 0)


@functools.cache
def all_hosts() -> Mapping[str, Host]:
    """The hosts of hosts.toml by name, in its order."""
    return parse(read_all(_TABLE, at_most=_TABLE_AT_MOST).decode(), _TABLE)


def by_name(name: str) -> Host:
    """Raises UsageError for a host that the table does not hold."""
    try:
        return all_hosts()[name]
    except KeyError:
        raise UsageError(f"no such host: {printable(name)}", hint="one of " + ", ".join(all_hosts())) from None


def limit(max_mb: float | None, max_mib: float | None, host_name: str | None) -> tuple[int, str, Host | None]:
    """The limit of one file in bytes, the same as it was said, and the host, where one was said.

    Raises:
        UsageError: not exactly one is given, it is too small, or the host is unknown or publishes none.
    """
    if sum(value is not None for value in (max_mb, max_mib, host_name)) != 1:
        raise UsageError("give one of --max-mb, --max-mib and --host")
    if host_name is not None:
        host = by_name(host_name)
        if host.file_bytes is None:
            raise UsageError(
                f"{host.title} publishes no limit of one file", hint="give the one that you meet: --max-mb N"
            )
        return host.file_bytes, f"{host.file} ({host.title})", host
    number, unit, size = (max_mb, "MB", 10**6) if max_mb is not None else (max_mib, "MiB", 1 << 20)
    if number is None or not math.isfinite(number) or number * size < SMALLEST_LIMIT:
        option = f"--max-{unit.lower()} {number:g}"
        raise UsageError(f"{option} is too small: at least {SMALLEST_LIMIT:,} bytes, --max-mb 0.01")
    # Decimal: 8.2 MB are 8,200,000 bytes, which 8.2 * 10**6 is not.
    return int(Decimal(repr(number)) * size), f"{number:g} {unit}", None


def warnings(host: Host, sizes: Mapping[str, int], *, is_page: bool) -> list[str]:
    """What these files, by path with slashes, would meet on `host`, besides the limit of one file; a sentence each."""
    found = []
    total = sum(sizes.values())
    if host.site_bytes is not None and total > host.site_bytes:
        found.append(f"{host.title} takes {host.site} in all, these files are {total:,} bytes")
    if host.files is not None and len(sizes) > host.files:
        found.append(f"{host.title} takes {host.files:,} files, these are {len(sizes):,}")
    folders = Counter(str(PurePosixPath(path).parent) for path in sizes)
    most = max(folders.values(), default=0)
    if host.files_per_folder is not None and most > host.files_per_folder:
        found.append(f"{host.title} takes {host.files_per_folder:,} files in a folder, one has {most:,}")
    found += [f"{host.title} {cannot.what}" for cannot in host.cannot if is_page or cannot.of == "file"]
    return found


def parse(text: str, file: Path) -> dict[str, Host]:
    """The table in TOML. Raises BadInput, naming the host, for one that does not say what it must."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pragma: no cover
        import tomli as tomllib
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"not valid TOML: {error}", file=file) from None
    hosts = {}
    for name, table in tables.items():
        try:
            hosts[name] = _host(name, table)
        except (TypeError, ValueError) as error:
            raise BadInput(f"host {printable(name)}: {error}", file=file) from None
    return hosts


def _host(name: str, table: Any) -> Host:
    if not isinstance(table, dict):
        raise ValueError("it is no table")
    cannot = tuple(Cannot(**entry) for entry in table.get("cannot", ()))
    host = Host(name, **{**table, "cannot": cannot, "sources": tuple(_typed("sources", table.get("sources"), list))})
    for key in ("file", "site"):
        if getattr(host, key) is not None:
            size_in_bytes(_typed(key, getattr(host, key), str))
    for key in ("files", "files_per_folder"):
        count = getattr(host, key)
        if count is not None and (type(count) is not int or count < 1):
            raise ValueError(f"{key} is {count!r}, no count")
    _typed("title", host.title, str)
    _typed("note", host.note, str)
    _typed("read", host.read, date)
    _sourced(host.sources, host.stated)
    for entry in cannot:
        _typed("what", entry.what, str)
        if entry.of not in _OF:
            raise ValueError(f"of is {entry.of!r}, not one of {', '.join(_OF)}")
        _sourced((entry.source,), entry.stated)
    return host


def _sourced(sources: tuple[str, ...], stated: date | None) -> None:
    if not sources:
        raise ValueError("sources are none")
    for source in sources:
        if not _typed("source", source, str).startswith("https://"):
            raise ValueError(f"source is {source!r}, no address")
    if stated is not None:
        _typed("stated", stated, date)


def _typed(key: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{key} is {value!r}")
    return value
