"""The command line. Torch is imported inside the verbs, so that --help answers at once."""

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from functools import partial
from inspect import Parameter, Signature, getdoc
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, get_origin

import typer
from typer.core import TyperGroup

from ldm_sg import __version__, commands
from ldm_sg.errors import InputError
from ldm_sg.evaluate import options as evaluation

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # its remarks on how we call it are not the user's


class ExitCodes(TyperGroup):
    """0 done, 2 wrong input (one line on stderr), 130 interrupted, 1 a bug (traceback)."""

    def invoke(self, ctx: Any) -> Any:
        # libgomp's threads spin for 300,000 rounds at a barrier, which takes the cores from other jobs; benchmarks/RESULTS.md
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        try:
            return super().invoke(ctx)
        except InputError as err:
            print(f"ldm-sg: {err}", file=sys.stderr)
            ctx.exit(2)
        except OSError as err:
            if err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENAMETOOLONG):
                raise
            print(f"ldm-sg: {err.filename or 'while writing'}: {err.strerror}", file=sys.stderr)
            ctx.exit(2)
        except KeyboardInterrupt as err:
            print(f"ldm-sg: {str(err) or 'interrupted'}", file=sys.stderr)
            ctx.exit(130)


app = typer.Typer(
    cls=ExitCodes,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Start with `ldm-sg demo`. Every verb has --help with examples; configs/annotate/ and configs/train/ hold a config "
    "for each data set, under the same name, and README.md a table of them.",
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"ldm-sg {__version__}")
        raise typer.Exit


@app.callback()
def ldm_sg(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Label-free, self-guided latent diffusion: pack, annotate, train, sample, evaluate."""


def add(name: str, takes: type, run: str | Callable[..., Any] = "") -> None:
    """The verb `name`: its arguments and flags are the fields of `takes`, whose docstring is its help, examples last. What was
    typed, and nothing else, goes to `run`, or to what has this name in ldm_sg (default verbs.NAME:NAME), imported only then."""
    *group, short = name.split()
    run = run or "verbs.{0}:{0}".format(short.replace("-", "_"))
    help, heading, examples = (getdoc(takes) or "").partition("Examples:")

    def verb(context: typer.Context, **values: Any) -> None:
        needed = {each.name for each in fields(takes) if each.default is each.default_factory}  # both are MISSING
        typed = {name for name in values if context.get_parameter_source(name).name != "DEFAULT"} | needed
        given = {each.name: _value(each, values[each.name]) for each in fields(takes) if each.name in typed}
        (resolve_name(f"ldm_sg.{run}") if isinstance(run, str) else run)(**given)

    context = Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)
    verb.__signature__ = Signature([context, *map(_parameter, fields(takes))])  # type: ignore[attr-defined]
    (first_stages if group else app).command(short, help=help, epilog=f"\b\n{heading}{examples}")(verb)


def _parameter(of: Field) -> Parameter:
    """A field as Typer reads it. What is parsed by us is text, or several where they make a mapping."""
    kind, default, help = of.type, of.default, of.metadata["help"]
    if of.default_factory is not MISSING:
        default = ",".join(f"{number:g}" for number in of.default_factory()) or None
    if of.metadata.get("parse"):
        kind = list[str] | None if get_origin(kind) is dict else str | None
    is_option = "flags" in of.metadata
    how = typer.Option(*(of.metadata["flags"] or [_flag(of)]), help=help) if is_option else typer.Argument(help=help)
    default = Parameter.empty if default is MISSING else default
    return Parameter(of.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how])


def _flag(of: Field) -> str:
    return f"--{of.name.replace('_', '-')}"


def _value(of: Field, typed: Any) -> Any:
    parse = of.metadata.get("parse")
    return parse(_flag(of), typed) if parse else typed


def with_config(
    schema: str, verb: str, config: Path, overrides: list[str] | None = None, dry_run: bool = False, **more: Any
) -> None:
    """Load the config as `ldm_sg.config.SCHEMA` and hand it to ldm_sg.verbs.VERB.VERB."""
    from ldm_sg import config as configs
    from ldm_sg.configfile import load, to_yaml

    loaded: Any = load(getattr(configs, schema), config, overrides)
    if dry_run:
        if schema == "TrainConfig":
            loaded.model = configs.model_config(loaded.model)
        print(to_yaml(loaded), end="")
        return
    resolve_name(f"ldm_sg.verbs.{verb}:{verb}")(loaded, **more)


def annotate(part: str | None = None, finish: bool = False, **given: Any) -> None:
    """With a part of the shards, where one is named or the environment says so."""
    from ldm_sg.executor import read_part

    if part and finish:
        raise InputError(f"--part {part} --finish: one after the other, --finish when all parts are done")
    with_config("AnnotateConfig", "annotate", **given, part=None if finish else read_part(part), finish=finish)


def list_configs() -> None:
    from ldm_sg.configfile import listing

    print(listing())


first_stages = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="\b\nExamples:\n  ldm-sg autoencoder list\n"
    "  ldm-sg autoencoder measure sd-vae-ft-mse --data 'data/mine/*.tar' -n 500 --picture out.png\n"
    "  ldm-sg autoencoder import kl-f8/model.ckpt --config kl-f8/config.yaml --out autoencoders/kl-f8",
    help="First stages: what there is, how well one gives images back, checkpoints of others.",
)
app.add_typer(first_stages, name="autoencoder")

add("pack", commands.PackOptions)
add("annotate", commands.AnnotateOptions, annotate)
add("train", commands.TrainOptions, partial(with_config, "TrainConfig", "train"))
add("sample", commands.SampleCommand, "verbs.sample:command")
add("edit", commands.EditOptions)
add("evaluate", evaluation.Options)
add("export", commands.ExportOptions)
add("reproduce", commands.ReproduceOptions, "reproduce.run:reproduce")
add("configs", commands.ConfigsOptions, list_configs)
add("demo", commands.DemoOptions)
add("finetune", commands.FinetuneOptions)
add("dedup", commands.DedupOptions)
add("inspect", commands.InspectOptions)
add("fit-autoencoder", commands.FitAutoencoderOptions, partial(with_config, "FitAutoencoderConfig", "fit_autoencoder"))
add("distill", commands.DistillOptions, partial(with_config, "DistillConfig", "distill"))
add("autoencoder list", commands.ListOptions, "verbs.autoencoder:show")
add("autoencoder import", commands.ImportOptions, "verbs.autoencoder:import_checkpoint")
add("autoencoder measure", commands.MeasureOptions, "verbs.autoencoder:measure")


def main() -> None:
    app()
