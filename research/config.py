"""The experiment as frozen dataclasses: every knob with its unit, its default and its check.

Each dataclass checks the types and values of its own fields when it is made. So a mistake is found in one place with
one message, whether it came from a config file, from the command line or from a run's config.json.
"""

import math
import re
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import PurePosixPath
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from research.errors import UserError

_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "a text", NoneType: "none"}

field_types = cache(get_type_hints)
"""Map each field of a config dataclass to its type: `field_types(MeshConfig)["data"]` is `int`."""


def type_name(annotation: Any) -> str:
    """Return a field's type in words, as the end of "give ..."."""
    if get_origin(annotation) is tuple:
        return f"a tuple, each item {type_name(get_args(annotation)[0])}"
    if isinstance(annotation, UnionType):
        return " or ".join(map(type_name, get_args(annotation)))
    return _TYPE_NAMES.get(annotation) or f"a {annotation.__name__}"


def _conform(value: Any, annotation: Any) -> Any:
    """Return `value` as `annotation` (an integer may stand for a number, a list for a tuple), or raise TypeError."""
    if get_origin(annotation) is tuple and isinstance(value, list | tuple):
        return tuple(_conform(item, get_args(annotation)[0]) for item in value)
    if annotation is float and type(value) is int:
        return float(value)
    allowed = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if type(value) not in allowed:  # not isinstance: True is no integer
        raise TypeError
    return value


def check_types(config: Any, section: str) -> None:
    """Raise UserError for the first field of `config` of a wrong type or not finite; `section` is like "mesh."."""
    for name, annotation in field_types(type(config)).items():
        value = getattr(config, name)
        try:
            conforming = _conform(value, annotation)
        except TypeError:
            raise UserError(f"{section}{name}={value!r:.80}: give {type_name(annotation)}") from None
        finite = not isinstance(conforming, float) or math.isfinite(conforming)
        require(finite, f"{section}{name}={value!r}: give a finite number")
        object.__setattr__(config, name, conforming)  # the way of frozen dataclasses to set a field while being made


def require(condition: bool, message: str) -> None:
    """Raise UserError with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the device mesh; at most one may be -1 = what is left of the devices.

    The first axis varies slowest over the devices, so that it may be the slow network between machines.
    """

    replica: int = 1
    """Like data: groups of devices that exchange nothing but gradients, once a micro-batch."""
    stage: int = 1
    """Stages of a pipeline: each holds some of the layers, and pieces of a micro-batch pass through them."""
    data: int = 1
    """Replicas that each see other examples."""
    fsdp: int = 1
    """Like data, and the parameters are split as well."""
    context: int = 1
    """Ways in which the positions of a text are split, for long ones."""
    expert: int = 1
    """Like data, and the experts of a mixture are split, each expert whole."""
    tensor: int = 1
    """Ways in which every weight matrix is split (Megatron layout); between the products, positions are."""

    def __post_init__(self) -> None:
        check_types(self, "mesh.")
        sizes = {axis.name: getattr(self, axis.name) for axis in fields(self)}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"mesh.{name}={size}: give a size of at least 1, or -1 for what is left")
        require(list(sizes.values()).count(-1) <= 1, f"mesh {sizes}: only one size may be -1")


def require_run_name(run: str) -> None:
    """Raise UserError unless `run` is empty or names a folder below runs/."""
    path = PurePosixPath(run)
    require(
        not (path.is_absolute() or ".." in path.parts or "\\" in run or (run and not path.name)),
        f"run={run!r}: give the name of a folder below runs/",
    )


