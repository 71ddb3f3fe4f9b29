"""The `rewire` command: parse, call, print.

torch and everything that needs it is imported inside the commands, so that --help is fast.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.errors import AlreadyRewired, RewireError

if TYPE_CHECKING:
    from rewire.balance import Balance
    from rewire.conversion import Conversion, Request
    from rewire.demonstration import Demonstration
    from rewire.verification import Verdict

_WIDTH = {"max_content_width": 96, "terminal_width": 96, "help_option_names": ["-h", "--help"]}
_MODEL_HELP = (
    "A pickled nn.Module (.pt, .pth); weights (.pt, .pth, .safetensors) with --arch; "
    "timm/NAME, torchvision/NAME, transformers/path/to/config.json or package.module:callable."
)

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings=_WIDTH,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
Arch = Annotated[
    str | None,
    typer.Option(help="The model that a file of weights belongs to, as MODEL names it."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(metavar="PACKAGE", help="Admit this package's classes in a file (repeatable)."),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--input-shape", metavar="N,C,H,W", help="Shape of the input, where it can't be found."
    ),
]
Coupling = Annotated[
    str,
    typer.Option(
        metavar="SPEC",
        help="re2, 're2(sum)', 'consistent(1/4)', 'dr2(0.9, 0.1)' or bdia: nearer to the original "
        "costs bits per element and module.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(metavar="exact|float64|fast", help="Of the streams; exact gives exact gradients."),
]
Chunks = Annotated[
    str,
    typer.Option(
        metavar="auto|N", help="Run each branch on parts of its input, where they are independent."
    ),
]
Granularity = Annotated[
    str,
    typer.Option(
        metavar="module|block", help="One residual module: attention, MLP, or a whole block."
    ),
]
Trunk = Annotated[
    str,
    typer.Option(
        metavar="identity|inside",
        help="Activations between adds: keep the exact function, or move them into the branches.",
    ),
]
Outside = Annotated[
    str,
    typer.Option(
        metavar="store|checkpoint",
        help="Activations outside of the chains: kept, or computed again where that pays.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES|SHARE",
        help="Memory for a training step, 8GB (all of it) or 0.3 of the original's activations: "
        "be as fast as that allows. Needs --input-shape; chooses --chunks and --outside.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="cpu|cuda", help="Where it will be trained, for --budget.")
]
Optimizer = Annotated[
    str, typer.Option(metavar="NAME", help="Of torch.optim, or none: its state is counted.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Rewire only modules of these names (repeatable)."),
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Leave these modules (repeatable).")
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Fetch the library's pretrained weights (network).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.callback(
    epilog="Exit codes: 0 done, 1 said no (nothing to rewire, a failed check, a bad file), 2 usage."
)
def _rewire() -> None:
    """Make a residual network reversible: same parameters, activations not stored.

    \b
    Examples:
      rewire demo
      rewire inspect timm/vit_base_patch16_224
      rewire convert model.pt -o rev_model.pt
      rewire verify rev_model.pt
      rewire profile timm/vit_small_patch16_224
    """


@app.command()
def inspect(
    model: Model,
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    coupling: Coupling = "re2",
    precision: Precision = "exact",
    chunks: Chunks = "1",
    granularity: Granularity = "module",
    trunk: Trunk = "identity",
    outside: Outside = "store",
    budget: Budget = None,
    device: Device = "cpu",
    optimizer: Optimizer = "Adam",
    include: Include = None,
    exclude: Exclude = None,
    pretrained: Pretrained = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the chains to be made reversible, and the adds left alone with reasons.

    \b
    Examples:
      rewire inspect torchvision/swin3d_t
      rewire inspect model.pt --input-shape 2,3,224,224
      rewire inspect weights.safetensors --arch timm/convnext_tiny
      rewire inspect mypackage.models:build --exclude 'head.*'
      rewire inspect timm/vit_base_patch16_224 --input-shape 32,3,224,224 --budget 8GB
    """
    how = {"coupling": coupling, "precision": precision, "granularity": granularity, "trunk": trunk}
    how |= {"outside": outside, "chunks": chunks, "device": device, "optimizer": optimizer}
    shape = _checked(input_shape, how, budget)
    options = (arch, trust, pretrained, include, exclude)
    with _one_line_errors(debug):
        request = _request(options, {**how, "budget": budget}, shape)
        from rewire.conversion import opened, planned
        from rewire.report import console, plan_tree

        try:
            source = opened(model, request)
        except AlreadyRewired as error:
            _print_stored(error, as_json)
            return
        plan = planned(source, request)
        if as_json:
            _print_json({"source": source.description, **plan.to_dict()})
        else:
            console().print(plan_tree(plan))
            if request.chunks != 1 and plan.chains:
                _print_parts(source.module, plan, shape)
        if not plan.chains:
            from rewire.making import make_reversible

            make_reversible(source.module, plan=plan)  # raises, naming the nearest miss


