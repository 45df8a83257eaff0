"""What the Snakefile asks for: paths, stages, and the files that a rule reads."""

import functools
import json
import os
from operator import attrgetter
from pathlib import Path

from slmake.code_inputs import code, digest, rule_digest, snakefiles
from slmake.errors import PUBLIC_HALF
from slmake.params import RULES, Params, as_json
from slmake.params.constraint import file_of
from slmake.params.dataset_files import source_files
from slmake.sources.blob import account_here
from slmake.sources.fetching import files_of
from slmake.sources.local import row_files
from slmake.sources.schemes import parse
from slmake.user_files import with_what_they_read

LOCKS = ["envs/cpu.lock", "envs/cuda.lock"]
HARNESS = "envs/lm-eval.lock"  # its scores are another version's after a change, too
WITHOUT_PACKAGE = ("rehearse", "report", "publish")  # rules that cannot change a package
# Sections, or parameters of others, that a rule reads or names in what it writes, where it is not its own section alone.
SECTIONS = {
    "rehearse": [
        *("rehearse", "finetune", "merge", "quantize", "all.stages"),
        *("evaluate.constrain", "evaluate.metrics", "evaluate.max_samples", "evaluate.models", "evaluate.latency_rows"),
        *("evaluate.lm_eval", "evaluate.lm_eval_limit", "evaluate.parity_prompts", "evaluate.sampling"),
        "package.constrain",
        "gates",
    ],
    "adapter": ["adapter", "fetch_model.source"],  # the model that the adapter names may be another
    "merge": ["merge", "finetune"],  # method and 4-bit type, for merge.onto: dequantized
    "search": ["quantize", "evaluate", "gates"],
    "evaluate": [
        "evaluate",
        "merge",
        "finetune",
    ],  # merge.onto and the 4-bit type: which base an adapter of QLoRA is scored on
    "package": [name for name in Params.model_fields if name not in ("all", *WITHOUT_PACKAGE)],
    "report": ["report", "gates", "finetune", "adapter", "quantize"],
}
# Of the section evaluate, what the candidates of a quantization search are scored by.
SCORES_CANDIDATES = ("metrics", "max_new_tokens", "batch_size", "latency_rows", "bootstrap_samples", "seed")
FIGURES = [  # of the report: file, category, title
    ("overview.html", "1. Overview", "What was built from what"),
    ("scores.svg", "2. Quality", "Accuracy"),
    ("scores.html", "2. Quality", "All scores, parity and drops"),
    ("confusion.svg", "2. Quality", "Confusion matrices"),
    ("seeds.svg", "2. Quality", "Runs with other seeds"),
    ("seeds.html", "2. Quality", "Runs with other seeds, all scores"),
    ("gates.html", "2. Quality", "Gates"),
    ("wrong_answers.html", "2. Quality", "Wrong answers"),
    ("loss.svg", "3. Training", "Loss"),
    ("data.svg", "3. Training", "Lengths and labels"),
    ("rows.html", "3. Training", "Rows as the model sees them"),
    ("cost.html", "4. Cost", "Time and memory"),
    ("candidates.svg", "4. Cost", "Quantization candidates"),
    ("candidates.html", "4. Cost", "Quantization candidates, all figures"),
]


def when(condition: object, files: str | list[str]) -> list[str]:
    """Inputs that a rule has under a condition only: `files` as a list if it holds, else none."""
    if not condition:
        return []
    return [files] if isinstance(files, str) else list(files)


def _local(text: str) -> list[str]:
    """The path of a local source as a list; an empty one for a remote source."""
    source = parse(text)
    return when(not source.remote, source.text)


