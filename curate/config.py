"""What a user can set for `curate`: one frozen dataclass a stage, checked when made. No heavy import here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How the list is read."""

    url_column: str | None = None
    """Column with the URL; found by itself among the usual names (url, URL, image_url, …) when not given."""
    caption_column: str | None = None
    """Column with the caption; found by itself among the usual names (caption, text, TEXT, alt, …) when not given."""
    shard_size: int = 10_000
    """Candidates a raw shard: the unit of work, of retry and of resuming."""

    def __post_init__(self) -> None:
        _at_least("plan.shard_size", self.shard_size, 1)


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are downloaded and stored."""

    processes: int = 0
    """Worker processes, each with its own connections; 0 means one a CPU core."""
    connections: int = 128
    """Requests in flight in each process."""
    per_host: int = 8
    """Requests in flight to one host in each process."""
    connect_timeout_s: float = 10.0
    """Longest wait for a connection."""
    read_timeout_s: float = 15.0
    """Longest wait for the first byte, and for each next one."""
    total_timeout_s: float = 60.0
    """Longest time for one row: redirects and body together, retries not counted."""
    max_bytes: int = 20_000_000
    """Largest body; a longer one is dropped as soon as the limit is passed."""
    max_pixels: int = 50_000_000
    """Most pixels an image may say it has; checked in its header, before any pixel is decoded."""
    min_side: int = 2
    """Images with a shorter side than this are dropped unseen: tracking pixels. Choose real sizes with a filter."""
    retries: int = 3
    """Further tries after an error that may pass: 429, 5xx, a connection or timeout error."""
    backoff_s: float = 1.0
    """Wait before the first retry; doubled each time, with jitter; a Retry-After header rules when it is there."""
    max_retry_after_s: float = 60.0
    """A Retry-After longer than this is not waited for: the row is dropped as http_status."""
    max_redirects: int = 5
    """Most redirects followed for one row; each target is checked like a new URL."""
    allow_addresses: list[str] = field(default_factory=list)
    """Networks outside the public Internet that may be reached, each with a port if wished: 127.0.0.0/8,
    10.1.0.0/16:8080, [::1]/128:8080."""
    respect_opt_out: bool = True
    """Drop images whose X-Robots-Tag header asks not to be used for AI (noai, noimageai, noml) or indexed (noindex,
    noimageindex, none)."""
    user_agent: str = "cliptailor/0.1 (dataset builder; +https://pypi.org/project/cliptailor/)"
    """What the requests call themselves; put a way to reach you here."""
    max_side: int = 512
    """Stored images have at most this on their shorter side; larger ones are scaled down (area), none up. 0 stores
    the bytes as they came."""
    jpeg_quality: int = 95
    """Quality of re-encoded JPEGs."""
    min_yield: float = 0.0
    """Share of candidates that must arrive as images; below it `build` ends with status 3 after the fetch. 0 asks
    only for one."""

    def __post_init__(self) -> None:
        for name in ("connections", "per_host", "max_bytes", "max_pixels", "jpeg_quality"):
            _at_least(f"fetch.{name}", getattr(self, name), 1)
        for name in ("processes", "retries", "max_redirects", "min_side", "max_side"):
            _at_least(f"fetch.{name}", getattr(self, name), 0)
        for network in self.allow_addresses:
            parse_network(network)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which CLIP scores the images and captions."""

    name: str
    """An open_clip architecture (ViT-B-32), OpenAI's name for one (ViT-B/32), or local-dir:FOLDER of an exported
    model."""
    pretrained: str | None = None
    """An open_clip tag (openai, laion2b_s34b_b79k, …) or the path of a weights file; not needed with local-dir:."""
    batch_size: int = 64
    """Images and captions encoded at once."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        _at_least("measure.clip.batch_size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Which signals are computed from the downloaded images."""

    clip: ClipConfig | None = None
    """The CLIP whose embeddings and score (column clip_score) are stored; none by default."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Limits of the engine that runs the filters."""

    memory_limit: str = "4GB"
    """Memory the database may use before it spills to disk."""
    threads: int = 0
    """Threads of the database; 0 means one a CPU core."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How the kept samples are laid out."""

    shard_size: int = 5_000
    """Most samples a packed shard; the last ones share what is left, so that none is a dwarf."""
    val: float = 0.05
    """Share of duplicate groups in the val split."""
    test: float = 0.05
    """Share of duplicate groups in the test split."""
    retain: int = 2_000
    """At most this many samples that passed everything but a relevance step: general pairs of the same crawl, for
    `finetune` to measure and prevent forgetting."""

    def __post_init__(self) -> None:
        _at_least("pack.shard_size", self.shard_size, 1)
        _at_least("pack.retain", self.retain, 0)
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise ConfigError(
                f"pack.val, pack.test: expected shares that leave something for train, got {self.val} and {self.test}"
            )


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report shows."""

    title: str = "Dataset"
    """Heading of the report and the data card."""
    thumbnails: int = 12
    """Pictures shown for each reason and each split."""


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything `curate build` needs."""

    urls: str | None = None
    """The list: a parquet, csv, tsv, txt, json or jsonl file, a folder of such files, or a glob."""
    out: Path = Path("dataset")
    """Folder of the dataset."""
    seed: int = 0
    """Seed of every random choice: sample, shuffle, split."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    filters: list[dict[str, Any]] = field(default_factory=list)
    """The filter steps, in order; see docs/filters.md."""
    select: SelectConfig = field(default_factory=SelectConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    report: ReportConfig = field(default_factory=ReportConfig)


def parse_network(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, int | None]:
    """Read `127.0.0.0/8`, `127.0.0.0/8:8080`, `::1/128` or `[::1]/128:8080` into a network and a port (None: any).

    Raises:
        ConfigError: it is none of these.
    """
    network, port = text.strip(), None
    try:
        if network.startswith("["):
            address, _, rest = network[1:].partition("]")
            length, _, number = rest.removeprefix("/").partition(":")
            network, port = f"{address}/{length}" if length else address, int(number) if number else None
        elif network.count(":") == 1:
            network, _, number = network.partition(":")
            port = int(number)
        return ipaddress.ip_network(network), port
    except ValueError as error:
        raise ConfigError(
            f"fetch.allow_addresses: '{text}' is not a network ({error}); "
            "expected 127.0.0.0/8, 127.0.0.0/8:8080 or [::1]/128:8080"
        ) from error


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{key}: expected at least {least}, got {value}")
