"""What became of every input row: the closed list of reasons, and the columns of `ledger.parquet`.

The ledger has one row for each row of the list: kept, or dropped at one stage by one step for one reason, with the
value that decided it.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


class Reason(str, Enum):
    """Why a row was dropped. Detail (a status code, a size, a twin's key) goes into the ledger's `value`."""

    # plan
    EMPTY_URL = "empty_url"
    BAD_URL = "bad_url"
    DUPLICATE_ROW = "duplicate_row"
    # fetch: refused by us
    BLOCKED_SCHEME = "blocked_scheme"
    BLOCKED_ADDRESS = "blocked_address"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    OPT_OUT = "opt_out"  # a header: X-Robots-Tag, TDM-Reservation
    ROBOTS_DISALLOW = "robots_disallow"
    ROBOTS_UNREACHABLE = "robots_unreachable"
    THROTTLED = "throttled"  # its host's turn did not come within fetch.max_wait_s
    # fetch: the network's or the server's doing
    DNS = "dns"
    CONNECT = "connect"
    TLS = "tls"
    TIMEOUT = "timeout"
    BROKEN_TRANSFER = "broken_transfer"
    HTTP_STATUS = "http_status"
    BAD_RESPONSE = "bad_response"
    # fetch: the body
    TOO_LARGE = "too_large"
    EMPTY_BODY = "empty_body"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_IMAGE = "unsupported_image"  # an image, of a kind that nothing here decodes
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TRUNCATED_IMAGE = "truncated_image"
    CORRUPT_IMAGE = "corrupt_image"
    # fetch: an image of a local folder or tar
    UNREADABLE = "unreadable"
    # fetch: of our own doing
    WORKER_DIED = "worker_died"
    # select: one for each kind of step
    WHERE = "where"
    DEDUP = "dedup"
    DECONTAMINATE = "decontaminate"
    RELEVANCE = "relevance"
    TOP = "top"
    SAMPLE = "sample"
    BALANCE = "balance"


def ledger_schema() -> pa.Schema:
    """Columns of `ledger.parquet`.

    - key, row: the row's id, and its place in the list (0-based).
    - kept: whether it is in the packed shards; split: train, val, test or retain if so, else null.
    - stage: plan, fetch or select for a dropped row, else null; reason: a `Reason`, else null; step: the filter's name
      (select, or a `where` that plan applied), else the stage's; value: what decided it, as text; twin: the key of the
      kept duplicate, or the name of the test image hit. A row kept in retain has the step and value of the relevance
      filter that moved it there; any other kept row has none of these.
    - duplicate_group: key of the group's kept member; rows of one group never lie in different splits.
    """
    import pyarrow as pa

    return pa.schema(
        {
            "key": pa.string(),
            "row": pa.int64(),
            "url": pa.string(),
            "caption": pa.string(),
            "kept": pa.bool_(),
            "split": pa.string(),
            "stage": pa.string(),
            "step": pa.string(),
            "reason": pa.string(),
            "value": pa.string(),
            "twin": pa.string(),
            "duplicate_group": pa.string(),
        }
    )
