"""What each reason in the ledger means, in one line, and what no filter of a configuration has looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from curate.ledger import Reason

DEFINITIONS: dict[Reason, str] = {
    Reason.EMPTY_URL: "The list has no URL in this row.",
    Reason.BAD_URL: "What stands in the URL column is not a URL with a host.",
    Reason.DUPLICATE_ROW: "The same URL with the same caption stands earlier in the list.",
    Reason.BLOCKED_SCHEME: "Not http or https; nothing else is ever opened.",
    Reason.BLOCKED_ADDRESS: "The host, or a redirect, leads to a private, local or otherwise non-public address.",
    Reason.TOO_MANY_REDIRECTS: "More redirects than fetch.max_redirects, or a circle of them.",
    Reason.OPT_OUT: "The server asks that the image not be indexed or used for AI (X-Robots-Tag, TDM-Reservation).",
    Reason.ROBOTS_DISALLOW: "The site's robots.txt asks that this path not be fetched.",
    Reason.ROBOTS_UNREACHABLE: "The site's robots.txt could not be had, which means no until it can (RFC 9309).",
    Reason.THROTTLED: "The host's turn did not come within fetch.max_wait_s; --retry-failed asks again.",
    Reason.DNS: "The host's name has no address.",
    Reason.CONNECT: "The host did not accept a connection.",
    Reason.TLS: "The host's certificate or encryption is not valid.",
    Reason.TIMEOUT: "No connection, no byte, or no end within the time limits.",
    Reason.BROKEN_TRANSFER: "The connection ended before the announced length.",
    Reason.HTTP_STATUS: "The server answered with an error status; the value says which.",
    Reason.BAD_RESPONSE: "The answer was not valid HTTP.",
    Reason.TOO_LARGE: "The body is larger than fetch.max_bytes.",
    Reason.EMPTY_BODY: "The server answered with nothing.",
    Reason.NOT_AN_IMAGE: "The body is not an image, whatever its type says.",
    Reason.UNSUPPORTED_IMAGE: "An image of a kind that is not decoded here.",
    Reason.TOO_MANY_PIXELS: "More pixels than fetch.max_pixels in the image's header, or than memory has room for.",
    Reason.TOO_SMALL: "The shorter side is below fetch.min_side: a tracking pixel.",
    Reason.TRUNCATED_IMAGE: "The image ends before its last line.",
    Reason.CORRUPT_IMAGE: "The image starts like one but cannot be decoded.",
    Reason.UNREADABLE: "The file of a local source is gone, or shorter than it was when the list was made.",
    Reason.WORKER_DIED: "The process at work on this row died with it, twice; the next run asks for it again.",
    Reason.WHERE: "A filter's condition is not true for this row.",
    Reason.DEDUP: "A duplicate of a pair that is kept; the twin says which.",
    Reason.DECONTAMINATE: "The image is, or nearly is, one of a test set's.",
    Reason.RELEVANCE: "Farther from the topic's prompts and example images than what was kept.",
    Reason.TOP: "Below the best by this measure.",
    Reason.SAMPLE: "Not drawn in a random sample.",
    Reason.BALANCE: "Its caption holds no concept of the list, or only such as had their share.",
}

STAGES = {
    "plan": "reading the list: missing or unusable URLs, repeated rows",
    "fetch": "downloading, and a first look at what came",
}


def define(reason: str) -> str:
    """The definition of a reason as it stands in the ledger; of an unknown one, nothing."""
    return DEFINITIONS[Reason(reason)] if reason in {known.value for known in Reason} else ""


def why_paired(step: Mapping[str, Any]) -> str:
    """Of a dedup or decontaminate step: what makes two rows the same, and which of them stays. Of others, nothing."""
    if isinstance(dedup := step.get("dedup"), dict):
        named, distance = dedup.get("by", "sha256"), dedup.get("distance", 0)
        by = " and ".join(named) if isinstance(named, list) else named
        near = {"phash": f"at most {distance} bits of phash apart", "embedding": "images whose embeddings are near"}
        same = near.get(by, f"equal {by}")
        keep = dedup.get("keep", "width * height DESC")
        return f"Duplicates: {same}. Of a group the first by {keep} stays; of equals the smaller key."
    if "decontaminate" in step:
        return "Leaks: each is one of a test set's images, or nearly is; the value says by which measure. None stays."
    return ""


def limits(filters: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must not take for granted of a dataset made with these filters, one sentence each.

    Args:
        filters: the `filters` of the configuration, as they stand in the file.
    """
    conditions = " ".join(str(step.get("where", "")) for step in filters)
    scored = "clip_score" in conditions or any("clip_score" in str(step.get("top", "")) for step in filters)
    by = [str(step["dedup"].get("by", "sha256")) for step in filters if isinstance(step.get("dedup"), dict)]
    decontaminated = any("decontaminate" in step for step in filters)
    unsafe = "Nothing looked for unsafe or private pictures. Look at a sample yourself before you share the dataset."
    return [
        "Captions were judged by a CLIP's score; what that CLIP does not know, it cannot judge."
        if scored
        else "No filter compares the image with its caption, so captions that do not fit are still here; one on "
        "clip_score finds many of them.",
        "Images were compared with the test sets that the filters name, and with no others."
        if decontaminated
        else "Nothing was compared with a test set: images that you will evaluate on may be here.",
        "Near duplicates were found by perceptual hash: crops, mirror images and redrawn pictures pass it."
        if "phash" in by
        else "Near duplicates (rescaled, re-encoded) were not looked for.",
        *([] if "nsfw" in conditions else [unsafe]),
        "Licences, consent and personal data were not checked: an image that a server gives to anyone is not yet a "
        "permission.",
    ]
