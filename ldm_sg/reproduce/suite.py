"""Suites of configs/reproduce/: cells, each of them overrides of the verbs, times seeds -> ordinary configs, folders and commands."""

import itertools
import json
import re
import shlex
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import yaml
from omegaconf import OmegaConf

from ldm_sg.annotate.kinds import late
from ldm_sg.commands import PackOptions
from ldm_sg.config import AnnotateConfig, FeaturesConfig, TrainConfig
from ldm_sg.configfile import ROOT, load, to_mapping
from ldm_sg.errors import InputError, choices, need_choice
from ldm_sg.evaluate.options import Options
from ldm_sg.folder import check, flat, settings_sha256
from ldm_sg.sampling.options import SampleOptions
from ldm_sg.verbs.pack import check as check_pack

SIZES = ("small", "gpu")
Section = dict[str, Any]


@dataclass
class CellConfig:
    """What a cell changes of the suite's own sections, under the names of the verbs."""

    pack: Section = field(default_factory=dict)  # src, and pack's flags; empty: annotate.shards names shards
    annotate: Section = field(default_factory=dict)  # config: a YAML of configs/annotate/, and keys of it
    train: Section = field(default_factory=dict)  # config: a YAML of configs/train/, and keys of it
    evaluate: Section = field(default_factory=dict)  # its flags; a list is swept over the samples of one run
    sample: Section = field(default_factory=dict)  # flags of the cell's grid
    paper: str = ""  # the paper's own figures, where the data is the same
    line: str = ""  # of the plots, on which the cell is a point; none: it is a level of its own


@dataclass
class SuiteConfig(CellConfig):
    name: str = ""  # of the YAML
    title: str = ""
    # data: places of images and weights, for ${data.NAME} below: data.NAME=PATH when it is started; judges: name -> one as
    # `evaluate --features` takes it, or the settings of a g, or null: left out; columns of the table: name -> key in `annotate`,
    # `train` or `set` (its manifest)
    data: Section = field(default_factory=dict)
    judges: Section = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    seeded: list[str] = field(default_factory=lambda: ["train.seed", "evaluate.seed"])  # what gets the seed
    plot: str | None = None  # a column, something swept, or images (seen in training): x of the plots
    cells: Section = field(default_factory=dict)  # null: one of the base that this suite does not have
    gpu: Section = field(default_factory=dict)  # what --size gpu changes

    def check(self) -> None:
        """Raises InputError for what is no suite."""
        self.cells = {name: cell for name, cell in self.cells.items() if cell is not None}
        if not self.cells:
            raise InputError("cells: there is none: a suite compares at least one")
        whole = all(type(seed) is int and seed >= 0 for seed in self.seeds)
        if not whole or not 0 < len(self.seeds) == len({*self.seeds}):
            raise InputError(f"seeds={self.seeds}: at least one, each once, whole numbers from 0")
        known = {each.name: str if each.name in ("paper", "line") else dict for each in fields(CellConfig)}
        for name, cell in self.cells.items():
            _check_name("cells", name)
            if not isinstance(cell, dict):
                raise InputError(f"cells.{name}={cell!r}: a mapping of verbs is expected; {{}} changes nothing")
            for key, value in cell.items():
                if key not in known:
                    raise InputError(f"cells.{name}.{key}: no such verb; {choices(key, known)}")
                check(value, known[key], f"cells.{name}.{key}")
        for name, judge in self.judges.items():
            _check_name("judges", name)
            if isinstance(judge, dict):
                load(FeaturesConfig, judge)
            elif judge is not None and not isinstance(judge, str):
                raise InputError(f"judges.{name}={judge!r}: a network's name, the settings of a g, or null")
        for key in self.seeded:
            if key.partition(".")[0] not in ("annotate", "train", "evaluate") or not key.partition(".")[2]:
                raise InputError(f"seeded: {key}: write it as train.seed, evaluate.seed or annotate.annotator.seed")
        need_choice("plot", self.plot, (None, "images", *self.columns, *(each.name for each in fields(Options))))


@dataclass(frozen=True)
class Evaluation:
    """One judgement of a run's samples; `swept`: what tells it from the others of its cell."""

    swept: dict[str, Any]
    options: Options


