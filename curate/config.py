"""What a user can set for `curate`: one frozen dataclass a stage, checked when made. No heavy import here."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curate.errors import ConfigError, did_you_mean
from curate.keys import flags_of

IMG2DATASET_FLAGS = flags_of(
    "img2dataset",
    {
        "url_list": "urls",
        "input_format": "the list's own name says it",
        "output_folder": "out",
        "output_format": "shards are always tars beside Parquets, as webdataset's",
        "url_col": "plan.columns.url",
        "caption_col": "plan.columns.caption",
        "save_additional_columns": "all columns of the list are kept",
        "processes_count": "fetch.processes",
        "thread_count": "fetch.connections",
        "timeout": "fetch.total_timeout_s",
        "number_sample_per_shard": "pack.shard_size",
        "incremental_mode": "the same command does what is left, and nothing else",
        "min_image_size": "a filter: {name: side, where: least(original_width, original_height) >= …}",
        "max_aspect_ratio": "a filter: {name: aspect, where: aspect <= …}",
        "compute_hash": "a sha256 is always there",
        "extract_exif": "it is left out",
        "enable_wandb": "progress is printed, and report.html says the rest",
        "distributor": "executor",
        "user_agent_token": "fetch.contact",
        "disallowed_header_directives": "opt-outs are heeded but for fetch.ignore_opt_outs",
        "max_shard_retry": "the same command does what is left",
    },
)


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    """Which columns of the list are which."""

    url: str | None = None
    """Column with the URL; found by itself among the usual names (url, URL, image_url, …) when not given."""
    caption: str | None = None
    """Column with the caption; found by itself among the usual names (caption, text, TEXT, alt, …) when not given."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How the list is read."""

    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    shard_size: int = 10_000
    """Candidates a raw shard: the unit of work, of retry and of resuming."""

    def __post_init__(self) -> None:
        _at_least("plan.shard_size", self.shard_size, 1)


AGENT = "cliptailor"
EXECUTORS = ("local", "ray")
ENGINES = ("native", "img2dataset")
RESIZE_MODES = ("no", "border", "keep_ratio", "keep_ratio_largest", "center_crop")
ENCODE_FORMATS = ("jpg", "webp", "png")
LEAST_SHARD_BYTES = 100_000
# What a site can say against the use of its images, and the names under which each can be ignored.
OPT_OUTS = ("robots.txt", "noai", "noimageai", "noml", "noindex", "noimageindex", "none", "tdm-reservation")


