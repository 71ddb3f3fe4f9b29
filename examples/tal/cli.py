"""Commands: prepare data, train, predict, evaluate."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import nn

import rewire
from examples.tal import memory
from examples.tal.building import detector_of, ready
from examples.tal.comparison import ARMS, append, compare, outcomes_table, pretrained
from examples.tal.config import Config, differences, read_config
from examples.tal.data.annotations import (
    Prediction,
    of_subset,
    read_annotations,
    read_predictions,
    write_predictions,
)
from examples.tal.data.classification import labelled
from examples.tal.data.loading import Batch
from examples.tal.data.synthetic import ANNOTATIONS, PRETRAINING, VIDEOS, Amounts, generate
from examples.tal.distribution import rank, ranks
from examples.tal.evaluation import Evaluation, average_recall, check_thresholds, evaluate
from examples.tal.files import written_whole
from examples.tal.prediction import predict
from examples.tal.pretraining import accuracy, clips, finetune
from examples.tal.sets import Sets, sets_of
from examples.tal.timeline import draw_timeline
from examples.tal.training import LAST, Trainer, averaged, read_last, seed_all

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
log = Console(stderr=True, highlight=False)

VERSION = "rewire examples.tal"
SMALL = Path(__file__).with_name("configs") / "synthetic_re2tal_actionformer_motionnet.yaml"

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, see configs/.")]
Folder = Annotated[Path, typer.Option("--out", help="Folder of the training: states, logs.")]
DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda, ...")]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Bad input is one line on stderr, and no traceback."""
    try:
        yield
    except (rewire.RewireError, OSError, ValueError) as error:
        log.print(f"[red]{escape(str(error))}[/red]", soft_wrap=True)
        raise typer.Exit(1) from error


@app.command()
def prepare(
    root: Annotated[Path, typer.Argument(help="Folder to write to.")],
    synthetic: Annotated[bool, typer.Option(help="Render motion videos.")] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    videos: Annotated[
        str, typer.Option(help="Training, validation and pretraining videos.")
    ] = "72,48,1200",
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
) -> None:
    """Write data to train on. Real data sets are used as they are: see the README."""
    if not synthetic:
        raise typer.BadParameter("there is --synthetic alone; real data need no preparing.")
    with one_line_errors():
        counts = _numbers("--videos", videos)
        if len(counts) != 3 or min(counts) < 0 or not sum(counts):
            raise ValueError(f"--videos: three numbers with commas, not {videos!r}.")
        generate(root, seed, Amounts(*counts), workers)
    log.print(f"wrote {counts[0] + counts[1]} videos and {counts[2]} clips to {root}")


@app.command("pretrain")
def pretrain_command(
    config: ConfigFile,
    root: Annotated[Path, typer.Argument(help="Folder of prepare --synthetic.")],
    to: Annotated[Path, typer.Option(help="File of the weights.")],
    epochs: Annotated[int, typer.Option(help="Before it is rewired.", min=0)] = 8,
    finetuned: Annotated[int, typer.Option(help="Behind that, if it is.", min=0)] = 4,
) -> None:
    """Pretrain a configuration's backbone on clips; rewire and finetune it, if it is rewired."""
    with one_line_errors():
        given = read_config(config)
        data, test = (clips(root / PRETRAINING, name) for name in ("training", "validation"))
        classifier = pretrained(given, data, epochs)
        log.print(f"{accuracy(classifier, test):.3f} of the clips after {epochs} epochs")
        if given.backbone.way == "rewired":
            ready(given, classifier.backbone)
            log.print(f"{accuracy(classifier, test):.3f} rewired")
            finetune(classifier, data, finetuned, given.recipe.seed)
            log.print(f"{accuracy(classifier, test):.3f} after {finetuned} more")
        with written_whole(to) as beside:
            torch.save(classifier.state_dict(), beside)


@app.command()
def train(
    config: ConfigFile,
    out: Folder,
    device: DeviceName = "cpu",
    resume: Annotated[bool, typer.Option(help="Go on from the folder's last state.")] = True,
) -> None:
    """Train a detector, and test it. Under torchrun, one process for each device."""
    with one_line_errors(), _processes(device) as place:
        given = read_config(config)
        out.mkdir(parents=True, exist_ok=True)
        last = None
        if resume and (out / LAST).exists():
            last = _last(given, out, ("data", "backbone", "losa", "localizer", "recipe"))
        trainer, sets = _opened(given, place, out)
        if resume and trainer.resume(last) and rank() == 0:
            log.print(f"going on after epoch {trainer.epoch}")
        with _bar() as watched:
            trainer.run(_told, watched)
        found = _predicted(given, trainer.average, sets)
        if rank() == 0:
            write_predictions(out / "predictions.json", found, VERSION)
            result = evaluate(sets.testing.videos, found, given.thresholds)
            Console().print(_table(result, _told_apart(sets)))


