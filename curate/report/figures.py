"""Every figure of the report, counted by DuckDB over the dataset's Parquet files: `report.json` is this.

Nothing row by row comes into Python but the rows that are shown, so memory does not grow with the dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from curate.concepts.matching import plain
from curate.database import literal, quoted
from curate.report.definitions import STAGES, define
from curate.report.distributions import distributions
from curate.report.tables import LICENCES, Tables
from curate.shards import SPLITS

TOP_HOSTS = 15
TOP_CAPTIONS = 12
TOP_LANGUAGES = 20
TOP_WORDS = 40
LONGEST_CAPTION = 300
# Captions whose words are counted: of a longer list, every second row, or third, …
WORDS_OF = 250_000
REFUSALS = ("robots_disallow", "robots_unreachable", "opt_out", "throttled", "blocked_address")


def count_all(tables: Tables, filters: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All figures as JSON-ready data; the SQL of each is in `tables.sql` then.

    Args:
        tables: of the dataset.
        filters: the `filters` of the configuration, for the order and the wording of the steps.
    """
    rows, kept = tables.ask("rows", "SELECT count(*), count(*) FILTER (kept) FROM ledger")[0]
    reasons = _reasons(tables)
    funnel = _funnel(rows, reasons, _retained(tables), filters)
    return {
        "rows": rows,
        "kept": kept,
        "dropped": rows - kept,
        "images": _images(tables),
        "splits": _splits(tables),
        "funnel": funnel,
        "reasons": reasons,
        "saved": [
            {"step": step["step"], "requests": step["dropped"]}
            for step in funnel
            if step["stage"] == "plan" and step["step"] != "plan"
        ],
        "answers": _answers(tables),
        "refusals": _refusals(tables),
        "distributions": distributions(tables, filters),
        "hosts": _hosts(tables),
        "captions": _captions(tables),
        "words": _words(tables, rows),
        "concepts": _concepts(tables, rows, filters),
        "languages": _languages(tables),
        "licences": _licences(tables),
    }


def _images(tables: Tables) -> int:
    if "status" not in tables.columns():
        return 0
    return int(tables.ask("images", "SELECT count(*) FROM rows WHERE status = 'success'")[0][0])


def _splits(tables: Tables) -> dict[str, int]:
    counts = dict(tables.ask("splits", "SELECT split, count(*) FROM ledger WHERE kept GROUP BY split"))
    return {split: counts.get(split, 0) for split in SPLITS}


def _reasons(tables: Tables) -> list[dict[str, Any]]:
    query = """
        SELECT stage, step, reason, count(*) AS dropped FROM ledger WHERE NOT kept
        GROUP BY stage, step, reason ORDER BY dropped DESC, stage, step, reason
    """
    return [
        {"stage": stage, "step": step, "reason": reason, "definition": define(reason), "dropped": dropped}
        for stage, step, reason, dropped in tables.ask("reasons", query)
    ]


def _retained(tables: Tables) -> dict[str, int]:
    """By step: the rows that it moved into the split retain."""
    return dict(tables.ask("retained", "SELECT step, count(*) FROM ledger WHERE split = 'retain' GROUP BY step"))


