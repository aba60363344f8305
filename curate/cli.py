"""`curate`: command line → configuration → stages; errors and signals → one line and an exit status.

Imports nothing heavy.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from curate.ask.arguments import DiffOptions, EngineOptions, ExplainOptions, SqlOptions, VerifyOptions
from curate.config import BuildConfig, ConceptsConfig
from curate.errors import ConfigError, UnwantedResult, told
from curate.options import add_config, as_config, located, new_parser, parse, preset, with_presets

COMMANDS = {
    "build": """From a list of URLs and captions to a clean, deduplicated, documented dataset, in shards.

        curate build --urls list.parquet --out dataset --config recipe.yaml --fetch.connections 256

        The same command again does what is left, and after a change of list or configuration what depends on it.""",
    "plan": "Read the list: stable ids, duplicates, and the filters that need no image.",
    "fetch": "Download the planned candidates into raw shards.",
    "measure": "Find out about images and captions: language, safety, CLIP embeddings, signals of your own.",
    "select": "Apply the filters and write the ledger.",
    "pack": "Write the kept samples into train, val, test and retain shards.",
    "report": "Write report.html, the data card and the manifest.",
    "concepts": """Mine a list of concepts, for a balance step, from the planned captions: frequent words and bigrams.

        curate concepts --out dataset --count 10000""",
    "explain": """What became of a row, with every fact and signal.

        curate explain https://example.org/a.jpg --out dataset""",
    "inspect": """What became of the list: funnel, splits, reasons, hosts, distributions.

        curate inspect dataset""",
    "diff": """Two builds side by side: options, funnels, and the rows that were decided otherwise.

        curate diff dataset-1 dataset-2 --out flipped.parquet""",
    "sql": """Ask the tables ledger, planned, raw, signals and samples; they can only be read.

        curate sql "SELECT reason, count(*) FROM ledger GROUP BY ALL" --out dataset --format csv""",
    "verify": """Check every file, member, key and sum of a dataset; exit status 3 if something is wrong.

        curate verify dataset""",
}
# What the commands that ask take: positionals with their help; the first DIR may be left out.
ASKED: dict[str, dict[str, str]] = {
    "explain": {"row": "URL or key of a row of the list."},
    "inspect": {"dir": "Folder of the dataset (default: dataset)."},
    "diff": {"a": "Folder of one build.", "b": "Folder of the other."},
    "sql": {"query": "One SELECT."},
    "verify": {"dir": "Folder of the dataset (default: dataset)."},
}
OPTIONS: dict[str, type] = {
    "concepts": ConceptsConfig,
    "explain": ExplainOptions,
    "inspect": EngineOptions,
    "diff": DiffOptions,
    "sql": SqlOptions,
    "verify": VerifyOptions,
}
INTERRUPTED = "curate: interrupted; what is done is kept, the same command continues\n"
GRACE_S = 5.0
CONFIGS = {name: OPTIONS.get(name, BuildConfig) for name in COMMANDS}
DEFAULT_RECIPE = "default"
CONCEPTS_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command `curate`."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("cliptailor").setLevel(logging.INFO)
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _noting_signals() as received:
        try:
            _run(words)
        except BaseException as error:
            # Not every exception of a handler comes out as it was: DuckDB makes a RuntimeError of it.
            if received or isinstance(error, KeyboardInterrupt):
                sys.stderr.write(INTERRUPTED)
                sys.exit(128 + (received or [signal.SIGINT])[0])
            if not (tellable := told(error)):
                raise
            print(f"curate: {located(str(tellable), words, CONFIGS)}", file=sys.stderr)
            sys.exit(tellable.exit_status)


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Let SIGTERM unwind the stack as Ctrl-C does: workers end, the lock is given back.

    Code in C (a query, a decoder) may keep Python's handlers waiting for long. What has not unwound after GRACE_S is
    ended as it is: files are written atomically, and workers end with their parent.

    Gives the list in which the signals are noted.
    """
    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    unwound = threading.Event()
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    threading.Thread(target=_end_late, args=(arrived, frozenset(heeded), unwound), daemon=True).start()
    before = {number: signal.signal(number, stop) for number in heeded}
    wakeup_before = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
    try:
        yield received
    finally:
        unwound.set()
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wakeup)


def _end_late(arrived: int, heeded: frozenset[int], unwound: threading.Event) -> None:
    """In a thread: end the process when a signal came and GRACE_S later the stack is still not unwound."""
    with os.fdopen(arrived, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in heeded and not unwound.wait(GRACE_S):
                os.write(2, INTERRUPTED.encode())
                os._exit(128 + number[0])


def _run(arguments: list[str]) -> None:
    parser = new_parser("Turn a list of web images and captions into a dataset to adapt a CLIP on.")
    commands = parser.add_subcommands(required=True, dest="command", metavar="COMMAND")
    for name, description in COMMANDS.items():
        command = new_parser(description)
        if name in arguments[:1]:  # the options of the other commands are not asked for: --help stays quick
            add_config(command, OPTIONS.get(name, BuildConfig))
        for word, text in ASKED.get(name, {}).items():
            command.add_argument(word, type=str, nargs="?", metavar=word.upper(), help=text)
        commands.add_subcommand(name, command, help=description.partition("\n")[0])
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    read = parse(parser, _with_recipe(arguments), CONFIGS)
    command = read["command"]
    options: Any = as_config(read[command], OPTIONS.get(command, BuildConfig))
    if isinstance(options, ConceptsConfig):
        _concepts(options)
    elif isinstance(options, BuildConfig):
        from curate.build import build

        build(options, [] if command == "build" else [command])
        if command == "build":
            _summary(options.out)
    else:
        _ask(command, [read[command].get(word) for word in ASKED[command]], options)


def _ask(command: str, words: list[str | None], options: Any) -> None:
    """Run a command that asks, and print the answer."""
    if ASKED[command].keys() == {"dir"}:
        words = [words[0] or "dataset"]
    for name, word in zip(ASKED[command], words, strict=True):
        if word is None:
            raise ConfigError(f"{command}: {name.upper()} is needed; see curate {command} --help")
    try:
        ANSWERS[command](*words, options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _explain(row: str, options: ExplainOptions) -> None:
    from curate.ask.explain import explain
    from curate.ask.text import facts, show

    for number, life in enumerate(explain(row, options)):
        show(*([""] if number else []), life.title, *(facts(name, pairs) for name, pairs in life.sections.items()))


def _inspect(folder: str, options: EngineOptions) -> None:
    from curate.ask.overview import overview, shown
    from curate.ask.text import show

    show(*shown(overview(Path(folder), options), folder))


def _diff(a: str, b: str, options: DiffOptions) -> None:
    from curate.ask.diff import diff, shown
    from curate.ask.text import show

    show(*shown(diff(Path(a), Path(b), options), Path(a), Path(b)))


def _sql(query: str, options: SqlOptions) -> None:
    from curate.ask import sql
    from curate.ask.text import show, table

    if options.format == "parquet" and sys.stdout.isatty():
        raise ConfigError("sql: --format parquet is not text; send it to a file: curate sql … > rows.parquet")
    with sql.answer(query, options) as rows:
        match options.format:
            case "csv":
                sql.write_csv(rows, options.limit, sys.stdout)
            case "json":
                sql.write_json(rows, options.limit, sys.stdout)
            case "parquet":
                sql.write_parquet(rows, options.limit, sys.stdout.buffer)
            case _:
                limit = sql.TABLE_ROWS if options.limit is None else options.limit
                first, more = sql.first_rows(rows, limit)
                show(table(rows.schema.names, first))
                if more:
                    print(f"curate: the first {limit:,} rows; --limit shows more", file=sys.stderr)


def _verify(folder: str, options: VerifyOptions) -> None:
    from curate.ask.text import show
    from curate.ask.verify import shown, verify

    found = verify(Path(folder), options)
    show(*shown(found))
    if number := len(found.faults) + found.more.total():
        raise UnwantedResult(f"{folder}: {number:,} faults" if number > 1 else f"{folder}: 1 fault")


ANSWERS: dict[str, Callable[..., None]] = {
    "explain": _explain,
    "inspect": _inspect,
    "diff": _diff,
    "sql": _sql,
    "verify": _verify,
}


def _with_recipe(arguments: list[str]) -> list[str]:
    """Without a `--config` the default recipe rules; one of one's own, or a preset by its name, replaces it whole."""
    if not arguments or arguments[0] not in COMMANDS or arguments[0] in OPTIONS:
        return arguments
    given = any(word.partition("=")[0] == "--config" for word in arguments)
    if not given:
        return [arguments[0], "--config", preset(DEFAULT_RECIPE, "curate"), *arguments[1:]]
    return with_presets(arguments, "curate")


def _concepts(config: ConceptsConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    from curate import concepts
    from curate.build import holding

    with holding(config.out):
        found = concepts.run(config)
    words = found["pmi"].null_count
    shown = Table("concept", "captions", "PMI", title=f"{words:,} words and {found.num_rows - words:,} bigrams")
    for line in found.slice(0, CONCEPTS_SHOWN).to_pylist():
        shown.add_row(line["concept"], f"{line['captions']:,}", "" if line["pmi"] is None else f"{line['pmi']:.2f}")
    Console().print(shown)
    print(f"concepts {config.out / concepts.TEXT}\ncounts   {config.out / concepts.TABLE}")


def _summary(out: Path) -> None:
    from rich.console import Console

    from curate.report import summary_table

    Console().print(summary_table(out))
    print(f"dataset  {out / 'shards'}\nreport   {out / 'report.html'}")


if __name__ == "__main__":
    main()