@app.command("predict")
def predict_command(
    config: ConfigFile,
    out: Folder,
    to: Annotated[Path, typer.Option(help="The JSON file to write.")],
    device: DeviceName = "cpu",
) -> None:
    """Write predictions of a trained detector for the configuration's validation subset."""
    with one_line_errors(), _processes(device) as place:
        given = read_config(config)
        if not (out / LAST).exists():
            raise ValueError(f"{out / LAST}: there is no training. Run train first.")
        last = _last(given, out, ("backbone", "losa", "localizer"))
        sets = sets_of(given, testing_only=True)
        _tell_skipped(sets)
        bare = replace(given, backbone=replace(given.backbone, weights=""))
        average = averaged(detector_of(bare, len(sets.classes)).to(place))
        average.load_state_dict(last["average"])
        found = _predicted(given, average, sets)
        if rank() == 0:
            write_predictions(to, found, VERSION)


@app.command("compare")
def compare_command(
    root: Annotated[Path, typer.Argument(help="Folder of prepare --synthetic.")],
    seeds: Annotated[int, typer.Option(help="How many.", min=1)] = 3,
    record: Annotated[Path | None, typer.Option(help="Append rows to this CSV.")] = None,
    epochs: Annotated[
        int | None, typer.Option(help="For all ways, instead of their own schedules.", min=1)
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.", min=1)] = 2,
) -> None:
    """Train the small network in all ways on synthetic videos, side by side."""
    with one_line_errors():
        config = read_config(SMALL)
        data = replace(config.data, annotations=str(root / ANNOTATIONS), videos=str(root / VIDEOS))
        config = replace(config, data=data)
        _tell_skipped(sets_of(config))
        arms = [replace(arm, epochs=epochs or arm.epochs) for arm in ARMS]
        found, start = [], time.perf_counter()
        for outcome in compare(config, root / PRETRAINING, seeds, arms, workers):
            found.append(outcome)
            log.print(f"{outcome.arm}, seed {outcome.seed}: {outcome.maps['average']:.3f}")
            if record is not None:
                append(record, outcome)
        Console().print(outcomes_table(found, [arm.name for arm in arms]))
        log.print(f"{(time.perf_counter() - start) / 60:.0f} minutes, {workers} processes")


@app.command("evaluate")
def evaluate_command(
    ground_truth: Annotated[Path, typer.Option(help="Annotations, a JSON file.")],
    predictions: Annotated[Path, typer.Option(help="Predictions, a JSON file.")],
    subset: Annotated[str, typer.Option(help="Of the annotations.")] = "validation",
    thresholds: Annotated[
        str, typer.Option(help="Of overlap, with commas.")
    ] = "0.3,0.4,0.5,0.6,0.7",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Mean average precision of predictions; shares of one."""
    with one_line_errors():
        limits = _limits(thresholds)
        videos = of_subset(read_annotations(ground_truth), subset)
        found = read_predictions(predictions)
        result = evaluate(videos, found, limits)
        if as_json:
            typer.echo(json.dumps(result.to_dict()))
            return
        Console().print(_table(result))
        recall = average_recall(videos, found)
        shown = ", ".join(f"{share:.3f} of {number}" for number, share in recall.items())
        Console().print(f"average recall of the best proposals of a video: {shown}")


@app.command("memory")
def memory_command(
    networks: Annotated[str, typer.Option(help="Backbones, with commas.")] = ",".join(memory.SWEPT),
    frames: Annotated[str, typer.Option(help="With commas.")] = ",".join(map(str, memory.FRAMES)),
    ways: Annotated[str, typer.Option(help="To train, with commas.")] = ",".join(memory.WAYS),
    device: DeviceName = "cpu",
    measured_to: Annotated[
        int | None,
        typer.Option(help="Most frames that are measured too; all on a GPU, none on the CPU."),
    ] = None,
    to: Annotated[Path | None, typer.Option(help="Append rows to this CSV.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them: .png, .svg, .pdf.")] = None,
) -> None:
    """Memory of a training step against frames: estimated, and measured where it fits."""
    with one_line_errors():
        rows, lengths = [], _numbers("--frames", frames)
        for row in memory.run(
            networks.split(","), lengths, ways.split(","), device, measured_to=measured_to
        ):
            rows.append(row)
            log.print(f"{row.network}, {row.way}, {row.frames} frames: {row.kind}")
            if to is not None:
                memory.append(to, row)
        Console().print(memory.table(rows))
        if plot is not None:
            memory.plot(rows, plot)


@app.command()
def timeline(
    ground_truth: Annotated[Path, typer.Option(help="Annotations, a JSON file.")],
    predictions: Annotated[Path, typer.Option(help="Predictions, a JSON file.")],
    video: Annotated[str, typer.Option(help="Its name in both.")],
    to: Annotated[Path, typer.Option(help="The picture to write: .png, .svg, .pdf.")],
    least: Annotated[float, typer.Option(help="Scores below it are left out.")] = 0.1,
) -> None:
    """Draw what is annotated in a video and what was found."""
    with one_line_errors():
        videos = {row.name: row for row in read_annotations(ground_truth)}
        if video not in videos:
            raise ValueError(f"{ground_truth}: there is no video {video!r}.")
        draw_timeline(to, videos[video], read_predictions(predictions).get(video, []), least)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option}: whole numbers with commas, not {text!r}.") from error


def _limits(text: str) -> list[float]:
    try:
        limits = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--thresholds: numbers with commas, not {text!r}.") from error
    check_thresholds(limits)
    return limits


def _opened(config: Config, place: torch.device, out: Path) -> tuple[Trainer, Sets]:
    """A trainer of the configuration's detector, and its sets; tells what is skipped."""
    sets = sets_of(config)
    _tell_skipped(sets)
    seed_all(config.recipe.seed)
    detector = detector_of(config, len(sets.classes)).to(place)
    return Trainer(detector, sets.training, config.recipe, out, asdict(config)), sets


def _last(config: Config, out: Path, parts: tuple[str, ...]) -> dict[str, Any]:
    """The state in a folder; refuses one of something else that was trained."""
    state = read_last(out / LAST)
    if state["config"] and (found := differences(config, state["config"], parts)):
        raise ValueError(
            f"{out / LAST} was trained otherwise: {'; '.join(found)}. "
            "Name another --out, or begin anew with --no-resume."
        )
    return state


def _predicted(config: Config, average: nn.Module, sets: Sets) -> dict[str, list[Prediction]]:
    """Predictions of averaged weights."""
    recipe = config.recipe
    batch = max(1, recipe.batch // ranks())
    rest = {"batch": batch, "amp": recipe.amp, "workers": recipe.workers}
    found = predict(average, sets.testing, sets.classes, config.suppression, **rest)
    return labelled(found, sets.scores, config.data.top) if sets.scores else found


def _tell_skipped(sets: Sets) -> None:
    if sets.skipped and rank() == 0:
        log.print(f"[yellow]{len(sets.skipped)} videos are skipped:[/yellow]")
        for row in sets.skipped:
            log.print(f"  {row.name}: {row.reason}", markup=False, soft_wrap=True)


@contextmanager
def _bar() -> Iterator[Callable[[Iterable[Batch]], Iterable[Batch]]]:
    """Shows how far an epoch is, on a terminal; gives what passes its batches on."""
    quiet = not log.is_terminal or rank() > 0
    with Progress(console=log, transient=True, disable=quiet) as progress:
        task = progress.add_task("epoch")

        def watched(batches: Iterable[Batch]) -> Iterable[Batch]:
            progress.reset(task)
            return progress.track(batches, task_id=task)

        yield watched


def _told_apart(sets: Sets) -> str:
    """How many of the videos could be tested on, where that is not all."""
    names = {row.name for row in sets.skipped} & {video.name for video in sets.wanted}
    return f"without {len(names)} of {len(sets.wanted)} videos" if names else ""


def _told(epoch: int, means: Mapping[str, float]) -> None:
    if rank():
        return
    shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    log.print(f"epoch {epoch}  {shown}")


def _table(result: Evaluation, title: str = "") -> Table:
    """mAP by threshold, and average precision of each class."""
    columns = "", *(f"{limit:g}" for limit in result.thresholds), "average"
    table = Table(*columns, title=title or None)
    for label, row in zip(result.classes, result.precision.T, strict=True):
        table.add_row(label, *(f"{value:.3f}" for value in row), f"{row.mean():.3f}")
    table.add_section()
    table.add_row("mAP", *(f"{value:.3f}" for value in result.means), f"{result.average:.3f}")
    return table


@contextmanager
def _processes(device: str) -> Iterator[torch.device]:
    """The device of this process; those of torchrun meet first."""
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: there is none ({error}).") from error
    if "RANK" not in os.environ:
        yield place
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    try:
        yield place
    finally:
        dist.destroy_process_group()
