"""Reads a report as a browser's parser would, for the tests of both reports."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

LOADING = {"iframe", "object", "embed", "link", "base", "form", "audio", "video"}


@dataclass
class Page(HTMLParser):
    """Tags with their attributes, text, and the cells of each table row, of one page."""

    source: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)
    blocks: dict[str, list[str]] = field(default_factory=lambda: {"style": [], "script": [], "data": []})

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._inside: list[str] = []
        self._cell = False
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in self.blocks:
            kind = "data" if dict(attributes).get("type") == "application/json" else tag
            self._inside.append(kind)
            self.blocks[kind].append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag):
        if tag in self.blocks:
            self._inside.pop()
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, text):
        if self._inside:
            self.blocks[self._inside[-1]][-1] += text
        elif self._cell:
            self.rows[-1][-1] += text

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def assert_inert(self) -> None:
        """One style and one script, named by the policy, and data; no other way to run or load, only marked links."""
        assert len(self.blocks["style"]) == len(self.blocks["script"]) == 1
        assert {kind for kind in (script.get("type") for script in self.all("script")) if kind} <= {"application/json"}
        policy = next(
            meta["content"] for meta in self.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy.startswith("default-src 'none'; img-src data:; ")
        for kind in ("style", "script"):
            (source,) = self.blocks[kind]
            digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
        assert "url(" not in self.blocks["style"][0]
        assert "@import" not in self.blocks["style"][0]
        assert LOADING.isdisjoint(tag for tag, _ in self.tags)
        for tag, attributes in self.tags:
            assert not [
                name for name in attributes if name.startswith("on") or name in ("style", "srcset", "xlink:href")
            ]
            assert (attributes.get("src") or "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,"), tag
            self._assert_link(attributes)
        assert not re.search("[\x00-\x08\x0e-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", self.source)

    @staticmethod
    def _assert_link(attributes: dict[str, str | None]) -> None:
        href = attributes.get("href") or "#"
        if href.startswith(("http://", "https://")):
            assert attributes["rel"] == "noopener noreferrer nofollow"
        else:
            assert href.startswith("#") or re.fullmatch(r"[\w./%~-]+/(report\.html|README\.md)", href), href
