"""What `scripts/compare.py` compares: ways to quantize one foundation, on one corpus or task, with one budget."""

import re
from dataclasses import dataclass, field, replace

from research.config import (
    KV_CACHES,
    Experiment,
    FoldConfig,
    MeshConfig,
    OptimizerConfig,
    Rule,
    TaskConfig,
    TrainConfig,
    check_types,
    require,
    require_run_name,
)

DATA = ("corpus", "task")
NO_FOLD = FoldConfig()
TREATMENTS = ("ptq", "qat", "qat+distillation")


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Whole documents: some to train on, others to be judged on."""

    name: str = "multi_lexsum"
    """Registered corpus (multi_lexsum), or own_text with a path."""
    path: str = ""
    """own_text: a .jsonl file with a field "text", or a folder of .txt files; a line or a file is a document."""
    window: int = 256
    """Tokens of a training row; a held-out document is judged on its first so many."""
    validation_documents: int = 8
    """Held-out documents that --sensitivity looks at."""
    test_documents: int = 32
    """Held-out documents behind the figures of the table."""

    def __post_init__(self) -> None:
        check_types(self, "corpus.")
        require(
            (self.name == "own_text") == bool(self.path),
            f"corpus.name={self.name!r} with corpus.path={self.path!r}: own_text needs a path, and only own_text reads"
            " one",
        )
        require(self.window >= 2, f"corpus.window={self.window}: give at least 2 tokens, the first is not predicted")
        for name in ("validation_documents", "test_documents"):
            require(getattr(self, name) >= 2, f"corpus.{name}={getattr(self, name)}: give 2 or more, for an interval")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantize, by name."""

    name: str
    quantization: tuple[Rule, ...]
    """Rules, first match wins."""
    fold: FoldConfig = field(default_factory=FoldConfig)
    """What happens to the foundation before it is rounded or trained; it is judged against the untouched one."""

    def __post_init__(self) -> None:
        check_types(self, "schemes: Scheme.")
        require(
            bool(re.fullmatch(r"\w[\w .+=-]*", self.name)),
            f"schemes: Scheme.name={self.name!r}: use letters, digits, spaces and . _ + = -",
        )
        require(bool(self.quantization), f"schemes: {self.name!r} has no rule; the float model is compared anyway")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that a comparison depends on.

    The float foundation is always in it. Each scheme is tried in each of `treatments`; all that are trained see the
    same rows in the same order for the same number of steps.
    """

    foundation: str = "smollm2-135m-instruct"
    """Registered name, local directory or file, or hf://organisation/name."""
    run: str = ""
    """Name of the folder below runs/; empty: the config file's name."""
    schemes: tuple[Scheme, ...]
    """Ways to quantize."""
    treatments: tuple[str, ...] = TREATMENTS
    """What is done with each: ptq (round the foundation), qat (train on the task loss), qat+distillation."""
    kv_cache: str = "float"
    """How attention keeps keys and values in the arms of all schemes: float, or int8 or fp8_e4m3 codes."""
    control: bool = True
    """Whether the float model is fine-tuned on the same data, too: what training gains without any quantization."""
    data: str = "corpus"
    """What models are trained and judged on: corpus (documents) or task (labelled examples)."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """Budget and arithmetic; train.distill is for qat+distillation alone."""
    score_batch: int = 8
    """Documents, or examples of a task, per forward when judging."""
    calibration_rows: int = 64
    """Training documents or examples whose activations static scales look at, evenly spread over all."""
    bootstrap_samples: int = 2000
    """Resamples of documents or examples behind each 95 % interval."""

    def __post_init__(self) -> None:
        check_types(self, "")
        require(bool(self.foundation), "foundation is empty: give a registered name, a path or hf://organisation/name")
        require_run_name(self.run)
        require(self.kv_cache in KV_CACHES, f"kv_cache={self.kv_cache!r}: give one of {KV_CACHES}")
        require(bool(self.schemes), "schemes is empty: give at least one Scheme")
        names = [scheme.name for scheme in self.schemes]
        require(len(set(names)) == len(names), f"schemes {names}: give each a name of its own")
        unknown = [name for name in self.treatments if name not in TREATMENTS]
        require(
            bool(self.treatments) and not unknown,
            f"treatments={self.treatments}: give some of {', '.join(TREATMENTS)}",
        )
        require(
            ("qat+distillation" in self.treatments) == (self.train.distill > 0),
            f"train.distill={self.train.distill} with treatments={self.treatments}: qat+distillation needs a share of"
            " the loss, e.g. 1.0, and nothing else uses it",
        )
        require(self.data in DATA, f"data={self.data!r}: give one of {DATA}")
        for name, default in (("corpus", CorpusConfig()), ("task", TaskConfig())):
            require(
                name == self.data or getattr(self, name) == default,
                f"{name} is set, but has no effect with data={self.data!r}: give data={name!r}, or leave it out",
            )
        for name in ("score_batch", "calibration_rows", "bootstrap_samples"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: give 1 or more")

    def experiment(self, rules: tuple[Rule, ...] = (), fold: FoldConfig = NO_FOLD, *, distill: bool) -> Experiment:
        """Return what one arm is trained as, a float model without rules; its task is not used."""
        return Experiment(
            foundation=self.foundation,
            mesh=self.mesh,
            quantization=rules,
            kv_cache=self.kv_cache if rules else "float",
            fold=fold,
            optimizer=self.optimizer,
            train=replace(self.train, distill=self.train.distill if distill else 0.0),
        )