@app.command()
def convert(
    model: Model,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="The file to write.", show_default=False),
    ],
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    coupling: Coupling = "re2",
    precision: Precision = "exact",
    chunks: Chunks = "1",
    granularity: Granularity = "module",
    trunk: Trunk = "identity",
    outside: Outside = "store",
    budget: Budget = None,
    device: Device = "cpu",
    optimizer: Optimizer = "Adam",
    include: Include = None,
    exclude: Exclude = None,
    pretrained: Pretrained = False,
    export_state_dict: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Write plain weights for the original class, too."),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a reversible version of MODEL to OUT.

    OUT holds how to build the model, the plan and the tensors, and no code.

    \b
    Examples:
      rewire convert model.pt -o rev_model.pt
      rewire convert model.pt -o rev_model.pt --trust mypackage
      rewire convert checkpoint.pth --arch torchvision/resnet50 -o rev_resnet50.pt
      rewire convert timm/vit_large_patch16_224 --pretrained -o rev_vit.pt
    """
    how = {"coupling": coupling, "precision": precision, "granularity": granularity, "trunk": trunk}
    how |= {"outside": outside, "chunks": chunks, "device": device, "optimizer": optimizer}
    shape = _checked(input_shape, how, budget)
    options = (arch, trust, pretrained, include, exclude)
    _check_target(out, model, "OUT")
    if export_state_dict is not None:
        _check_target(export_state_dict, model, "--export-state-dict")
        _check_target(export_state_dict, str(out), "--export-state-dict")
    with _one_line_errors(debug):
        request = _request(options, {**how, "budget": budget}, shape)
        from rewire import conversion

        done = conversion.convert(model, out, request, export_state_dict)
        _print_conversion(done, input_shape, as_json)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of `rewire convert`.")],
    trust: Trust = None,
    input_shape: Shape = None,
    float64: Annotated[
        bool, typer.Option("--float64", help="Compare gradients in double precision.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check a converted model: gradients, reconstruction, statistics, memory, keys.

    Gradients are compared with the same two-stream function run by ordinary autograd.

    \b
    Examples:
      rewire verify rev_model.pt
      rewire verify rev_model.pt --float64 --input-shape 2,3,224,224
      rewire verify rev_model.pt --json
    """
    shape = _checked(input_shape, {})
    with _one_line_errors(debug):
        from rewire import verification
        from rewire.inputs import example_for
        from rewire.report import progress
        from rewire.storage import load

        with progress(f"Loading {file}"):
            rev = load(file, trust=trust or ())
            example = example_for(rev, shape)
        with progress("Verifying: gradients, statistics, memory"):
            verdict = verification.verify(rev, *example.args, float64=float64, **example.kwargs)
        _print_verdict(verdict, f"{file}, inputs {example.description}", as_json)
        if not verdict.passed:
            raise RewireError(f"{file}: {_failed(verdict)}. Nothing was changed.")