ESTIMATORS = ("identity", "clipped")
ANNEALING = ("none", "parq", "relax")
DTYPES = ("float32", "bfloat16")
BACKWARD = ("float", "int8")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which number format the tensors get whose path matches.

    Paths look like "layers/attention/q_dnh"; `match` is a regular expression for the whole path; the first rule
    that matches wins; a rule that matches nothing is an error.
    """

    match: str
    """Regular expression for the whole path of a parameter."""
    weight: str = "fp32"
    """Grid of the weight: fp32, bf16, fp16, fp8_e4m3, fp8_e5m2, int8, int4, int3, int2, ternary, q4_0 or q4_1."""
    earlier: tuple[str, ...] = ()
    """Grids before that of weight, each with the optimizer step that ends it: int8:100, int4:200."""
    granularity: str = "channel"
    """What shares one scale: tensor, channel (one per output channel) or group:32 (along the contraction axis)."""
    scale: str = ""
    """Which numbers a scale may be: fp16, bf16 or pow2 (a power of two); empty: fp16, and pow2 for fp8 grids."""
    estimator: str = "identity"
    """How the gradient reaches the latent: identity, or clipped (none for weights beyond the grid)."""
    learn_scale: bool = False
    """Whether scales are trained (LSQ) instead of taken from the weights at every step."""
    recalibrate_every: int = 1
    """Optimizer steps between calibrations of the scale, which is kept in between; 1: at every step."""
    hysteresis: float = 0.0
    """Relative change that a calibration must exceed for the scale to change; 0: it always does."""
    begin_step: int = 0
    """Optimizer step at which the tensor begins to leave its float values."""
    end_step: int = 0
    """Optimizer step from which on it is on its grid; 0: from the start."""
    anneal: str = "none"
    """Between the two: none (float until end_step), parq or relax (towards the grid by degrees)."""
    latent: str = "float32"
    """Dtype that latents are kept in: float32, or bfloat16 by stochastic rounding."""
    track_oscillation: bool = False
    """Whether it is counted how often each code jumps to and fro."""
    freeze_above: float = 0.0
    """Oscillations per step above which a weight is frozen at its average code; 0: never. Counts them, too."""
    oscillation_momentum: float = 0.01
    """Weight of the newest step in the averages that are counted."""
    activation: str = "none"
    """Grid of the activation that this weight multiplies: none, int8 (symmetric, dynamic, one scale per token),
    int8:group:32 (one per 32 consecutive inputs, as llama.cpp has it), or one scale for all, found before training and
    kept: int8:static:ema (average of the largest magnitudes) or int8:static:99.9 (percentile of the magnitudes)."""
    backward: str = "float"
    """Factors of the two backward products, where weight and activation are both int8: float, or int8 = the gradient
    is rounded at random, right on average, and both are products of integers."""
    axes: str = ""
    """Axis letters of the weight where its own model doesn't tell them, e.g. "io"."""
    contract: str = ""
    """Those of the letters that a product sums over, e.g. "i"."""

    def __post_init__(self) -> None:
        check_types(self, "quantization: Rule.")
        require(bool(self.match), "quantization: Rule.match is empty: give a regular expression for parameter paths")
        try:
            re.compile(self.match)
        except re.error as error:
            message = f"quantization: Rule.match={self.match!r} is not a regular expression: {error}"
            raise UserError(message) from None
        choices = ("estimator", ESTIMATORS), ("anneal", ANNEALING), ("latent", DTYPES), ("backward", BACKWARD)
        for name, allowed in choices:
            require(
                getattr(self, name) in allowed,
                f"quantization: Rule.{name}={getattr(self, name)!r}: give one of {', '.join(allowed)}",
            )
        require(
            all(re.fullmatch(r"\w+:[1-9]\d*", entry) for entry in self.earlier),
            f"quantization: Rule.earlier={self.earlier!r}: give grids with the step that ends each: int8:100, int4:200",
        )
        ends = [end for _, end in self.earlier_grids]
        require(
            ends == sorted(set(ends)), f"quantization: Rule.earlier={self.earlier!r}: give steps in increasing order"
        )
        every = self.recalibrate_every
        require(every >= 1, f"quantization: Rule.recalibrate_every={every}: give 1 (at every step) or more")
        require(0 <= self.hysteresis < 1, f"quantization: Rule.hysteresis={self.hysteresis}: give 0 (off) to below 1")
        for name in ("freeze_above", "oscillation_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, f"quantization: Rule.{name}={value}: give 0 to below 1")
        require(
            0 <= self.begin_step <= self.end_step,
            f"quantization: Rule.begin_step={self.begin_step}, end_step={self.end_step}: give 0 ≤ begin ≤ end",
        )
        require(
            self.anneal == "none" or self.begin_step < self.end_step,
            f"quantization: Rule.anneal={self.anneal!r} needs steps to do it in: give begin_step < end_step",
        )

    @property
    def counts_oscillation(self) -> bool:
        """Whether oscillation is counted, to be shown or to freeze."""
        return self.track_oscillation or self.freeze_above > 0

    @property
    def earlier_grids(self) -> tuple[tuple[str, int], ...]:
        """Name and end of each grid in `earlier`; the end is the first step that is not on it."""
        return tuple((name, int(end)) for name, end in (entry.split(":") for entry in self.earlier))


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the model learns: text in, one of a few labels out."""

    name: str = "sms_spam"
    """Registered task (sms_spam, trec), or own_data with a path."""
    path: str = ""
    """own_data: a .jsonl or .csv file."""
    text_column: str = "text"
    """own_data: column that holds the text."""
    label_column: str = "label"
    """own_data: column that holds the label."""
    prompt: str = ""
    """Text put around a message; {text} stands for it. Empty: the task's own prompt."""
    chat: bool = True
    """Whether the prompt goes through the foundation's chat template as a user's turn."""
    lengths: tuple[int, ...] = (40, 64, 96)
    """Sequence lengths in tokens that batches are padded to; longer examples are cut at the largest and counted."""
    train_examples: int = 0
    """Use only the first N training examples of the split; 0 = all."""
    validation_examples: int = 100
    """Use only the first N validation examples of the split; 0 = all."""
    test_examples: int = 200
    """Use only the first N test examples of the split; 0 = all."""

    def __post_init__(self) -> None:
        check_types(self, "task.")
        require(
            (self.name == "own_data") == bool(self.path),
            f"task.name={self.name!r} with task.path={self.path!r}: own_data needs a path, and only own_data reads one",
        )
        require(len(self.lengths) > 0, "task.lengths is empty: give at least one sequence length in tokens")
        require(
            list(self.lengths) == sorted(set(self.lengths)) and self.lengths[0] > 0,
            f"task.lengths={self.lengths}: give increasing positive numbers of tokens",
        )
        for name in ("train_examples", "validation_examples", "test_examples"):
            require(getattr(self, name) >= 0, f"task.{name}={getattr(self, name)}: give 0 (all) or more")
        require(not self.prompt or "{text}" in self.prompt, f"task.prompt={self.prompt!r}: it must contain {{text}}")


MOMENTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class FoldConfig:
    """How the foundation is rewritten before training: the same function in weights that quantize better."""

    rotate: bool = False
    """Whether residual stream and values are rotated, which spreads outlier channels over all (QuaRot's R1 and R2)."""
    seed: int = 0
    """Seed of the rotations."""
    smooth: float = 0.0
    """Share of the activations' outliers that moves into the weights (SmoothQuant's alpha, about 0.5); 0 = off."""
    calibration_examples: int = 64
    """Training examples whose activations smooth and static scales look at, evenly spread over the split."""

    def __post_init__(self) -> None:
        check_types(self, "fold.")
        require(0 <= self.seed < 2**32, f"fold.seed={self.seed}: give 0 to 2**32 - 1")
        require(0 <= self.smooth <= 1, f"fold.smooth={self.smooth}: give 0 (off) to 1")
        require(
            self.calibration_examples >= 1, f"fold.calibration_examples={self.calibration_examples}: give 1 or more"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay and clipping."""

    learning_rate: float = 1e-4
    """Peak of the schedule."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""
    warmup_steps: int = 15
    """Optimizer steps of linear warm-up. Half of the default steps: at full rate the first batches, most of them one
    class, teach that all are."""
    weight_decay: float = 0.01
    """Decoupled decay of the float32 latents; norms are not decayed."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    moments: str = "float32"
    """How both moments are kept between steps: float32, bfloat16 (the first; the second stays float32, as steps of
    1 - b2 would be lost), or int8 (eight-bit codes with a scale per block)."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    scale_learning_rate: float = 1e-3
    """Adam's learning rate for the base-2 logarithm of learned scales."""

    def __post_init__(self) -> None:
        check_types(self, "optimizer.")
        require(self.learning_rate > 0, f"optimizer.learning_rate={self.learning_rate}: give a positive number")
        require(
            self.scale_learning_rate > 0,
            f"optimizer.scale_learning_rate={self.scale_learning_rate}: give a positive number",
        )
        require(self.clip_norm > 0, f"optimizer.clip_norm={self.clip_norm}: give a positive number")
        require(self.warmup_steps >= 0, f"optimizer.warmup_steps={self.warmup_steps}: give 0 or more")
        require(self.weight_decay >= 0, f"optimizer.weight_decay={self.weight_decay}: give 0 or more")
        require(0 <= self.final_fraction <= 1, f"optimizer.final_fraction={self.final_fraction}: give 0 to 1")
        for name in ("b1", "b2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}={getattr(self, name)}: give 0 to below 1")
        require(self.epsilon > 0, f"optimizer.epsilon={self.epsilon}: give a positive number")
        require(self.moments in MOMENTS, f"optimizer.moments={self.moments!r}: give one of {MOMENTS}")


REMATERIALIZATION = ("none", "full", "dots")
INT8_KERNELS = ("xla", "pallas")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and in which arithmetic."""

    steps: int = 30
    """Optimizer steps."""
    batch_size: int = 16
    """Examples per optimizer step, over all devices."""
    accumulate: int = 4
    """Micro-batches that one optimizer step is split into, by length of the rows; each is padded on its own."""
    pack: bool = False
    """Whether short examples share rows of the largest of task.lengths; the loss of a step stays what it is."""
    compute_dtype: str = "float32"
    """Dtype of activations: float32 or bfloat16."""
    param_dtype: str = "float32"
    """Dtype of the on-grid parameters that the model uses: float32 or bfloat16."""
    rematerialize: str = "none"
    """What the backward pass computes anew: none, full (each layer) or dots (all but the products with weights)."""
    int8_kernel: str = "xla"
    """What multiplies int8 weights with int8 activations: xla, or pallas (a kernel for H100 and H200, the same bits;
    not measured on a GPU yet; on a CPU interpreted, which is for tests)."""
    unroll: int = 1
    """Layers per iteration of the scan: more compile time for more speed. With all of them text is generated from
    weights that each layer has for itself, which saves a copy of all for every token."""
    loss_chunk: int = 256
    """Answer positions whose logits exist at one time."""
    distill: float = 0.0
    """Share of the loss that is the divergence from the float foundation's predictions (forward KL); 0 = none."""
    router_balance: float = 0.01
    """Mixture of experts: weight of the loss that evens out how often experts are chosen; it is 1 where they are."""
    router_z: float = 0.001
    """Mixture of experts: weight of the loss that keeps the router's logits small."""
    expert_capacity: float = 0.0
    """Choices that an expert takes of a micro-batch, over its even share; the rest is dropped. 0 = all are taken."""
    zero: bool = False
    """Whether latents, moments and gradients are split over mesh.data, too (ZeRO); weights come back as codes."""
    max_nonfinite: int = 3
    """Skipped non-finite steps in a row after which the run stops."""
    seed: int = 0
    """Seed of the order of the data; what is rounded at random depends on the tensor and the step alone."""

    def __post_init__(self) -> None:
        check_types(self, "train.")
        for name in ("steps", "batch_size", "accumulate", "unroll", "loss_chunk", "max_nonfinite"):
            require(getattr(self, name) >= 1, f"train.{name}={getattr(self, name)}: give 1 or more")
        require(
            self.batch_size % self.accumulate == 0,
            f"train.batch_size={self.batch_size} is not a multiple of train.accumulate={self.accumulate}",
        )
        for name in ("router_balance", "router_z", "expert_capacity"):
            require(0 <= getattr(self, name) < float("inf"), f"train.{name}={getattr(self, name)}: give 0 or more")
        require(0 <= self.distill <= 1, f"train.distill={self.distill}: give 0 (the task alone) to 1")
        for name in ("compute_dtype", "param_dtype"):
            require(getattr(self, name) in DTYPES, f"train.{name}={getattr(self, name)!r}: give one of {DTYPES}")
        require(
            self.rematerialize in REMATERIALIZATION,
            f"train.rematerialize={self.rematerialize!r}: give one of {REMATERIALIZATION}",
        )
        require(self.int8_kernel in INT8_KERNELS, f"train.int8_kernel={self.int8_kernel!r}: give one of {INT8_KERNELS}")
        require(0 <= self.seed < 2**32, f"train.seed={self.seed}: give 0 to 2**32 - 1")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a model is scored."""

    batch_size: int = 16
    """Examples per forward."""
    every_steps: int = 0
    """Optimizer steps between validations; 0 = only at the end."""
    bootstrap_samples: int = 1000
    """Resamples behind each 95 % interval."""

    def __post_init__(self) -> None:
        check_types(self, "evaluation.")
        require(self.batch_size >= 1, f"evaluation.batch_size={self.batch_size}: give 1 or more")
        require(self.every_steps >= 0, f"evaluation.every_steps={self.every_steps}: give 0 or more")
        require(self.bootstrap_samples >= 1, f"evaluation.bootstrap_samples={self.bootstrap_samples}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept of a run."""

    every_steps: int = 0
    """Optimizer steps between checkpoints; 0 = only at the end."""
    keep: int = 2
    """Newest checkpoints kept; the best one on validation loss is kept besides."""
    copy_to: str = ""
    """URL of a folder in an object store (gs://…, s3://…): the run's folder is copied into it after each checkpoint
    and at the end; --resume fetches it where the run isn't."""

    def __post_init__(self) -> None:
        check_types(self, "checkpoint.")
        require(
            not self.copy_to or "://" in self.copy_to,
            f"checkpoint.copy_to={self.copy_to!r}: give a URL, as in gs://bucket/runs or s3://bucket/runs",
        )
        require(self.every_steps >= 0, f"checkpoint.every_steps={self.every_steps}: give 0 or more")
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    every_steps: int = 1
    """Optimizer steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Whether TensorBoard event files are written."""

    def __post_init__(self) -> None:
        check_types(self, "logging.")
        require(self.every_steps >= 1, f"logging.every_steps={self.every_steps}: give 1 or more")


KV_CACHES = ("float", "int8", "fp8_e4m3")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that a run depends on."""

    foundation: str = "smollm2-135m-instruct"
    """Registered name, local directory or file, or hf://organisation/name."""
    run: str = ""
    """Name of the run folder below runs/; empty: the config file's name."""
    task: TaskConfig = field(default_factory=TaskConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    quantization: tuple[Rule, ...] = ()
    """Rules, first match wins; no rule: the parameters stay float."""
    kv_cache: str = "float"
    """How attention keeps keys and values, in training as in generation: float, or int8 or fp8_e4m3 codes with one
    scale per token and head."""
    fold: FoldConfig = field(default_factory=FoldConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        require(bool(self.foundation), "foundation is empty: give a registered name, a path or hf://organisation/name")
        require(self.kv_cache in KV_CACHES, f"kv_cache={self.kv_cache!r}: give one of {KV_CACHES}")
        require_run_name(self.run)