@dataclass(frozen=True, kw_only=True)
class FetchConfig:
    """How images are downloaded and stored."""

    engine: str = "native"
    """native, or img2dataset: the real one on the same plan, watched over and checked. That one heeds opt-out headers
    and the guard's addresses, but asks no robots.txt and keeps no limit per host: the data card says so."""
    processes: int = 0
    """Worker processes, each with its own connections; 0 means one a CPU core."""
    connections: int = 128
    """Requests in flight in each process."""

    per_host: int = 8
    """Most requests in flight to one host, all processes together; fewer while a host answers 429 or 503."""
    per_host_rate: float = 50.0
    """Most requests a second to one host, all processes together; 0 sets no limit."""
    contact: str | None = None
    """A URL or address in the user agent, by which the sites can reach you."""
    ignore_opt_outs: list[str] = field(default_factory=list)
    """Opt-outs not to be heeded, by name: robots.txt, noai, noimageai, noml, noindex, noimageindex, none,
    tdm-reservation. All are heeded by default; the data card names those that are not."""
    allow_addresses: list[str] = field(default_factory=list)
    """Networks outside the public Internet that may be reached, each with a port if wished: 127.0.0.0/8,
    10.1.0.0/16:8080, [::1]/128:8080."""

    connect_timeout_s: float = 10.0
    """Longest wait for a connection."""
    read_timeout_s: float = 15.0
    """Longest wait for the first byte, and for each next one."""
    total_timeout_s: float = 60.0
    """Longest time for one row: redirects and body together, retries and waits for the host's turn not counted."""
    max_wait_s: float = 600.0
    """Longest time that a row waits for a host that asked for fewer requests; after it the row is dropped as
    throttled."""
    retries: int = 3
    """Further tries, at the end of the shard, after an error that may pass: 429, 5xx, a connection or timeout error."""
    backoff_s: float = 1.0
    """Longest wait before the first retry, which is drawn (full jitter); doubled each time; a Retry-After header rules
    when it is there."""
    max_retry_after_s: float = 60.0
    """A Retry-After longer than this is not waited for: the row is dropped as http_status."""
    max_redirects: int = 5
    """Most redirects followed for one row; each target is checked like a new URL."""
    outage_s: float = 600.0
    """When nothing can be reached any more, the run pauses; after this long it ends with status 69, and the shards
    at work are not marked as done."""
    min_yield: float = 0.0
    """Share of candidates that must arrive as images; below it `build` ends with status 3 after the fetch. 0 asks
    only for one."""

    max_bytes: int = 20_000_000
    """Largest body, content encoding undone; a longer one is dropped as soon as the limit is passed."""
    max_pixels: int = 50_000_000
    """Most pixels an image may say it has; checked in its header, before any pixel is decoded. Whatever this says,
    one that takes over 150 MB to decode is dropped: PNG and WebP from 21, HEIC and AVIF from 12 to 15 megapixels."""
    min_side: int = 2
    """Images with a shorter side than this are dropped unseen: tracking pixels. Choose real sizes with a filter."""
    decode: bool = True
    """Decode each image, to check all of it and to measure its pixels. Without it (only where the bytes are stored as
    they come: resize_mode no, skip_reencode) header and end of file are checked, and columns that need pixels are
    null."""
    resize_mode: str = "keep_ratio"
    """img2dataset's: no; border (fit into a square, white around it); keep_ratio (shorter side is image_size);
    keep_ratio_largest (longer side is); center_crop (a square from the middle)."""
    image_size: int = 512
    """Pixels of the side that resize_mode sets."""
    resize_only_if_bigger: bool = True
    """Leave images alone that are small already. Without it, one that would grow beyond 25 megapixels is dropped."""
    skip_reencode: bool = True
    """Store the bytes as they came where the image needs no change."""
    encode_format: str = "jpg"
    """Of images that are changed: jpg, webp or png."""
    encode_quality: int = 95
    """Quality of re-encoded images; for png the compression, 0 to 9."""

    def __post_init__(self) -> None:
        for name in ("connections", "per_host", "max_bytes", "max_pixels", "image_size"):
            _at_least(f"fetch.{name}", getattr(self, name), 1)
        for name in ("processes", "per_host_rate", "retries", "max_redirects", "min_side", "encode_quality"):
            _at_least(f"fetch.{name}", getattr(self, name), 0)
        _one_of("fetch.engine", self.engine, ENGINES)
        _one_of("fetch.resize_mode", self.resize_mode, RESIZE_MODES)
        _one_of("fetch.encode_format", self.encode_format, ENCODE_FORMATS)
        for name in self.ignore_opt_outs:
            _one_of("fetch.ignore_opt_outs", name, OPT_OUTS)
        if self.encode_quality > (9 if self.encode_format == "png" else 100):
            raise ConfigError(
                f"fetch.encode_quality: {self.encode_quality} is too much for {self.encode_format}; expected 0 to 100, "
                "for png the compression, 0 to 9"
            )
        if not self.decode and (self.resize_mode != "no" or not self.skip_reencode):
            raise ConfigError("fetch.decode false: needs resize_mode no and skip_reencode true")
        for network in self.allow_addresses:
            parse_network(network)

    @property
    def user_agent(self) -> str:
        """What the requests call themselves; its first word is the name that robots.txt and opt-outs mean."""
        return f"{AGENT}/0.1 (image dataset builder; {self.contact or 'no contact given'})"


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which CLIP scores the images and captions."""

    name: str
    """An open_clip architecture (ViT-B-32), OpenAI's name for one (ViT-B/32), a folder of open_clip's or transformers',
    or an id of the hub (ORG/NAME)."""
    pretrained: str | None = None
    """An open_clip tag (openai, laion2b_s34b_b79k, …) or the path of a weights file; a folder or an id needs none."""
    batch_size: int = 64
    """Images and captions encoded at once."""
    device: str = "auto"
    """auto (the best there is), cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        _at_least("measure.clip.batch_size", self.batch_size, 1)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """Which signals are computed from the downloaded images and their captions."""

    text: bool = True
    """What captions tell by themselves: language, letter_share, is_filename, is_boilerplate …; see docs/signals.md."""
    safety: bool = False
    """The column nsfw, the probability that an image is not safe for work; needs pip install 'cliptailor[safety]'."""
    clip: ClipConfig | None = None
    """The CLIP whose embeddings and score (column clip_score) are stored; none by default."""
    signals: list[dict[str, Any]] = field(default_factory=list)
    """Signals of your own: name, function (my_module:my_function) and columns; see docs/signals.md."""


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Limits of the engine that runs the filters."""

    memory_limit: str = "4GB"
    """Memory the database may use before it spills to disk."""
    threads: int = 0
    """Threads of the database; 0 means one a CPU core."""


@dataclass(frozen=True, kw_only=True)
class ConceptsConfig(SelectConfig):
    """What `curate concepts` needs."""

    out: Path = Path("dataset")
    """Folder of the dataset, planned; concepts.txt and concepts.parquet are written there."""
    count: int | None = None
    """Most concepts, the most frequent ones; null: all."""
    min_count: int = 100
    """Captions that a word or bigram must stand in."""
    min_pmi: float = 3.0
    """Least pointwise mutual information of a bigram, in bits."""

    def __post_init__(self) -> None:
        _at_least("min_count", self.min_count, 1)
        if self.count is not None:
            _at_least("count", self.count, 1)


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How the kept samples are laid out."""

    shard_size: int = 5_000
    """Most samples a packed shard; all of a split are of near-equal size, so that none is a dwarf."""
    shard_bytes: int | None = None
    """Most bytes a packed tar, such as 1000000000, in place of shard_size; at least 100000. Only a single larger sample
    may pass it."""
    val: float = 0.05
    """Share of duplicate groups in the val split."""
    test: float = 0.05
    """Share of duplicate groups in the test split."""
    retain: int = 2_000
    """At most this many samples that passed everything but a relevance step: general pairs of the same crawl, for
    `finetune` to measure and prevent forgetting."""

    def __post_init__(self) -> None:
        _at_least("pack.shard_size", self.shard_size, 1)
        if self.shard_bytes is not None and self.shard_bytes < LEAST_SHARD_BYTES:
            raise ConfigError(
                f"pack.shard_bytes: {self.shard_bytes} bytes hold hardly a sample; expected at least "
                f"{LEAST_SHARD_BYTES}, such as 1000000000 for 1 GB"
            )
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

    not_here = IMG2DATASET_FLAGS

    urls: str | None = None
    """The list: a parquet, csv, tsv, txt, json or jsonl file (also .gz, .zst), a folder of such files, a glob, or any
    of these at s3://, gs://, hf:// …; or images that are there already: a folder of images, of webdataset tars, or one
    that img2dataset made."""
    out: Path = Path("dataset")
    """Folder of the dataset."""
    seed: int = 0
    """Seed of every random choice: sample, shuffle, split."""
    retry_failed: bool = False
    """Ask again for the rows of an earlier run that failed for a reason that may pass: timeout, dns, 503 …"""
    executor: str = "local"
    """Where fetch and measure run: local, on this machine; or ray, on all nodes of a running Ray cluster; see
    docs/scale.md. Needs pip install 'cliptailor[ray]'."""
    plan: PlanConfig = field(default_factory=PlanConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    filters: list[dict[str, Any]] = field(default_factory=list)
    """The filter steps, in order; see docs/filters.md."""
    select: SelectConfig = field(default_factory=SelectConfig)
    pack: PackConfig = field(default_factory=PackConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        _one_of("executor", self.executor, EXECUTORS)


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


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{key}: '{value}' is none of {', '.join(known)}.{did_you_mean(value, known)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"{key}: expected at least {least}, got {value}")