@app.command()
def profile(
    model: Model,
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    device: Annotated[
        str, typer.Option(metavar="cpu|cuda", help="Where, or for where to estimate.")
    ] = "cpu",
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Estimate, without the memory; as where it is not there."),
    ] = False,
    budget: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Say whether it fits, e.g. into 24GB.")
    ] = None,
    optimizer: Optimizer = "Adam",
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw memory over the step.")
    ] = None,
    coupling: Coupling = "re2",
    precision: Precision = "exact",
    chunks: Chunks = "1",
    granularity: Granularity = "module",
    trunk: Trunk = "identity",
    outside: Outside = "store",
    include: Include = None,
    exclude: Exclude = None,
    pretrained: Pretrained = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show where the memory of a training step goes, original and rewired.

    \b
    Examples:
      rewire profile timm/vit_small_patch16_224 --input-shape 8,3,224,224
      rewire profile torchvision/swin3d_b --input-shape 1,3,512,224,224 --device cuda --budget 24GB
      rewire profile model.pt --estimate --plot step.png
    """
    how = {"coupling": coupling, "precision": precision, "granularity": granularity, "trunk": trunk}
    how |= {"outside": outside, "chunks": chunks}
    shape = _checked(input_shape, {**how, "device": device})
    limit = None if budget is None else _bytes(budget)
    if plot is not None:
        _check_target(plot, model, "--plot")
    options = (arch, trust, pretrained, include, exclude)
    with _one_line_errors(debug):
        if plot is not None:
            from rewire.plotting import need_matplotlib

            need_matplotlib()  # before the work
        request = _request(options, how, shape)
        from rewire.balance import balance

        found = balance(model, request, device, optimizer, estimated=estimate)
        _print_balance(found, limit, plot, as_json)
        if not found.plan.chains:
            raise RewireError(f"{model}: no chain to rewire; `rewire inspect {model}` says why.")


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the files, in this directory.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert, load and verify a real network, offline, in about a minute.

    timm's ViT-S/16 with random weights is saved as model.pt, then takes the way of any model.

    \b
    Examples:
      rewire demo
      rewire demo --keep demo_files
    """
    with _one_line_errors(debug), tempfile.TemporaryDirectory() as temporary:
        from rewire.demonstration import demonstrate

        folder = Path(temporary) if keep is None else keep
        folder.mkdir(parents=True, exist_ok=True)
        shown = demonstrate(folder)
        if as_json:
            _print_json({"plan": shown.conversion.plan.to_dict(), **shown.verdict.to_dict()})
        else:
            _print_demonstration(shown, keep)
        if not shown.verdict.passed:
            raise RewireError(f"demo: {_failed(shown.verdict)}.")


def main() -> None:
    """Run the command line."""
    app(prog_name="rewire")


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """End with one line on stderr and exit code 1; with --debug, let the traceback through."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except RewireError as error:
        if debug:
            raise
        typer.echo(f"rewire: {error}", err=True)
    except Exception as error:
        if debug:
            raise
        first = next(iter(str(error).splitlines()), "")
        kind = type(error).__name__
        typer.echo(f"rewire: unexpected {kind}: {first} (run again with --debug)", err=True)
    else:
        return
    raise typer.Exit(1)


_CHOICES = {
    "precision": ("exact", "float64", "fast"),
    "granularity": ("module", "block"),
    "trunk": ("identity", "inside"),
    "outside": ("store", "checkpoint"),
    "device": ("cpu", "cuda"),
}


def _checked(
    input_shape: str | None, how: dict[str, str], budget: str | None = None
) -> tuple[int, ...] | None:
    """The parsed --input-shape; bad usage is said before anything is loaded."""
    for option, choices in _CHOICES.items():
        if how.get(option, choices[0]) not in choices:
            known = ", ".join(choices[:-1]) + f" or {choices[-1]}"
            raise typer.BadParameter(f"--{option} is {known}, not {how[option]!r}.")
    chunks = how.get("chunks", "1")
    if chunks != "auto" and not (chunks.isdecimal() and int(chunks)):
        raise typer.BadParameter(f"--chunks is auto or a number from 1 on, not {chunks!r}.")
    if budget is not None:
        _check_budget(budget, input_shape, how)
    if input_shape is None:
        return None
    sizes = input_shape.split(",")
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(
            f"--input-shape is numbers like 2,3,224,224 (batch included), not {input_shape!r}."
        )
    return tuple(int(size) for size in sizes)


def _print_stored(file: AlreadyRewired, as_json: bool) -> None:
    """The plan that a file of `rewire convert` was made by."""
    from rewire.report import console, plan_tree
    from rewire.storage import stored_plan

    plan = stored_plan(file.path)
    if as_json:
        _print_json({"source": f"{file.path}, rewired", **plan.to_dict()})
    else:
        console().print(plan_tree(plan))


def _print_parts(model: Any, plan: Any, shape: tuple[int, ...] | None) -> None:
    """Which branches run in parts on the example."""
    from rewire.division import parts
    from rewire.inputs import example_for
    from rewire.making import make_reversible
    from rewire.report import parts_lines

    example = example_for(model, shape) if shape else None
    typer.echo("branches in parts, on this input:")
    for line in parts_lines(parts(make_reversible(model, plan=plan), example)):
        typer.echo(f"  {line}")


_LEAST = 1000  # bytes; less is a share, which only inspect and convert take


def _bytes(text: str) -> int:
    """The parsed --budget, in bytes."""
    from rewire.sizes import bytes_of

    try:
        amount = bytes_of(text)
        if amount < _LEAST:
            raise ValueError(f"{text!r} is no amount of memory such as 24GB or 16GiB.")
        return amount
    except ValueError as error:
        raise typer.BadParameter(f"--budget: {error}") from error


def _check_budget(budget: str, input_shape: str | None, how: dict[str, str]) -> None:
    """Refuse what is no budget, or nothing that it could be kept on."""
    from rewire.sizes import budget_of

    try:
        budget_of(budget)
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from error
    if how.get("chunks", "1") != "1" or how.get("outside", "store") != "store":
        raise typer.BadParameter("--budget chooses --chunks and --outside itself: leave them out.")
    if input_shape is None:
        raise typer.BadParameter(
            "--budget needs --input-shape, the batch and size that you train on: memory depends "
            "on it."
        )


def _request(
    options: tuple[Any, ...], how: dict[str, Any], shape: tuple[int, ...] | None
) -> Request:
    from rewire.conversion import Request

    arch, trust, pretrained, include, exclude = options
    chunks = how.pop("chunks", "1")
    return Request(
        arch=arch,
        trust=tuple(trust or ()),
        pretrained=pretrained,
        shape=shape,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        chunks=chunks if chunks == "auto" else int(chunks),
        **how,
    )


def _check_target(path: Path, other: str, what: str) -> None:
    """Refuse a file that can't be written, or would replace another of this command."""
    if path.is_dir():
        raise typer.BadParameter(f"{what} {path} is a directory. Name a file in it.")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"{what} {path}: there is no directory {path.parent}.")
    if path.resolve() == Path(other).resolve():
        raise typer.BadParameter(f"{what} {path} is the same file as {other}. Name another.")


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def _print_conversion(done: Conversion, input_shape: str | None, as_json: bool) -> None:
    if as_json:
        written = {"source": done.source, "out": str(done.out), "bytes": done.out_bytes}
        _print_json({**written, "plan": done.plan.to_dict()})
        return
    from rewire.report import console, plan_summary
    from rewire.sizes import human_bytes

    out, trust = done.out, list(done.trust)
    console().print(plan_summary(done.plan))
    more = "".join(f" --trust {package}" for package in trust)
    more += f" --input-shape {input_shape}" if input_shape else ""
    arguments = repr(str(out)) + (f", trust={trust!r}" if trust else "")
    typer.echo(
        f"from {done.source}\nwrote {out} ({human_bytes(done.out_bytes)})\n\n"
        f"Next: check it with\n  rewire verify {out}{more}\nand train it with\n"
        f"  import rewire\n  rev = rewire.load({arguments})"
    )


