"""The command `finetune`: fit, summary, validate, test, evaluate, predict, export, report.

Results go to stdout, progress and mistakes to stderr. Exit status: 0, or that of the error (curate/errors.py);
Ctrl-C 130. Help and mistakes in the configuration load no torch: what is heavy is imported where it is needed.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from curate.errors import ConfigError, told
from curate.options import add_config, as_config, located, new_parser, parse, with_presets
from finetune.arguments import (
    EvaluateOptions,
    ExportOptions,
    FiguresOptions,
    PredictOptions,
    ReportOptions,
    check_files,
    check_predict,
)
from finetune.checks import check, check_probes, check_robustness, check_start
from finetune.config import ClipConfig, FitConfig
from finetune.libraries import import_libraries

if TYPE_CHECKING:
    from curate.clip import Clip
    from finetune.comparison import Compared
    from finetune.embedding import Pictures
    from finetune.evaluate import Evaluation
    from finetune.search import Queries
    from finetune.sets import EvaluationSets

HELP = {
    "fit": """
        Adapt a CLIP to a dataset, with figures before and after. The same command again continues an interrupted run.

          finetune fit --config domain.yaml --model.optimizer.lr 3e-5
          finetune fit --config domain.yaml --print_config      # every key, and stop
          finetune fit --config domain.yaml --dry_run           # the plan, and stop
          finetune fit --config few --data.dataset dataset      # a recipe that ships: few, medium, large, lora, full, …
        """,
    "summary": """
        What a configuration trains: parts, trained shares, GFLOPs, learning rates. Needs no weights and no data.

          finetune summary --config domain.yaml
          finetune summary --model.clip.name RN50 --model.adapter.kind last --json
        """,
    "validate": """
        Figures of a run's CLIP on the val and retain splits of its dataset, and its named sets.

          finetune validate --run runs/domain
        """,
    "test": """
        Figures of a run's CLIP on the test and retain splits of its dataset, and its named sets. Look once, at the end.

          finetune test --run runs/domain --json
        """,
    "evaluate": """
        Figures of one or several CLIPs on any retrieval and zero-shot sets, in one table.

          finetune evaluate --clip.name ViT-B/32 --clip.pretrained openai --run runs/domain \\
              --evaluate.zero_shot.digits.images digits/ --evaluate.retrieval.flowers flowers/
          finetune evaluate --models ViT-B/32 runs/domain --config sets.yaml --out table.md --plot plots.html
        """,
    "predict": """
        Probabilities of free texts for images, their embeddings, or search in a dataset by text or image.

          finetune predict --model ViT-B/32 --images shelf.jpg photos/ --text "a full shelf" "an empty shelf"
          finetune predict --model runs/domain --images photos/ --text full empty \\
              --templates "a photo of a {} shelf." --out found.csv     # a row an image and text; or .parquet
          finetune predict --model runs/domain --images photos/ --embeddings photos.parquet
          finetune predict --model runs/domain --dataset dataset --text "an empty shelf" --out found.html
          finetune predict --model runs/domain --dataset dataset --images shelf.jpg --out alike.html
        """,
    "export": """
        Write a run's CLIP for open_clip (local-dir:FOLDER), transformers or onnxruntime, or its LoRA alone for peft.

          finetune export --run runs/domain --to open_clip --out domain-clip
          finetune export --run runs/domain --to transformers --license mit --out domain-clip-transformers
        """,
    "report": """
        Write RUN/report.html again.

          finetune report --run runs/domain
        """,
}
OPTIONS: dict[str, type] = {
    "fit": FitConfig,
    "summary": FitConfig,
    "validate": FiguresOptions,
    "test": FiguresOptions,
    "evaluate": EvaluateOptions,
    "predict": PredictOptions,
    "export": ExportOptions,
    "report": ReportOptions,
}
TABLE_ROWS = 1_000  # that one may still look through
AS_JSON = {"--json": "Print JSON instead of a table."}
SWITCHES = {
    "fit": {
        "--restart": "Forget what an earlier run left in `out`.",
        "--continue_changed": "Go on although the data or a key that matters is not what the run was begun with.",
        "--dry_run": "Print the plan (data, steps, what is trained, memory) and stop; nothing is written.",
        "--profile": "Look at a few steps with torch's profiler, and write where their time went into `out`/profile.",
    },
    "summary": AS_JSON,
    "validate": AS_JSON,
    "test": AS_JSON,
    "evaluate": AS_JSON,
    "export": {"--overwrite": "Replace what is in the folder."},
    "predict": {"--json": "Print JSON instead of a table.", "--csv": "Print CSV instead of a table."},
}
USAGE = {"fit": "finetune fit --config FILE [--KEY VALUE …]"}


def build_parser(asked: Sequence[str]) -> ArgumentParser:
    """The parser of the whole command, with the options of the one that the first word asks for: help stays quick."""
    parser = new_parser(
        "Adapt a CLIP to a domain, measure what that changed, use and export it.",
        "finetune {" + ",".join(HELP) + "} …  (finetune COMMAND --help)",
    )
    commands = parser.add_subcommands(required=True, dest="command", title="commands", description=None)
    for name, text in HELP.items():
        command = new_parser(text, USAGE.get(name, f"finetune {name} [--KEY VALUE …]"))
        if name in asked[:1]:
            add_config(command, OPTIONS[name])
        for flag, help_text in SWITCHES.get(name, {}).items():
            command.add_argument(flag, action="store_true", default=SUPPRESS, help=help_text)
        if name == "fit":
            command.add_argument(
                "--ckpt_path",
                type=str,
                default=SUPPRESS,
                help="last: go on, and fail if there is nothing to go on from. Or a checkpoint's path: of this run, or "
                "(into a new `out`) of another.",
            )
        if name == "evaluate":
            command.add_argument(
                "--run", nargs="+", type=Path, default=[], help="Folders of runs, or checkpoint files."
            )
            command.add_argument(
                "--models", nargs="+", type=str, default=[], help="CLIPs by one word each, as --model of predict."
            )
        if name == "predict":
            command.add_argument("--images", nargs="+", type=Path, default=[], help="Files, folders, or a dataset.")
            command.add_argument("--text", nargs="+", type=str, default=[], help="Texts to choose among, or to find.")
            command.add_argument(
                "--templates", nargs="+", type=str, default=[], help="'a photo of a {}.' …, or imagenet: OpenAI's 80."
            )
        commands.add_subcommand(name, command, help=text.strip().splitlines()[0])
    return parser


# --- the commands ----------------------------------------------------------------------------------------------------


def fit(options: Namespace) -> None:
    """Print the plan, train, write the report, print before and after."""
    config = as_config(options, FitConfig)
    check(config)
    restart, ckpt_path = options.get("restart", False), options.get("ckpt_path")
    check_start(config.out, ckpt_path, restart=restart)
    import_libraries(
        "torch", "lightning.pytorch", "open_clip", *(["peft"] if config.model.adapter.kind == "lora" else [])
    )
    if options.get("dry_run"):
        from finetune.fit import plan
        from finetune.plan import tell

        tell(plan(config), sys.stdout)
        return
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

    from finetune import report
    from finetune.fit import fit as run_fit

    run_fit(
        config,
        restart=restart,
        changed=options.get("continue_changed", False),
        ckpt_path=ckpt_path,
        profile=options.get("profile", False),
    )
    if getattr(rank_zero_only, "rank", 0):  # another process of the same run prints
        return
    from finetune.tables import change_table, show

    evaluation = json.loads((config.out / "evaluation.json").read_text(encoding="utf-8"))
    if evaluation["after"]:
        show(change_table(evaluation))
    else:
        print("nothing was measured: there is no val split, and `evaluate` names no set")
    print(f"report: {report.run(config.out)}")
    print(f"export: finetune export --run {config.out} --to open_clip --out FOLDER")


def summary(options: Namespace) -> None:
    """Parts, parameters, GFLOPs and what each group gets."""
    config = as_config(options, FitConfig)
    import_libraries("torch", "lightning.pytorch", "open_clip")
    from finetune.summary import summarise, tables
    from finetune.tables import show

    found = summarise(config.model)
    if options.get("json", False):
        print(json.dumps(asdict(found), indent=1))
    else:
        for table in tables(found):
            show(table)


def validate(options: Namespace) -> None:
    """Figures on val and retain."""
    _figures_of_run(as_config(options, FiguresOptions), "val", as_json=options.get("json", False))


def test(options: Namespace) -> None:
    """Figures on test and retain."""
    _figures_of_run(as_config(options, FiguresOptions), "test", as_json=options.get("json", False))


def _figures_of_run(options: FiguresOptions, split: str, *, as_json: bool) -> None:
    from finetune.runs import checkpoint_of, load_trained_clip, run_config
    from finetune.sets import dataset_sets

    config = run_config(options.run)
    sets = dataset_sets(config.evaluate, config.data.dataset, split)
    import_libraries("torch", "open_clip")
    clip = load_trained_clip(checkpoint_of(options.run, options.checkpoint), options.device)
    figures = _evaluation(clip, sets, config.data.eval_batch_size).summary()
    _show_figures({str(options.run): figures}, as_json=as_json)


def evaluate(options: Namespace) -> None:
    """Figures of several CLIPs in one table."""
    from finetune.runs import is_run

    chosen = as_config(options, EvaluateOptions)
    check_files(chosen)
    check_probes(chosen.probe, chosen.evaluate.zero_shot)
    sets = _sets(chosen, [*options.run, *filter(is_run, map(Path, options.models))])
    check_robustness(chosen.robustness, [*(each.name for each in sets.zero_shot), *(each.name for each in sets.probes)])
    if not (chosen.clip or options.run or options.models):
        raise ConfigError("evaluate: give --models, --clip.name (and --clip.pretrained), or --run, or several of them")
    import_libraries("torch", "open_clip")
    from finetune import comparison
    from finetune.evaluate import compare

    comparison.check_same_classes(chosen.robustness, sets)
    clips = _clips(chosen.clip, options.run, chosen.checkpoint, chosen.device) | _named_clips(
        options.models, chosen.device
    )
    compared = [_compared(name, load(), sets, chosen.batch_size) for name, load in clips.items()]
    found = comparison.document(compared, sets, chosen.robustness)
    if chosen.out:
        comparison.write(found, chosen.out)
    if chosen.plot:
        comparison.write_plots(found, chosen.plot)
    _show_figures(found["figures"], as_json=options.get("json", False))
    if len(compared) == 2 and not options.get("json"):
        from finetune.tables import change_table, show

        show(change_table(compare(compared[0].evaluation, compared[1].evaluation)))


def _compared(name: str, clip: Clip, sets: EvaluationSets, batch_size: int) -> Compared:
    from finetune.comparison import Compared
    from finetune.summary import gflops

    return Compared(name, _evaluation(clip, sets, batch_size), gflops(clip)[0])


def _sets(options: EvaluateOptions, runs: Sequence[Path]) -> EvaluationSets:
    from finetune.runs import run_config
    from finetune.sets import dataset_sets, evaluation_sets, probe_set

    named, probes = options.evaluate, [probe_set(*each) for each in options.probe.items()]
    if options.dataset:
        return replace(dataset_sets(named, options.dataset, options.split), probes=probes)
    if named.retrieval or named.zero_shot or probes:
        return replace(evaluation_sets(named), probes=probes)
    if not runs:
        raise ConfigError(
            "evaluate: nothing to evaluate on; give --dataset, --evaluate.retrieval or --evaluate.zero_shot"
        )
    config = run_config(runs[0])
    return dataset_sets(config.evaluate, config.data.dataset, options.split)


def _clips(
    clip: ClipConfig | None, runs: Sequence[Path], checkpoint: str, device: str
) -> dict[str, Callable[[], Clip]]:
    """What loads each CLIP, by the name it is shown under; one after the other, so that one is in memory."""
    from curate.clip import load_clip
    from finetune.runs import checkpoint_of, load_trained_clip

    found: dict[str, Callable[[], Clip]] = {}
    if clip:
        found[clip.label] = lambda: load_clip(clip.name, clip.weights, device=device)
    for path in [checkpoint_of(run, checkpoint) for run in runs]:
        found[str(path)] = lambda path=path: load_trained_clip(path, device)  # type: ignore[misc]
    return found


def _named_clips(names: Sequence[str], device: str) -> dict[str, Callable[[], Clip]]:
    from finetune.runs import load_named

    return {name: lambda name=name: load_named(name, device) for name in names}  # type: ignore[misc]


def _evaluation(clip: Clip, sets: EvaluationSets, batch_size: int) -> Evaluation:
    from finetune.evaluate import evaluate_clip

    return evaluate_clip(clip.model, clip.preprocess, clip.tokenizer, sets, device=clip.device, batch_size=batch_size)


def _show_figures(summaries: dict[str, dict[str, dict[str, float]]], *, as_json: bool) -> None:
    from finetune.tables import figures_table, show

    if as_json:
        print(json.dumps(summaries, indent=1))
    else:
        show(figures_table(summaries))


def predict(options: Namespace) -> None:
    """Probabilities of texts for images; their embeddings; or the images of a dataset nearest to texts or images."""
    chosen = as_config(options, PredictOptions)
    images, texts, templates = options.images, options.text, options.templates
    check_predict(chosen, images, texts, templates)
    import_libraries("torch", "open_clip")
    from finetune.embedding import find_pictures
    from finetune.runs import load_named

    pictures = find_pictures([chosen.dataset] if chosen.dataset else images)
    form = "json" if options.get("json") else "csv" if options.get("csv") else "table"
    if len(pictures) > TABLE_ROWS and form == "table" and not (chosen.dataset or chosen.out or chosen.embeddings):
        raise ConfigError(f"out: {len(pictures):,} images are too many for a table; give FILE.csv or FILE.parquet")
    if chosen.dataset and chosen.out:
        from finetune.search import check_page

        check_page(min(chosen.best, len(pictures)) * (len(texts) or len(find_pictures(images))))
    clip = load_named(chosen.model, chosen.device)
    if chosen.dataset:
        from finetune import search

        size = chosen.batch_size
        queries = search.by_text(clip, texts, templates, size) if texts else search.by_image(clip, images, size)
        _search(clip, chosen, pictures, queries, form)
    elif chosen.embeddings:
        from finetune.predict import write_embeddings

        write_embeddings(clip, pictures, chosen.embeddings, batch_size=chosen.batch_size)
    else:
        _predict(clip, chosen, pictures, texts, templates, form)
    if written := chosen.out or chosen.embeddings:
        print(f"{len(pictures) - len(pictures.unreadable):,} images → {written}", file=sys.stderr)
    pictures.check_all_read()


def _predict(
    clip: Clip, chosen: PredictOptions, pictures: Pictures, texts: list[str], templates: list[str], form: str
) -> None:
    from finetune.predict import predict as run_predict
    from finetune.predict import table_rows, write_csv, write_json, write_predictions
    from finetune.tables import prediction_table, show

    found = run_predict(clip, pictures, texts, templates=templates, batch_size=chosen.batch_size)
    if chosen.out:
        write_predictions(found, chosen.out)
    elif form == "json":
        write_json(found, sys.stdout)
    elif form == "csv":
        write_csv(found, sys.stdout)
    else:
        show(prediction_table(table_rows(found), min(chosen.top, len(texts))))


def _search(clip: Clip, chosen: PredictOptions, pictures: Pictures, queries: Queries, form: str) -> None:
    from finetune import search
    from finetune.tables import search_table, show

    found = search.search(clip, pictures, queries, chosen.best, chosen.batch_size)
    if chosen.out:
        search.write_page(found, pictures, queries, chosen.out, model=chosen.model, where=str(chosen.dataset))
    if form == "json":
        search.write_json(found, pictures, sys.stdout)
    elif form == "csv":
        search.write_csv(found, pictures, sys.stdout)
    else:
        show(search_table(search.rows(found, pictures)))


def export(options: Namespace) -> None:
    """Write a run's CLIP for others."""
    chosen = as_config(options, ExportOptions)
    import_libraries("torch", "open_clip")
    from finetune.export import export as run_export

    checkpoint = run_export(
        chosen.run,
        chosen.out,
        chosen.to,
        checkpoint=chosen.checkpoint,
        license=chosen.license,
        overwrite=options.get("overwrite", False),
    )
    print(f"{checkpoint} → {chosen.out}, loaded again in a fresh process: the same embeddings")
    if chosen.to == "open_clip":
        print(f'open_clip.create_model_and_transforms("local-dir:{chosen.out}")')


def report(options: Namespace) -> None:
    """Write the report again."""
    chosen = as_config(options, ReportOptions)
    from finetune import report as reports

    print(reports.run(chosen.run))


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "fit": fit,
    "summary": summary,
    "validate": validate,
    "test": test,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "report": report,
}


def _log_to_stderr() -> None:
    """Our own progress only: what open_clip logs on the root logger comes again, in our words, as an error."""
    logging.getLogger().addHandler(logging.NullHandler())
    ours = logging.getLogger("cliptailor")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(logging.StreamHandler())


def _reader_has_gone() -> bool:
    """Whether nobody reads stdout any more, as after `head`; a broken pipe may be another's."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
    return bool(poll.poll(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _log_to_stderr()
    try:
        arguments = with_presets(arguments, "finetune")
        options: Any = parse(build_parser(arguments), arguments, OPTIONS)
        COMMANDS[options.command](options[options.command])
        sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("finetune: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (tellable := told(error)):
            raise
        print(f"finetune: {located(str(tellable), arguments, OPTIONS)}", file=sys.stderr)
        return tellable.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
