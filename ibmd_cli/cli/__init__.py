"""The command line: four commands, each of which turns its flags into one call. Nothing heavy is imported here.

stdout carries results alone; progress, notes, warnings and errors go to stderr. Exit codes: 0 done, 1 failed,
2 usage, 3 some inputs failed, 4 model or data not available, 5 out of memory, 130 interrupted.
"""

import errno
import json
import os
import signal
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ibmd_cli import __version__
from ibmd_cli.errors import IbmdError, UsageError
from ibmd_cli.processes import Process, this_process
from ibmd_cli.reporting import Reporter, is_plain

app = typer.Typer(
    name="ibmd",
    help="One-step image translation: distil slow diffusion-bridge teachers into one-step students, and run them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DEFAULT = "builtin:outline2emoji"

Device = Annotated[str, typer.Option(envvar="IBMD_DEVICE", help="auto, cpu, cuda, cuda:N or mps.")]
Seed = Annotated[int, typer.Option(envvar="IBMD_SEED", help="Seed of all randomness.")]
Preset = Annotated[str | None, typer.Option(metavar="ALIAS", help="The published teacher that a file of --teacher is.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes.")]
Debug = Annotated[bool, typer.Option("--debug", envvar="IBMD_DEBUG", help="Show tracebacks.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ibmd {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distil slow diffusion-bridge teachers into one-step image translators, and run them."""


@app.command(
    epilog="Example: ibmd distill                     the embedded teacher, offline, in minutes on a CPU\n\n"
    "Example: ibmd distill --data drawings/ --out runs/mine --steps 1000\n\n"
    "Example: ibmd distill --processes all        one process a GPU; or accelerate launch -m ibmd_cli distill"
)
def distill(
    teacher: Annotated[
        str | None,
        typer.Option(help="builtin:NAME, hub:ALIAS, hf://OWNER/REPO, a model folder, or a published checkpoint."),
    ] = None,
    preset: Preset = None,
    head_channels: Annotated[int | None, typer.Option(help="Of a checkpoint's attention, if not its family's.")] = None,
    attention_order: Annotated[str | None, typer.Option(help="new or legacy, likewise.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of source images, or of clean ones with --degrade (repeatable); builtin:NAME, dataset:NAME, "
            "hf://datasets/OWNER/NAME; or preset: the teacher's own data, fetched."
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            help="Of the files: ab or ba (pairs, the source left or right), or normals.", show_default="sources"
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="CSV file of PATH,CLASS for teachers with classes.", show_default="names of folders"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Fetch data without asking.")] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read images ahead; 0: none.", show_default="by the cores")
    ] = None,
    degrade: Annotated[
        str | None, typer.Option(help="Makes sources of clean images, e.g. jpeg-10; none: they are sources.")
    ] = None,
    masks: Annotated[str | None, typer.Option(help="File of free-form masks (.npz).")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder.", show_default="runs/TEACHER")] = None,
    nfe: Annotated[int | None, typer.Option(help="Network calls of the student per image.")] = None,
    timesteps: Annotated[
        str | None, typer.Option(help="Their times, from T down, e.g. 1,0.4.", show_default="evenly spaced")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Student whose weights it starts from.", show_default="the teacher's")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Student updates (K).")] = None,
    bridge_steps: Annotated[int | None, typer.Option(help="Bridge-model updates per student update (L).")] = None,
    bridge_warmup: Annotated[int | None, typer.Option(help="Bridge-model updates before the first.")] = None,
    reuse: Annotated[
        int | None, typer.Option(help="Bridge-model updates that share images of the student: cheaper.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per update.")] = None,
    micro_batch: Annotated[
        str | None, typer.Option(help="Images at a time in each process; 0: all; auto: as many as memory holds.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB that auto may use.", show_default="nine tenths of what is free")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the student.")] = None,
    bridge_lr: Annotated[float | None, typer.Option(help="Learning rate of the bridge model.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the student's average.")] = None,
    noise: Annotated[bool | None, typer.Option("--noise/--no-noise", help="Whether the student takes noise z.")] = None,
    noise_grid: Annotated[int | None, typer.Option(help="Side of z; 0: one number per pixel.")] = None,
    noise_init: Annotated[float | None, typer.Option(help="Deviation of the new weights for z at the start.")] = None,
    t_power: Annotated[float | None, typer.Option(help="1: uniform times; more: nearer to T.")] = None,
    t_even: Annotated[
        bool | None, typer.Option("--t-even/--no-t-even", help="Spread the times of a batch evenly.")
    ] = None,
    weight_power: Annotated[float | None, typer.Option(help="λ(t) = c_out(t)^−this.")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="Less memory, more time.")
    ] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Activation checkpointing.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the networks first (torch.compile).")
    ] = None,
    fsdp: Annotated[
        bool | None, typer.Option("--fsdp/--no-fsdp", help="Split the networks over the processes: less memory.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Student updates between checkpoints.")] = None,
    preview_every: Annotated[int | None, typer.Option(help="Student updates between previews.")] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints to keep.")] = None,
    track: Annotated[str | None, typer.Option(help="tensorboard or wandb: send the log there, too.")] = None,
    resume: Annotated[str, typer.Option(help="auto, never, or the path of a checkpoint.")] = "auto",
    config: Annotated[Path | None, typer.Option(help="TOML or JSON file of settings.")] = None,
    list_teachers: Annotated[bool, typer.Option("--list-teachers", help="List the known teachers and exit.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print every setting with its origin and exit.")] = False,
    processes: Annotated[str, typer.Option(help="Processes to train with: a number, or all (one a GPU).")] = "1",
    device: Device = "auto",
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Distil a diffusion-bridge teacher into a student of one or a few steps, from source images alone.

    The same command again continues an interrupted run.
    """
    flags = {**locals()}
    from ibmd_cli.training.config import DistillConfig, resolve

    if list_teachers:
        from ibmd_cli.models.teachers import list_teachers as known

        _show_teachers(known(), as_json)
        return
    reporter = Reporter(quiet)
    flags["data"] = tuple(data) if data else None
    given = {k: flags[k] for k in DistillConfig.__annotations__ if k in flags}
    settings, origins = resolve(given, os.environ, config)
    if not settings.preset and os.path.exists(settings.teacher):
        from ibmd_cli.models.teachers import recognise_file

        if alias := recognise_file(settings.teacher):
            reporter.note(f"{settings.teacher} is {alias}: its preset is used (--preset ALIAS names another)")
            settings, origins = resolve({**given, "preset": alias}, os.environ, config)
            origins["preset"] = "contents of the file"
    out = out or Path("runs") / Path(settings.teacher.rpartition(":")[2]).name.removesuffix(".pt")
    if dry_run:
        from ibmd_cli.devices import resolve_device
        from ibmd_cli.processes import count_processes
        from ibmd_cli.training.plan import plan

        _show_plan(plan(settings, out, count_processes(processes, resolve_device(device))), settings, origins, as_json)
        return
    if any(reference.startswith("dataset:") for reference in settings.data):
        from ibmd_cli.data.download import fetch

        fetch(settings.data, reporter, yes)
    from ibmd_cli.devices import resolve_device
    from ibmd_cli.training.loop import distill as run

    place = resolve_device(device)
    if processes != "1" and not this_process().launched:
        from ibmd_cli.processes import count_processes, relaunch

        if (count := count_processes(processes, place)) > 1:
            raise typer.Exit(relaunch(count, sys.argv[1:]))
    student = run(settings, origins, out, place, resume, reporter)
    if this_process().rank == 0:
        typer.echo(json.dumps({"schema": 1, "student": str(student)}) if as_json else str(student))


_panels = ("Inputs", "Outputs", "Model", "Size and transparency", "Run")
_input, _output, _model, _size, _run = (partial(typer.Option, rich_help_panel=panel) for panel in _panels)


@app.command(
    epilog="Example: ibmd sample --input drawing.png\n\n"
    "Example: ibmd sample --input drawings/ --recursive --output coloured/ --variants 4 --grid sheet.png\n\n"
    "Example: ibmd sample --input - < drawing.png > coloured.png\n\n"
    "Example: find . -name '*.png' -print0 | ibmd sample --files-from - -0 --output coloured/\n\n"
    "Example: ibmd sample --input drawing.png --student hf://OWNER/REPO"
)
def sample(
    more: Annotated[list[str] | None, typer.Argument(metavar="PATH", help="More inputs.")] = None,
    inputs: Annotated[
        list[str] | None,
        _input("--input", "-i", metavar="PATH", help="File, folder, glob, or - for an image on stdin (repeatable)."),
    ] = None,
    files_from: Annotated[str | None, _input(metavar="FILE", help="A list of paths, one a line; - for stdin.")] = None,
    null: Annotated[bool, _input("--null", "-0", metavar="", help="Its paths end in NUL.")] = False,
    recursive: Annotated[bool, _input("--recursive", "-r", metavar="", help="Search folders in folders, too.")] = False,
    max_pixels: Annotated[int, _input(min=1, metavar="N", help="Refuse larger images.")] = 100_000_000,
    degrade: Annotated[
        str | None, _input(metavar="NAME", help="They are clean: degrade them first, e.g. jpeg-10.")
    ] = None,
    mask: Annotated[
        str | None, _input(metavar="PATH", help="Hole (white) for inpainting: file, folder of files, or center.")
    ] = None,
    label: Annotated[
        str | None, _input(metavar="N|FILE", help="Class, or a CSV file of PATH,CLASS, for models with classes.")
    ] = None,
    output: Annotated[
        str | None,
        _output(
            "--output",
            "-o",
            metavar="PATH",
            help="File, folder, or - for image bytes on stdout.",
            show_default="NAME.ibmd.png beside the input",
        ),
    ] = None,
    on_exists: Annotated[
        Literal["error", "skip", "overwrite"],
        _output(help="If an output exists. skip continues an interrupted run, also beside others that do."),
    ] = "error",
    variants: Annotated[int, _output(min=1, metavar="N", help="Pictures per input: NAME.ibmd.1.png, …")] = 1,
    grid: Annotated[str | None, _output(metavar="FILE", help="Contact sheet of sources and results.")] = None,
    format: Annotated[
        str | None,
        _output(metavar="NAME", help="png, jpg, webp, tiff, bmp or avif.", show_default="by the output's name, or png"),
    ] = None,
    quality: Annotated[
        int | None,
        _output(
            min=1,
            max=100,
            metavar="1-100",
            help="Of jpg, webp and avif.",
            show_default="95 for jpg, lossless webp, 90 for avif",
        ),
    ] = None,
    as_json: Annotated[bool, _output("--json", metavar="", help="A line of JSON for each picture.")] = False,
    print0: Annotated[
        bool, _output("--print0", metavar="", help="End the paths on stdout in NUL, for xargs -0.")
    ] = False,
    student: Annotated[
        str | None,
        _model(
            metavar="REF",
            help="builtin:NAME, hf://OWNER/REPO, a model folder, a run folder, or a file that ibmd export wrote.",
            show_default=DEFAULT,
        ),
    ] = None,
    teacher: Annotated[
        str | None, _model(metavar="REF", help="Translate with this teacher instead, to compare.")
    ] = None,
    preset: Annotated[
        str | None, _model(metavar="ALIAS", help="The published teacher that a file of --teacher is.")
    ] = None,
    head_channels: Annotated[
        int | None, _model(min=1, metavar="N", help="Of such a file's attention, if not its family's.")
    ] = None,
    attention_order: Annotated[str | None, _model(metavar="NAME", help="new or legacy, likewise.")] = None,
    sampler: Annotated[
        str | None, _model(metavar="NAME", help="Of the teacher: ddbm, dbim or i2sb.", show_default="the teacher's own")
    ] = None,
    sampler_option: Annotated[
        list[str] | None, _model(metavar="KEY=VALUE", help="Of the sampler, e.g. eta=0 (repeatable).")
    ] = None,
    nfe: Annotated[
        int | None, _model(min=1, metavar="N", help="Network calls per image.", show_default="the model's")
    ] = None,
    seed: Annotated[int, _model(envvar="IBMD_SEED", metavar="N", help="Seed of all randomness.")] = 0,
    fit: Annotated[
        Literal["pad", "stretch", "crop", "tile"],
        _size(help="How an input becomes the model's square. tile: many squares, for restoration."),
    ] = "pad",
    restore_size: Annotated[
        bool, _size("--restore-size", metavar="", help="Give results the size of their inputs.")
    ] = False,
    alpha: Annotated[
        Literal["white", "keep", "drop"], _size(help="Transparency: lay on white, keep, or leave out.")
    ] = "white",
    batch_size: Annotated[int, _run(min=1, metavar="N", help="Images at a time on a GPU.")] = 16,
    device: Annotated[str, _run(envvar="IBMD_DEVICE", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    fail_fast: Annotated[bool, _run("--fail-fast", metavar="", help="Stop at the first image that fails.")] = False,
    quiet: Annotated[bool, _run("--quiet", "-q", metavar="", help="No progress and no notes.")] = False,
    debug: Annotated[bool, _run("--debug", envvar="IBMD_DEBUG", metavar="", help="Show tracebacks.")] = False,
) -> None:
    """Translate images with a student, in one step. A picture depends on its name and the seed alone.

    One bad file does not stop the others: it is named, counted, and the exit code is 3.
    """
    from ibmd_cli.sampling.pipeline import sample as run
    from ibmd_cli.sampling.plan import SampleConfig

    config = SampleConfig(
        inputs=(*(inputs or ()), *(more or ())),
        files_from=files_from,
        null=null,
        output=output,
        format=format,
        quality=quality,
        student=student,
        teacher=teacher,
        preset=preset,
        head_channels=head_channels,
        attention_order=attention_order,
        sampler=sampler,
        sampler_options=tuple(sampler_option or ()),
        nfe=nfe,
        label=label,
        mask=mask,
        degrade=degrade,
        alpha=alpha,
        recursive=recursive,
        on_exists=on_exists,
        fit=fit,
        restore_size=restore_size,
        variants=variants,
        grid=grid,
        seed=seed,
        batch_size=batch_size,
        max_pixels=max_pixels,
        device=device,
        fail_fast=fail_fast,
        as_json=as_json,
        print0=print0,
    )
    raise typer.Exit(run(config, Reporter(quiet)))


@app.command(
    "eval",
    epilog="Example: ibmd eval                                     the embedded student, teacher and test drawings\n\n"
    "Example: ibmd eval --student runs/mine --data pairs/ --out report\n\n"
    "Example: ibmd eval --student runs/a --student runs/b --seeds 3        two students, and how sure their gap is\n\n"
    "Example: ibmd eval --teacher none --metric psnr --metric ssim --json  the student alone",
)
def evaluate(
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="Student (repeatable): builtin:NAME, a model folder, a run folder; or none.", show_default=DEFAULT
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher, or none.", show_default="the one that the student was distilled from")
    ] = None,
    teacher_nfe: Annotated[
        list[str] | None,
        typer.Option(metavar="N,…", help="Network calls of the teacher (repeatable).", show_default="1,5,20,100"),
    ] = None,
    preset: Preset = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="builtin:NAME, a folder with source/ and target/, or with --degrade a folder of clean images.",
            show_default="the embedded teacher's test pairs",
        ),
    ] = None,
    degrade: Annotated[
        str | None, typer.Option(help="Makes sources of clean images, e.g. jpeg-10; none: they are pairs.")
    ] = None,
    masks: Annotated[str, typer.Option(help="File of free-form masks (.npz).")] = "",
    labels: Annotated[str, typer.Option(help="CSV file of classes: PATH,CLASS.")] = "",
    fit: Annotated[
        Literal["none", "crop"],
        typer.Option(help="Pairs of another size: refuse, or scale and crop at the centre, as made ones always are."),
    ] = "none",
    protocol: Annotated[
        str | None, typer.Option(help="As published: ddbm-e2h, ddbm-diode, dbim-inpaint, i2sb-sr or i2sb-restore.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,…",
            help="What to measure (repeatable), e.g. fid,lpips_vgg.",
            show_default="what needs no download",
        ),
    ] = None,
    weights: Annotated[
        list[Path] | None, typer.Option(help="File or folder of weights of Inception, VGG16, … (repeatable).")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download weights that are not there.")] = False,
    reference: Annotated[
        Path | None, typer.Option(help="Reference of the FID: .npz file or folder.", show_default="the targets")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Samples for each source.", show_default="4; 1 with --protocol")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Draw all samples so many times, to tell how they vary.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Most images at a time.")] = 64,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json, report and pictures; the same again continues.")
    ] = None,
    processes: Annotated[str, typer.Option(help="Processes to share the work: a number, or all (one a GPU).")] = "1",
    device: Device = "auto",
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure students against their teacher on held-out pairs: quality, diversity, speed and memory.

    With --out, the same command again continues an interrupted evaluation.
    """
    from rich.console import Console

    from ibmd_cli.evaluation.evaluate import EvalConfig
    from ibmd_cli.evaluation.evaluate import evaluate as run
    from ibmd_cli.evaluation.tables import tables

    config = EvalConfig(
        student=tuple(student) if student else EvalConfig.student,
        teacher=teacher,
        teacher_nfe=_numbers("--teacher-nfe", teacher_nfe) or EvalConfig.teacher_nfe,
        preset=preset,
        data=data,
        samples=samples,
        batch_size=batch_size,
        seed=seed,
        device=device,
        out=out,
        protocol=protocol,
        metrics=_listed(metric),
        seeds=seeds,
        weights=tuple(weights or ()),
        fetch=fetch,
        reference=reference,
        degrade=degrade,
        masks=masks,
        labels=labels,
        fit=fit,
    )
    if processes != "1" and not this_process().launched:
        from ibmd_cli.devices import resolve_device
        from ibmd_cli.processes import count_processes, relaunch

        if (count := count_processes(processes, resolve_device(device))) > 1:
            raise typer.Exit(relaunch(count, sys.argv[1:]))
    results = run(config, Reporter(quiet or this_process().rank > 0))
    if not results:
        return
    if as_json:
        typer.echo(json.dumps(results, ensure_ascii=False))
        return
    plain = is_plain(sys.stdout)
    Console(force_terminal=False if plain else None, width=100 if plain else None).print(tables(results))


@app.command(
    epilog="Example: ibmd export --dtype fp16 --output student.safetensors\n\n"
    "Example: ibmd export --student runs/mine --output student.onnx\n\n"
    "Example: ibmd export --all --output exported/       every format, and a table of what each costs"
)
def export(
    student: Annotated[str, typer.Option(help="Student: builtin:NAME, a model folder or a run folder.")] = DEFAULT,
    format: Annotated[
        str | None,
        typer.Option(
            help="safetensors, onnx, torch-export (.pt2), or web (.html: a page to draw on).",
            show_default="by the output's name, or safetensors",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: fp32, fp16 or bf16; for onnx also int8. They are used in float32.")
    ] = "fp32",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File; a folder with --all.", show_default="STUDENT-DTYPE.safetensors"),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Write every format with every dtype, and compare them.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="Of ONNX: 18 to 20.", show_default="20")] = None,
    noise_inside: Annotated[
        bool, typer.Option("--noise-inside", help="The file draws its noise itself, and takes images alone.")
    ] = False,
    on_exists: Annotated[Literal["error", "overwrite"], typer.Option(help="If an output exists.")] = "error",
    push_to: Annotated[
        str | None, typer.Option(metavar="OWNER/REPO", help="Upload the model folder and its card to the Hub instead.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public.")] = False,
    results: Annotated[
        Path | None, typer.Option(help="results.json of ibmd eval, for the card's figures and grid.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and the card.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a student as one file, run it back on real images, and keep it if it agrees with the student.

    With --push-to, the student goes to the Hub, from where hf://OWNER/REPO names it anywhere.
    """
    if push_to is None and (public or dry_run or results):
        raise UsageError("--public, --dry-run and --results go with --push-to")
    if push_to is not None:
        if output or everything or format:
            raise UsageError("--push-to: uploads the model folder; leave out --output, --format and --all")
        from ibmd_cli.models.card import publish

        report = publish(student, push_to, results=results, public=public, dry_run=dry_run, quiet=quiet)
        if as_json:
            typer.echo(json.dumps({"schema": 1, **report}, ensure_ascii=False))
        elif dry_run:
            typer.echo("\n".join(f"{file['bytes']:>12,} {file['path']}" for file in report["files"]))
            typer.echo(report["card"])
        else:
            typer.echo(report["url"])
        return
    from ibmd_cli.export.exporter import Exporter, every_format, make_config

    reporter = Reporter(quiet)
    settings: dict[str, Any] = {"overwrite": on_exists == "overwrite", "seed": seed}
    if everything:
        if format or opset or noise_inside or dtype != "fp32":
            raise UsageError(
                "--all: writes every format and dtype; leave out --format, --dtype, --opset, --noise-inside"
            )
        configs = every_format(student, output or Path("exported"), **settings)
    else:
        settings |= {"opset": opset, "noise_inside": noise_inside}
        configs = [make_config(student, output, format, dtype, **settings)]
    exporter = Exporter(student)
    reports = []
    for config in configs:
        reporter.note(f"writing {config.output}, and running it back")
        reports.append(report := exporter.export(config))
        reporter.note(
            f"{config.output}: {report['bytes'] / 1e6:.2f} MB, largest difference {report['max_difference']:.2g}, "
            f"{report['ms_per_image']['exported']:.2f} ms/image (student: {report['ms_per_image']['student']:.2f})"
        )
    if as_json:
        typer.echo(json.dumps({"schema": 1, "exports": reports} if everything else reports[0]))
    elif everything:
        _table("Exports", [_export_row(report) for report in reports])
    else:
        typer.echo(str(configs[0].output))


def _listed(given: list[str] | None) -> tuple[str, ...]:
    """Return the words of a flag that is repeated, or given several with commas between them."""
    return tuple(word.strip() for words in given or () for word in words.split(","))


def _numbers(flag: str, given: list[str] | None) -> tuple[int, ...]:
    words = _listed(given)
    for word in words:
        if not word.isdecimal():
            raise UsageError(f"{flag} {word!r}: expected whole numbers, e.g. {flag} 1,20")
    return tuple(map(int, words))


def _export_row(report: dict[str, Any]) -> dict[str, Any]:
    times = report["ms_per_image"]
    return {
        "file": report["output"],
        "MB": f"{report['bytes'] / 1e6:.2f}",
        "max difference": f"{report['max_difference']:.2g}",
        "mean": f"{report['mean_difference']:.2g}",
        "PSNR dB": "equal" if report["psnr"] is None else f"{report['psnr']:.1f}",
        "ms/image": f"{times['exported']:.2f}",
        "student": f"{times['student']:.2f}",
    }


def _show_teachers(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"schema": 1, "teachers": rows}, ensure_ascii=False))
        return
    sites = {"hf": "Hub", "https": "Google Drive", "embedded": "embedded"}
    short = [
        {
            "teacher": row["teacher"],
            "task": row["task"],
            "pixels": row["pixels"],
            "kind": row["kind"],
            "size": f"{row['bytes'] / 1e9:.1f} GB" if row["bytes"] > 1e8 else f"{row['bytes'] / 1e6:.0f} MB",
            "from": sites[row["source"].partition(":")[0]],
            "licence": row["licence"],
            "Table 7": "yes" if row["paper_row"] else "",
        }
        for row in rows
    ]
    if sys.stdout.isatty() and os.get_terminal_size().columns < 120:
        short = [{key: row[key] for key in ("teacher", "task", "size", "from")} for row in short]
    _table("Teachers (Table 7: distilled in the paper; --json tells files, parameters and data, too)", short)


def _show_plan(plan: dict[str, Any], settings: Any, origins: dict[str, str], as_json: bool) -> None:
    if as_json:
        from ibmd_cli.training.config import to_json

        typer.echo(json.dumps({"schema": 1, "settings": to_json(settings), "origins": origins, "plan": plan}))
        return
    _table("Settings", [{"setting": k, "value": getattr(settings, k), "origin": o} for k, o in origins.items()])
    files = [
        f"{' and '.join(f['files'])} of {f['url']}, about {f['bytes'] / 1e9:.1f} GB, {f['how']}"
        for f in plan["files to download"]
    ]
    rows = {key.replace(", bytes", ""): f"{v / 1e9:.3g} GB" if "bytes" in key else v for key, v in plan.items()}
    rows["files to download"] = "; ".join(files) or "none"
    _table("Plan", [{"what": k, "value": v} for k, v in rows.items()])


def _table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows on stdout; the first column names them and is never broken."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=None, title_justify="left", header_style="bold")
    for i, name in enumerate(rows[0]):
        table.add_column(name, no_wrap=i == 0)
    for row in rows:
        table.add_row(*(str(v) for v in row.values()))
    plain = is_plain(sys.stdout)
    Console(force_terminal=False if plain else None, width=None if sys.stdout.isatty() else 200).print(table)


def main() -> None:
    """Run the program; tell what the user can mend in one line, and keep tracebacks for --debug."""
    reporter = Reporter()
    if is_plain(sys.stdout):
        os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"  # Typer writes escape codes where GITHUB_ACTIONS is set
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: exit code 130, no temporary file
    try:
        app()
    except IbmdError as error:
        # Settings are the same in all of several processes, and the first tells what is wrong with them.
        process = _process()
        other = process.connected and process.rank > 0
        message = f"process {process.rank + 1} of {process.count}: {error}" if other else str(error)
        _fail(reporter, message, error.exit_code, told=other and isinstance(error, UsageError))
    except MemoryError:
        _fail(reporter, "out of memory: lower --batch-size or --micro-batch", 5)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: say nothing more
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(reporter, f"disk full while writing {error.filename or 'a file'}: free some space and run again", 1)
        _fail(reporter, f"{error.filename or 'system'}: {error.strerror or error}", 1)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
            _fail(reporter, f"{type(error).__name__}: {error} (--debug shows where)", 1)
        _fail(reporter, "out of memory: lower --batch-size or --micro-batch", 5)
    except Exception as error:  # a fault of ours: still one line
        _fail(reporter, f"{type(error).__name__}: {error} (--debug shows where)", 1)


def _process() -> Process:
    """Return `this_process()`; one alone where the launcher's variables are what is wrong."""
    with suppress(UsageError):
        return this_process()
    return Process()


def _fail(reporter: Reporter, message: str, exit_code: int, told: bool = False) -> Any:
    if "--debug" in sys.argv or os.environ.get("IBMD_DEBUG", "") not in ("", "0"):
        raise  # noqa: PLE0704 (always called while an exception is handled)
    if not told:
        reporter.error(message)
    sys.exit(exit_code)


if __name__ == "__main__":
    main()