def _print_verdict(verdict: Verdict, title: str, as_json: bool) -> None:
    if as_json:
        _print_json(verdict.to_dict())
        return
    from rewire.report import console, verdict_table

    console().print(verdict_table(verdict.checks, title))


def _print_balance(found: Balance, budget: int | None, plot: Path | None, as_json: bool) -> None:
    """The table, or JSON; and the picture."""
    if as_json:
        _print_json({**found.to_dict(), "budget_bytes": budget})
    else:
        from rewire.report import balance_table, console

        console().print(found.title, style="bold", markup=False)
        console().print(balance_table(found.rows(), budget))
    if plot is not None:
        from rewire.plotting import plot_steps

        plot_steps(found.traces(), plot, found.title)
        typer.echo(f"wrote {plot}", err=True)


def _print_demonstration(shown: Demonstration, keep: Path | None) -> None:
    from rewire.report import console, plan_summary

    console().print(plan_summary(shown.conversion.plan))
    _print_verdict(shown.verdict, f"{shown.conversion.out.name}, loaded and verified", False)
    gradients, memory = shown.verdict["parameter gradients"], shown.verdict["peak memory"]
    exact = "equal to ordinary autograd's bit for bit"
    error = f"largest relative error {gradients.measured:.1e}"
    typer.echo(f"\ngradients: {error if gradients.measured else exact}")
    typer.echo(f"peak activation memory of one training step: {memory.detail}")
    kept = "" if keep is None else f" The files are in {keep}."
    typer.echo(f"\nNext: rewire inspect MODEL, then rewire convert MODEL -o OUT.{kept}")


def _failed(verdict: Verdict) -> str:
    names = [check.name for check in verdict.checks if not check.passed]
    return f"{len(names)} of {len(verdict.checks)} checks failed ({', '.join(names)})"