@dataclass(frozen=True)
class Cell:
    """One cell with one seed, ready for the verbs."""

    name: str
    seed: int
    packed: tuple[Path, Section] | None  # folder and arguments
    passed: Path | None  # where the pass over the images lies that several annotation sets are made of
    annotate: AnnotateConfig
    train: TrainConfig
    evaluations: list[Evaluation]
    sample: SampleOptions | None  # for the first seed
    paper: str
    line: str
    commands: list[str]

    def __str__(self) -> str:
        return f"{self.name} seed {self.seed}"

    @property
    def run(self) -> Path:
        return Path(self.train.out)

    @cached_property
    def identity(self) -> str:
        """All that decides its figures, as text."""
        made = [asdict(each.options) for each in self.evaluations]
        whole = {
            "pack": self.packed,
            "annotate": to_mapping(self.annotate),
            "train": to_mapping(self.train),
            "made": made,
        }
        return json.dumps(whole | {"sample": self.sample and asdict(self.sample)}, sort_keys=True, default=str)


def read_suite(name: str, overrides: list[str] | None = None, size: str = "small") -> SuiteConfig:
    """`name`: of configs/reproduce/, or a file. InputError for what is no suite."""
    need_choice("size", size, SIZES)
    shipped = ROOT / "configs" / "reproduce"
    path = Path(name) if name.endswith((".yaml", ".yml")) else shipped / f"{name}.yaml"
    if not path.is_file() and path.parent == shipped:
        raise InputError(f"suite {name!r}; {choices(name, [file.stem for file in shipped.glob('*.yaml')])}")
    try:
        known, suite = load(SuiteConfig, path).data, load(SuiteConfig, path, overrides)
        if size == "gpu":
            suite = load(SuiteConfig, path, [*assignments(suite.gpu), *(overrides or [])])
    except InputError as err:
        raise InputError(str(err) if str(path) in str(err) else f"{path}: {err}") from err
    suite.name = path.stem
    for place in suite.data:
        if place not in known:
            raise InputError(f"data.{place}: {path} has no such place; {choices(place, known)}")
    return suite


def assignments(tree: Section) -> list[str]:
    """A mapping -> key=value words of a command line."""
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in flat(tree).items()]


def plan(suite: SuiteConfig, out: Path) -> list[Cell]:
    """All cells, first those of the first seed. What two of them have in common (shards, pass of g, annotation set, run) is one
    folder, called by a digest of what decides it, and so in all suites of `out`. InputError for a cell that no verb would take."""
    cells = []
    for seed, name in itertools.product(suite.seeds, suite.cells):
        try:
            cells.append(_cell(suite, name, seed, out))
        except (InputError, TypeError) as err:  # a word where a number is due
            raise InputError(f"{suite.name}: cells.{name}: {err}") from err
    sets = {(cell.passed, cell.annotate.out) for cell in cells}
    alone = {passed for passed, n in Counter(passed for passed, _ in sets).items() if n == 1}
    return [replace(cell, passed=None) if cell.passed in alone else cell for cell in cells]


def _cell(suite: SuiteConfig, name: str, seed: int, out: Path) -> Cell:
    own = OmegaConf.create({key.name: getattr(suite, key.name) for key in fields(CellConfig)})
    own = OmegaConf.merge(own, suite.cells[name])
    for key in suite.seeded:
        OmegaConf.update(own, key, seed, force_add=True)
    given: Any = OmegaConf.to_container(own)
    packed, shards, commands = None, given["annotate"].get("shards"), []
    if given["pack"]:
        _check_given("pack", given["pack"], PackOptions, {"dst"})
        packed = _place(out, "shards", given["pack"]), given["pack"]
        check_pack(PackOptions(**{"src": ""} | given["pack"], dst=packed[0]))
        shards = f"{packed[0]}/*.tar"
        commands.append(_flags("pack", [str(given["pack"].get("src")), str(packed[0])], given["pack"], "src"))
    if not shards:
        raise InputError("neither pack.src nor annotate.shards: give the images")
    annotation = _place(out, "annotations", [given["pack"] or shards, given["annotate"]])
    words = _words("annotate", given["annotate"] | {"shards": shards, "out": str(annotation)})
    annotate = load(AnnotateConfig, *words)
    decides = flat(to_mapping(annotate))
    for key in ("out", *late(annotate.annotator)):
        del decides[key]
    passed = _place(out, "passes", decides)
    commands.append(shlex.join(["ldm-sg", "annotate", str(words[0]), *words[1]]))
    run = _place(out, "runs", [annotation.name, given["train"]])
    words = _words("train", given["train"] | {"annotation": str(annotation), "out": str(run)})
    train = load(TrainConfig, *words)
    known = flat({"annotate": to_mapping(annotate), "train": to_mapping(train)})
    for column, key in suite.columns.items():
        if not key.startswith("set.") and key not in known:
            raise InputError(f"columns.{column}: {key}; {choices(key, known)}")
    commands.append(shlex.join(["ldm-sg", "train", str(words[0]), *words[1]]))
    judges = [
        str(_judge_file(out, judge, of)) if isinstance(of, dict) else of for judge, of in suite.judges.items() if of
    ]
    evaluations = _evaluations(given["evaluate"], run, shards, ",".join(judges))
    for each in evaluations:
        told = {key: value for key, value in asdict(each.options).items() if value != getattr(Options, key, ...)}
        commands.append(_flags("evaluate", [str(run)], told, "source"))
    _check_given("sample", given["sample"], SampleOptions)
    sample = None
    if seed == suite.seeds[0]:
        sample = SampleOptions(**{"precision": "auto"} | given["sample"])
        sample.check()
        commands.append(_flags("sample", [str(run)], given["sample"]))
    return Cell(
        name, seed, packed, passed, annotate, train, evaluations, sample, given["paper"], given["line"], commands
    )


