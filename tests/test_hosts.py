"""The table of hosts: every row says who said it and when, and what a set of files would meet is told."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrink.errors import BadInput, UsageError
from shrink.split import hosts

TABLE = Path("hosts.toml")
ROW = """
[here]
title = "Here"
file = "25 MiB"
site = "1 GB"
files = 3
files_per_folder = 2
sources = ["https://example.org/limits", "https://example.org/more"]
read = 2026-11-21

[[here.cannot]]
what = "cannot do threads"
of = "page"
source = "https://example.org/threads"

[[here.cannot]]
what = "cannot be fetched"
of = "file"
source = "https://example.org/fetch"
stated = 2025-01-02
"""


@pytest.mark.parametrize("name", hosts.all_hosts())
def test_every_row_has_a_source_and_a_date(name: str) -> None:
    host = hosts.all_hosts()[name]
    assert host.title
    assert host.sources
    assert all(source.startswith("https://") for source in host.sources)
    assert date(2026, 1, 1) <= host.read
    assert host.stated is None or host.stated <= host.read
    for limit in (host.file_bytes, host.site_bytes, host.files, host.files_per_folder):
        assert limit is None or limit > 0
    for cannot in host.cannot:
        assert cannot.what
        assert cannot.source.startswith("https://")


def test_the_hosts_that_people_use_are_there() -> None:
    table = hosts.all_hosts()
    limits = {name: host.file_bytes for name, host in table.items()}
    assert limits["github"] == 100_000_000
    assert limits["github-upload"] == 25_000_000
    assert limits["github-releases"] == (2 << 30) - 1
    assert limits["jsdelivr"] == 20_000_000
    assert limits["cloudflare-pages"] == limits["cloudflare-workers"] == 25 << 20
    assert limits["npm"] is limits["netlify"] is limits["vercel"] is None
    assert table["cloudflare-pages"].files == 20_000
    assert table["github-pages"].site_bytes == 1_000_000_000
    assert {"hugging-face", "firebase"} <= table.keys()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("25 MB", 25_000_000),
        ("25 MiB", 26_214_400),
        ("1 GB", 10**9),
        ("under 2 GiB", 2_147_483_647),
        ("10 kB", 10_000),
        ("1 KiB", 1024),
    ],
)
def test_sizes_are_read_as_they_are_written(text: str, count: int) -> None:
    assert hosts.size_in_bytes(text) == count


@pytest.mark.parametrize("text", ["", "25", "25MB", "25 mb", "0 MB", "-1 MB", "2.5 MB", "over 2 GB", "25 MB "])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        hosts.size_in_bytes(text)


@given(st.integers(1, 10**6))
def test_mib_are_larger_than_mb(count: int) -> None:
    assert hosts.size_in_bytes(f"{count} MB") == count * 10**6
    assert hosts.size_in_bytes(f"{count} MiB") == count << 20
    assert hosts.size_in_bytes(f"under {count} MiB") == (count << 20) - 1


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("[here]", "here", "not valid TOML"),
        ("[here]", "plain = 1\n[here]", "it is no table"),
        ('title = "Here"\n', "", "title"),
        ('title = "Here"', "title = 1", "title is 1"),
        ('file = "25 MiB"', 'file = "25 mib"', "is no size"),
        ('file = "25 MiB"', "file = 25", "file is 25"),
        ('site = "1 GB"', 'site = "0 GB"', "is no size"),
        ("files = 3", "files = 0", "files is 0"),
        ("files = 3", 'files = "many"', "files is 'many'"),
        ("files = 3", "files = true", "files is True"),
        ("files_per_folder = 2", "files_per_folder = -2", "files_per_folder is -2"),
        ("files_per_folder = 2", "file_per_folder = 2", "file_per_folder"),
        ('sources = ["https://example.org/limits", "https://example.org/more"]\n', "", "sources is None"),
        ('["https://example.org/limits", "https://example.org/more"]', '"https://example.org"', "sources is 'https"),
        ('"https://example.org/limits", "https://example.org/more"', "", "sources are none"),
        ('"https://example.org/more"', '"somebody told me"', "no address"),
        ("read = 2026-11-21\n", "", "read"),
        ("read = 2026-11-21", 'read = "lately"', "read is 'lately'"),
        ("stated = 2025-01-02", "stated = 2025", "stated is 2025"),
        ('of = "page"', 'of = "moon"', "of is 'moon'"),
        ('"https://example.org/threads"', '"http://example.org/threads"', "no address"),
        ('what = "cannot do threads"\n', "", "what"),
    ],
)
def test_a_row_that_does_not_say_what_it_must_is_refused(line: str, instead: str, said: str) -> None:
    assert line in ROW
    with pytest.raises(BadInput) as caught:
        hosts.parse(ROW.replace(line, instead, 1), TABLE)
    assert said in str(caught.value)
    assert str(caught.value).startswith("hosts.toml: ")


def test_an_unknown_host_is_named_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no such host: geocities \(one of github, .*cloudflare-pages"):
        hosts.by_name("geocities")
    assert hosts.by_name("npm").title == "npm"


def test_what_files_would_meet() -> None:
    here = hosts.parse(ROW, TABLE)["here"]
    assert hosts.warnings(here, {"a": 1, "b": 2}, is_page=False) == ["Here cannot be fetched"]
    assert hosts.warnings(here, {"a": 1, "b": 2}, is_page=True) == ["Here cannot do threads", "Here cannot be fetched"]
    assert hosts.warnings(here, {"a": 1, "b": 10**9 - 1}, is_page=False) == ["Here cannot be fetched"]
    assert hosts.warnings(here, {"a": 1, "b": 10**9}, is_page=False) == [
        "Here takes 1 GB in all, these files are 1,000,000,001 bytes",
        "Here cannot be fetched",
    ]
    many = {"a": 1, "d/b": 1, "d/c": 1}
    assert hosts.warnings(here, many, is_page=False) == ["Here cannot be fetched"]
    assert hosts.warnings(here, {**many, "d/d": 1}, is_page=False) == [
        "Here takes 3 files, these are 4",
        "Here takes 2 files in a folder, one has 3",
        "Here cannot be fetched",
    ]
    assert hosts.warnings(here, {}, is_page=False) == ["Here cannot be fetched"]