class Plan:
    """What params.yaml asks for, as paths."""

    def __init__(self, params: Params, snakefile: Path = Path("Snakefile")):
        self.params, self.stages, self.snakefile = params, params.stages, snakefile
        self.tuned = "build/merged" if "merge" in self.stages else "build/base"  # what is exported
        self.fetched_adapter = "merge" in self.stages and "finetune" not in self.stages
        self.adapter = "build/fetched-adapter" if self.fetched_adapter else "build/adapter"
        self.onnx = f"build/onnx-{params.quantize.precision}"
        self.shipped = "build/package" if "package" in self.stages else self.onnx  # what publish uploads
        self.model_source = _local(params.fetch_model.source)
        self.chat_template = when(params.fetch_model.chat_template, str(params.fetch_model.chat_template))
        self.adapter_source = _local(params.adapter.source) if self.fetched_adapter else []
        self.sources = [parse(text) for text in source_files(params.prepare).values()] if params.prepare else []
        self.data = [name for source in self.sources if not source.remote for name in row_files(source.path)]
        self.remote_data = any(source.remote for source in self.sources)
        self.published_metrics = when(params.gates.published, str(params.gates.published))
        self.seeds = when(params.report.seeds, str(params.report.seeds))
        self.signing_key = when(params.package.signing_key, str(params.package.signing_key))
        scoring = bool({"evaluate", "quantize"} & set(self.stages))
        metric_files = [metric.file for metric in params.evaluate.answer_metrics if scoring and metric.file]
        task_files = [entry for entry in params.evaluate.lm_eval if entry.endswith((".yaml", ".yml"))]
        harness = when(params.evaluate.lm_eval, HARNESS)
        self.task_files = when("evaluate" in self.stages, [*with_what_they_read(task_files), *harness])
        self.metric_files = with_what_they_read(metric_files)
        self.scored_constraint = file_of(params.evaluate.constrain) if "evaluate" in self.stages else []
        self.constraint = file_of(params.package.constrain) if "package" in self.stages else []
        self.search = params.quantize.search if "quantize" in self.stages else None
        self.locks = [*LOCKS, *when("evaluate" in self.stages, harness)]  # of the environment, whichever it is

    @functools.cached_property
    def candidates(self) -> list[str]:
        """Folders of the quantization search's candidates.

        Raises:
            UserError: none of the combinations is possible.
        """
        if not self.search:
            return []
        from slmake.export.proposals import count

        return [f"build/search/{number}" for number in range(count(self.params.quantize))]

    def batch_before(self, candidate: str) -> list[str]:
        """Folders of the candidates that must be measured before this one can be proposed."""
        if candidate == "merged":
            return []
        from slmake.export.proposals import batch_before

        return self.candidates[batch_before(self.params.quantize, int(candidate))]

    def candidate_section(self, candidate: str) -> str:
        """What a candidate is built again for, as text."""
        from slmake.export.proposals import depends_on

        scoring = {name: getattr(self.params.evaluate, name) for name in SCORES_CANDIDATES}
        return depends_on(self.params.quantize, candidate) + as_json(scoring) + self._image()

    @functools.cached_property
    def scored(self) -> dict[str, str]:
        """Folder of each model that evaluate scores, by the name of its argument."""
        folders = {
            "base": "build/base",
            "adapter": self.adapter * bool({"finetune", "merge"} & set(self.stages)),
            "merged": "build/merged" * ("merge" in self.stages),
            "onnx": self.onnx * ("quantize" in self.stages),
        }
        scored = {name: folders[name] for name in self.params.evaluate.models if folders[name]}
        if "adapter" in scored:
            scored["adapter-base"] = "build/base"
        return scored

    @property
    def account(self) -> str:
        """The storage account to publish to, which params.yaml may leave to the environment: another one has not got this release.

        Where the environment names none, that of the last release: nothing is published to nowhere.
        """
        if "publish" not in self.stages or not self.params.publish.url:
            return ""
        named = parse(self.params.publish.url, must_pin=False).account or account_here()
        try:
            return named or json.loads(Path("results/published.json").read_text(encoding="utf-8")).get("account", "")
        except (OSError, ValueError, AttributeError):
            return ""

    @property
    def online(self) -> list[str]:
        """Patterns of the commands that need the network."""
        tasks = when(self.params.evaluate.lm_eval, ["rehearse", "evaluate"])  # the harness fetches their datasets
        rules = ["fetch_model", "adapter", "publish", *when(self.remote_data, "prepare"), *tasks]
        return [f"-m scripts[.]{rule} " for rule in rules]

    @property
    def files(self) -> list[str]:
        """Files and folders that params.yaml names; a container must see them."""
        package = self.params.package
        return [
            *(*self.data, *self.model_source, *self.chat_template, *self.adapter_source, *self.published_metrics),
            *self.seeds,
            *(*package.license_files, *self.signing_key, *self.metric_files, *self.task_files),
            *(*self.scored_constraint, *self.constraint),
        ]

    @property
    def figures(self) -> list[tuple[str, str, str]]:
        """The report's figures: file, category, title."""
        shown = {"candidates": self.search, "seeds": self.seeds}
        return [figure for figure in FIGURES if shown.get(figure[0].partition(".")[0], True)]

    def missing(self) -> str | None:
        """The first file that params.yaml names and that cannot be used, as an error message.

        Snakemake by itself does not ask for a lost input while all outputs are there.
        """
        needed = {
            "params.yaml: fetch_model.source": self.model_source,
            "params.yaml: fetch_model.chat_template": self.chat_template,
            "params.yaml: adapter.source": self.adapter_source,
            "params.yaml: prepare.source": self.data,
            "params.yaml: evaluate.metrics": self.metric_files,
            "params.yaml: evaluate.constrain": self.scored_constraint,
            "params.yaml: evaluate.lm_eval": self.task_files,
            "params.yaml: package.constrain": self.constraint,
            "params.yaml: gates.published": when({"gates", "report"} & set(self.stages), self.published_metrics),
            "params.yaml: report.seeds": when("report" in self.stages, self.seeds),
            "params.yaml: package.license_files": when("package" in self.stages, self.params.package.license_files),
            "params.yaml: package.signing_key": when("package" in self.stages, self.signing_key),
            "environment": LOCKS,
        }
        for name, files in needed.items():
            for file in files:
                built = Path(os.path.relpath(file)).parts[:1] in (("build",), ("results",))
                own = Path(file).name == "metrics.json" or not name.endswith((".published", ".seeds"))
                if built and own:
                    return f"{name}: {file}: a build writes and deletes its files there. Copy it to another folder, and name that."
                if file.startswith("-"):
                    return f"{name}: {file}: a program would take it for an option. Rename the file."
                if "{" in file or "}" in file or ", " in file:
                    return f"{name}: {file}: Snakemake takes braces for a wildcard, and a comma before a space for the end of a name. Rename the file."
                folder = os.path.isdir(file)  # noqa: PTH112 (False, where Path.is_dir raises, for a name that is too long)
                if not (os.path.isfile(file) or (folder and file in [*self.model_source, *self.adapter_source])):  # noqa: PTH113
                    kind = "a folder, not a file" if folder else "no such file"
                    return f"{name}: {file}: {kind}. Correct the name, or bring the file back. {PUBLIC_HALF * (files == self.signing_key)}".rstrip()
        return None

    def section(self, rule: str) -> str:
        """A rule's sections of params.yaml as text: it runs again when they differ."""
        values = {name: attrgetter(name)(self.params) for name in SECTIONS.get(rule, [rule])}
        texts = [as_json({name: value} if "." in name else value) for name, value in values.items()]
        return "".join(texts) + self._image()

    def _image(self) -> str:
        """The container image as text; another one is another environment."""
        image = self.params.all.container
        return json.dumps({"container": image}) if image else ""

    def digest(self, rule: str) -> str:
        """Digest of what makes a rule's outputs beside parameters and other rules' outputs.

        Its text in the Snakefile; and the files that it reads and no rule makes: code and locks, and what params.yaml names, byte for byte.
        """
        given = [file.as_posix() for name in self.given(rule) for file in files_of(Path(name)).values()]
        return rule_digest(rule, self.snakefile) + digest([*code(rule), *LOCKS]) + digest(given, exact=True)

    def given(self, rule: str) -> list[str]:
        """Files that a rule reads byte for byte and no rule makes."""
        return [*(self.materials() if rule == "package" else []), *self.named(rule)]

    def named(self, rule: str) -> list[str]:
        """Files that params.yaml names and that are inputs of a rule."""
        files = {
            "fetch_model": [*self.model_source, *self.chat_template],
            "adapter": self.adapter_source,
            "prepare": self.data,
            "rehearse": [
                *(*self.metric_files, *self.scored_constraint, *self.task_files, *self.constraint),
                *when("gates" in self.stages, self.published_metrics),
            ],
            "candidate": self.metric_files,
            "evaluate": [*self.metric_files, *self.scored_constraint, *self.task_files],
            "gates": self.published_metrics,
            "report": [*self.published_metrics, *self.seeds],
            "package": [*self.params.package.license_files, *self.constraint, *self.signing_key],
        }
        return files.get(rule, [])

    def built_from(self, rule: str, output: str) -> set[str]:
        """The params by which Snakemake knows that an output is of these parameters and files, as the Snakefile gives them to it."""
        section = self.candidate_section(Path(output).name) if rule == "candidate" else self.section(rule)
        return {section, self.digest(rule)}

    @property
    def rules(self) -> list[str]:
        """The rules that this build runs, in order of execution."""
        chosen = {"fetch_model", "prepare", *self.stages}
        chosen |= set(when(self.fetched_adapter, "adapter")) | set(when(self.search, ["candidate", "search"]))
        return [rule for rule in RULES if rule in chosen]

    @property
    def timed(self) -> list[str]:
        """Names of Snakemake's benchmark files of this build: its rules, and of a search each candidate and the merged model."""
        rules = [rule for rule in self.rules if rule != "candidate"]
        measured = [Path(folder).name for folder in self.candidates]
        return [*rules, *(f"candidate-{name}" for name in when(self.search, ["merged", *measured]))]

    def materials(self) -> list[str]:
        """Files that the provenance of a package names: what can change the package, except models and results."""
        files = {file for rule in self.rules if rule not in WITHOUT_PACKAGE for file in code(rule)}
        named = [
            *self.data,
            *self.chat_template,
            *self.metric_files,
            *self.scored_constraint,
            *self.task_files,
            *self.constraint,
            *self.published_metrics,
            *map(str, self.params.package.license_files),
            *map(os.path.relpath, snakefiles(self.snakefile)),
            *sorted(files),
            *LOCKS,
            *sorted(path.as_posix() for path in Path("containers").glob("Containerfile*")),
        ]
        return [Path(name).as_posix() for name in named]  # ./data/x is data/x, as in the provenance
