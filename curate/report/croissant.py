"""`croissant.json`: the dataset as metadata that search engines and ML tools read (MLCommons Croissant 1.1, RAI 1.0).

It names the files with their sha256, the ledger's columns as a record set, and how the data came about.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curate.html import count, visible

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
LEDGER = {
    "key": ("sc:Text", "Id of the row: its place in this dataset's files."),
    "row": ("sc:Integer", "Place in the list, from 0."),
    "url": ("sc:URL", "Where the image was asked for."),
    "caption": ("sc:Text", "The caption that the list gives."),
    "kept": ("sc:Boolean", "Whether the pair is in the packed shards."),
    "split": ("sc:Text", "train, val, test or retain, of kept pairs."),
    "stage": ("sc:Text", "The stage that dropped the row."),
    "step": ("sc:Text", "The filter that dropped the row."),
    "reason": ("sc:Text", "Why, in one word."),
    "value": ("sc:Text", "What decided it."),
    "twin": ("sc:Text", "The kept duplicate, or the test image hit."),
    "duplicate_group": ("sc:Text", "Key of the kept member of the row's group."),
}
PARQUET = "application/x-parquet"


def croissant(out: Path, figures: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata, JSON-ready; the same folder gives the same.

    Args:
        out: the dataset folder; croissant.json is to lie in it, and names its files by their paths from there.
        figures: `report.json`'s data.
        facts: the manifest: sha256 and size of each file.
    """
    title = visible(figures["title"])
    files = {name: told for name, told in facts["files"].items() if (out / name).exists()}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "name": title,
        "conformsTo": "http://mlcommons.org/croissant/1.1",
        "description": f"{count(figures['kept'])} image–caption pairs from the web, chosen from a list of "
        f"{count(figures['rows'])} rows; ledger.parquet tells of every row why it was kept or dropped.",
        "version": "1.0.0",
        "isLiveDataset": False,
        "citeAs": f"{title}, made with cliptailor, fingerprint {facts['fingerprint']}",
        "rai:dataCollection": "Downloaded from the URLs of a list; README.md says how the sites were treated.",
        "rai:dataPreprocessingProtocol": [
            f"{step['stage']}: {step['step']} {step['what']}".strip() for step in figures["funnel"]
        ],
        "rai:dataLimitations": "README.md, under 'What to know before use'. Licences and consent were not checked.",
        "distribution": [_file(name, told) for name, told in sorted(files.items())],
        "recordSet": [_records("ledger", ["ledger.parquet"], "Every row of the list, once.")] if files else [],
    }


def _file(name: str, told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{told['bytes']} B",
        "encodingFormat": PARQUET if name.endswith(".parquet") else "application/x-tar",
        "sha256": told["sha256"],
    }


def _records(name: str, files: list[str], said: str) -> dict[str, Any]:
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{name}/{column}",
            "name": f"{name}/{column}",
            "description": meaning,
            "dataType": kind,
            "source": {"fileObject": {"@id": files[0]}, "extract": {"column": column}},
        }
        for column, (kind, meaning) in LEDGER.items()
    ]
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": said,
        "key": {"@id": f"{name}/key"},
        "field": fields,
    }