def _funnel(
    rows: int, reasons: Sequence[dict[str, Any]], retained: dict[str, int], filters: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The stages and steps in the order in which a row meets them: what each dropped, moved to retain, and left.

    What lies in retain is kept, so it counts as left.
    """
    dropped: dict[tuple[str, str], int] = {}
    for entry in reasons:
        place = (entry["stage"], entry["step"])
        dropped[place] = dropped.get(place, 0) + entry["dropped"]
    left, funnel = rows, []
    for stage, step, what in _places(dropped, filters):
        gone, moved = dropped.get((stage, step), 0), retained.get(step, 0) if stage == "select" else 0
        left -= gone
        funnel.append({"stage": stage, "step": step, "what": what, "dropped": gone, "retained": moved, "left": left})
    return funnel


def _places(dropped: dict[tuple[str, str], int], filters: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    said = {str(step.get("name")): describe(step) for step in filters}
    pushed = [("plan", name, what) for name, what in said.items() if ("plan", name) in dropped]
    selected = [
        ("select", name, what)
        for name, what in said.items()
        if ("plan", name) not in dropped or ("select", name) in dropped
    ]
    known = [("plan", "plan", STAGES["plan"]), *pushed, ("fetch", "fetch", STAGES["fetch"]), *selected]
    there = {(stage, step) for stage, step, _ in known}
    # A ledger made with other filters than those given: its steps are still counted.
    return known + [(stage, step, "") for stage, step in sorted(dropped) if (stage, step) not in there]


def describe(step: dict[str, Any]) -> str:
    """A filter in one line, as it stands in the configuration: `width >= 200`, `dedup {by: sha256}`."""
    rest = {key: value for key, value in step.items() if key != "name"}
    if "where" in rest:
        return str(rest["where"])
    written = yaml.safe_dump(rest, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return written.strip().removeprefix("{").removesuffix("}").replace(": {", " {", 1)


# --- sources ---------------------------------------------------------------------------------------------------------


def _hosts(tables: Tables) -> dict[str, Any]:
    """The hosts most rows were fetched from, how many of them came, and what went wrong most often."""
    if not {"url_host", "status", "reason"} <= set(tables.columns("raw")):
        return {"hosts": 0, "top": []}
    query = f"""
        SELECT url_host, count(*) AS rows, count(*) FILTER (status = 'success') AS images,
            count(*) FILTER (kept) AS kept
        FROM rows WHERE url_host IS NOT NULL AND status IS NOT NULL
        GROUP BY url_host ORDER BY rows DESC, url_host LIMIT {TOP_HOSTS}
    """
    top = tables.ask("hosts.top", query)
    number = tables.ask("hosts.hosts", "SELECT count(DISTINCT url_host) FROM rows WHERE status IS NOT NULL")[0][0]
    worst = _worst_reasons(tables, [host for host, *_ in top])
    names = ("host", "rows", "images", "kept")
    listed = [{**dict(zip(names, host, strict=True)), "worst": worst.get(host[0])} for host in top]
    return {"hosts": number, "top": listed}


def _worst_reasons(tables: Tables, hosts: Sequence[str]) -> dict[str, str]:
    listed = ", ".join(map(literal, hosts)) or "NULL"
    query = f"""
        SELECT url_host, reason FROM rows WHERE stage = 'fetch' AND url_host IN ({listed})
        GROUP BY url_host, reason ORDER BY count(*), reason DESC
    """
    return dict(tables.ask("hosts.worst", query))  # the last of a host is its most frequent


def _answers(tables: Tables) -> list[dict[str, Any]]:
    """What became of each request: success, or the reason with the server's status word where there is one."""
    if "status" not in tables.columns():
        return []
    query = """
        SELECT status, CASE WHEN stage = 'fetch' THEN reason END AS reason,
            CASE WHEN reason = 'http_status' THEN left(value, 40) END AS detail, count(*) AS n
        FROM rows WHERE status IS NOT NULL GROUP BY ALL ORDER BY n DESC, 1, 2, 3 LIMIT 40
    """
    names = ("status", "reason", "detail", "rows")
    return [dict(zip(names, answer, strict=True)) for answer in tables.ask("answers", query)]


def _refusals(tables: Tables) -> list[dict[str, Any]]:
    """Rows that were not fetched because somebody, or our own guard, said no, and over how many hosts."""
    hosts = "count(DISTINCT url_host)" if "url_host" in tables.columns() else "0"
    listed = ", ".join(map(literal, REFUSALS))
    query = f"""
        SELECT reason, count(*) AS n, {hosts} FROM rows WHERE stage = 'fetch' AND reason IN ({listed})
        GROUP BY reason ORDER BY n DESC, reason
    """
    return [
        {"reason": reason, "definition": define(reason), "rows": number, "hosts": over}
        for reason, number, over in tables.ask("refusals", query)
    ]


def _licences(tables: Tables) -> dict[str, list[dict[str, Any]]]:
    """By column of the list that names a licence: its values over the kept pairs."""
    found = {}
    for column in [name for name in tables.columns() if name.lower() in LICENCES]:
        query = f"""
            SELECT left(CAST({quoted(column)} AS VARCHAR), 200) AS licence, count(*) AS n FROM rows WHERE kept
            GROUP BY ALL ORDER BY n DESC, licence LIMIT 20
        """
        answer = tables.ask(f"licences.{column}", query)
        found[column] = [{"licence": licence, "pairs": number} for licence, number in answer]
    return found


# --- captions --------------------------------------------------------------------------------------------------------


def _captions(tables: Tables) -> dict[str, Any]:
    """How many different captions the kept pairs have, and the most common ones."""
    query = f"""
        SELECT left(caption, {LONGEST_CAPTION}), count(*) AS n FROM ledger WHERE kept AND caption IS NOT NULL
        GROUP BY caption HAVING n > 1 ORDER BY n DESC, caption LIMIT {TOP_CAPTIONS}
    """
    return {
        "different": tables.ask("captions.different", "SELECT count(DISTINCT caption) FROM ledger WHERE kept")[0][0],
        "top": [{"caption": caption, "count": n} for caption, n in tables.ask("captions.top", query)],
    }


def _words(tables: Tables, rows: int) -> dict[str, Any]:
    """The most frequent words of the captions, in how many captions of the list and of what is kept each stands."""
    every, sample = _some_captions(rows)
    # Words of four letters and more, or of two in scripts that write no space between words.
    words = r"list_distinct(regexp_extract_all(lower(left(caption, 1000)), '[\p{L}\p{M}]{4,}|[^\x00-\x{2FFF}]{2,8}'))"
    query = f"""
        SELECT word, count(*) AS before, count(*) FILTER (kept) AS after
        FROM (SELECT kept, unnest({words}) AS word FROM ({sample}))
        GROUP BY word ORDER BY before DESC, word LIMIT {TOP_WORDS}
    """
    totals = tables.ask("words.captions", f"SELECT count(*), count(*) FILTER (kept) FROM ({sample})")[0]
    names = ("word", "before", "after")
    top = [dict(zip(names, entry, strict=True)) for entry in tables.ask("words.top", query)]
    return {"every": every, "before": totals[0], "after": totals[1], "top": top}


def _some_captions(rows: int) -> tuple[int, str]:
    """SQL of a sample of at most WORDS_OF captions, and that it takes one row in so many."""
    every = max(1, -(-rows // WORDS_OF))
    return every, f"SELECT row, kept, caption FROM ledger WHERE caption IS NOT NULL AND row % {every} = 0"


def _concepts(tables: Tables, rows: int, filters: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each balance step, the concepts it took most pairs from, and in how many captions each stands, as the words.

    A dropped pair counts for the rarest of its concepts, which is the one that the ledger names.
    """
    found = []
    for step in filters:
        if "balance" in step:
            name = str(step.get("name"))
            query = f"""
                SELECT coalesce(nullif(regexp_extract(value, '^(.*) \\(\\d+ of \\d+\\)$', 1), ''), value) AS concept,
                    count(*) AS n
                FROM ledger WHERE NOT kept AND step = {literal(name)} AND value IS NOT NULL
                GROUP BY ALL ORDER BY n DESC, concept LIMIT {TOP_WORDS}
            """
            dropped = dict(tables.ask(f"concepts.{name}", query))
            substring = (step["balance"] or {}).get("match") == "substring"
            stand = _standing(tables, rows, f"concepts.{name}.captions", list(dropped), "" if substring else " ")
            top = [
                {"concept": concept, "dropped": n}
                | dict(zip(("before", "after"), stand.get(concept, (0, 0)), strict=True))
                for concept, n in dropped.items()
            ]
            found.append({"step": name, "top": top})
    return found


def _standing(
    tables: Tables, rows: int, figure: str, concepts: Sequence[str], space: str
) -> dict[str, tuple[int, int]]:
    """By concept: the captions of the list and of what is kept that it stands in, by the rule of the balance step."""
    if not concepts:
        return {}
    _, sample = _some_captions(rows)
    listed = ", ".join(map(literal, concepts))
    query = f"""
        SELECT name, count(*) AS before, count(*) FILTER (kept) AS after
        FROM (SELECT kept, '{space}' || {plain("caption")} || '{space}' AS text FROM ({sample}))
        JOIN (SELECT name, {plain("name")} AS form FROM (SELECT unnest([{listed}]) AS name))
        ON contains(text, '{space}' || form || '{space}')
        WHERE form <> '' GROUP BY name ORDER BY name
    """
    return {name: (before, after) for name, before, after in tables.ask(figure, query)}


def _languages(tables: Tables) -> list[dict[str, Any]]:
    """Languages of the captions, over all rows that were measured and over the kept ones."""
    if "language" not in tables.columns():
        return []
    query = f"""
        SELECT CAST(language AS VARCHAR) AS name, count(*) AS before, count(*) FILTER (kept) AS after
        FROM rows WHERE language IS NOT NULL GROUP BY ALL ORDER BY before DESC, name LIMIT {TOP_LANGUAGES}
    """
    return [dict(zip(("language", "before", "after"), line, strict=True)) for line in tables.ask("languages", query)]