def _evaluations(given: Section, run: Path, shards: str, features: str) -> list[Evaluation]:
    """One for each combination of the values in lists. Other settings are other files."""
    _check_given("evaluate", given, Options, {"source", "out", "features", "device"})
    lists = {key: value for key, value in given.items() if isinstance(value, list)}
    for key, tried in lists.items():
        if not tried or any(value in tried[:i] for i, value in enumerate(tried)):
            raise InputError(f"evaluate.{key}={tried}: at least one, each once")
    swept = {key: tried for key, tried in lists.items() if key != "interval" or isinstance(tried[0], list)}
    found = []
    for values in itertools.product(*swept.values()):
        point = dict(zip(swept, values))
        told = {"reference": shards, "features": features or None} | given | point
        if told.get("checkpoint") is not None:
            told["checkpoint"] = str(told["checkpoint"])
        stem = "_".join(
            ["reproduce", *(f"{k}{v}".replace(" ", "") for k, v in point.items()), settings_sha256(told)[:8]]
        )
        options = Options(str(run), **told, out=str(run / "evaluations" / f"{stem}.json"))
        options.check()
        found.append(Evaluation(point, options))
    return found


def judge_files(suite: SuiteConfig, out: Path) -> dict[Path, str]:
    """Of the judges that are settings of a g, as `evaluate --features FILE` reads them."""
    return {_judge_file(out, name, of): yaml.safe_dump(of) for name, of in suite.judges.items() if isinstance(of, dict)}


def _judge_file(out: Path, name: str, settings: Section) -> Path:
    return _place(out, "judges", settings) / f"{name}.yaml"


def _place(out: Path, kind: str, decides: Any) -> Path:
    return out / kind / settings_sha256(decides)[:8]


def _check_name(of: str, name: Any) -> None:
    """InputError for what cannot be the name of a file, and an entry in a list with commas."""
    if not re.fullmatch(r"\w[\w+=.-]{0,99}", str(name)) or ".tmp-" in str(name):
        raise InputError(f"{of}.{name!s:.60}: a name of letters, digits, - and . is expected, 100 at most")


def _check_given(verb: str, given: Section, options: type, left_out: Collection[str] = ()) -> None:
    """InputError for a key that the verb has not, and words where a number is due."""
    known = {each.name: get_args(each.type) or (each.type,) for each in fields(options) if each.name not in left_out}
    for key, value in given.items():
        if key not in known:
            raise InputError(f"{verb}.{key}: unknown; {choices(key, known)}")
        kinds = {*known[key]} - {type(None)}
        if kinds <= {int, float, bool}:
            for each in value if isinstance(value, list) else [value]:
                check(each, (*known[key], *({int} if float in kinds else ())), f"{verb}.{key}")


def _words(verb: str, given: Section) -> tuple[str, list[str]]:
    """The config and the overrides of a verb's command."""
    if not isinstance(given.get("config"), str):
        raise InputError(f"{verb}.config: none: give a YAML of configs/{verb}/")
    return given["config"], assignments({key: value for key, value in given.items() if key != "config"})


def _flags(verb: str, words: list[str], given: Section, named: str = "") -> str:
    """The command with a flag each value that is not null, but the one `named` among the words."""
    for key, value in given.items():
        if key != named and value is not None and value is not False:
            joined = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{key.replace('_', '-')}"] + [joined] * (value is not True)
    return shlex.join(["ldm-sg", verb, *words])
