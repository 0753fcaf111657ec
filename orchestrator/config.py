"""One strict YAML file becomes one frozen `JobConfig`.

Knows the job file's keys and what each may hold; imports neither torch nor Ray. Precedence is
defaults, then the file, then the command line. Nothing changes a config after it is made.
"""

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from orchestrator.places import is_uri, mirror_dir

Source = str | tuple[str, ...]
# Keys in which trials over one base can differ, but for those of the passes that they share.
_OF_THE_ADAPTER = ("lora.", "training.")
_OF_THE_PASS = ("training.tokens_per_pass", "training.gradient_checkpointing")


def _one_or_many(value: Any) -> Any:
    """Accept one text or a list of texts."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise ValueError("give a path or hub id, or a list of them")


def _auto_or_positive_int(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError("give 'auto' or a whole number above 0")


def _auto_or_bool(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("give 'auto', true or false")


def _target_modules(value: Any) -> Any:
    if value == "all-linear":
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise ValueError("give 'all-linear' or a list of module names such as [q_proj, v_proj]")


def _validation(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("give a share such as 0.05, a path or hub id, or null")
    if value is None or value == 0:
        return None
    if isinstance(value, float) and 0 < value < 1:
        return value
    if isinstance(value, (int, float)):
        raise ValueError("a share of the training rows lies between 0 and 1")
    try:
        return _one_or_many(value)
    except ValueError:
        raise ValueError("give a share such as 0.05, a path or hub id, or null") from None


def _workers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        if (
            len(value) == 2
            and all(type(v) is int and v > 0 for v in value)
            and value[0] <= value[1]
        ):
            return tuple(value)
        raise ValueError("a range is [min, max], two whole numbers with 1 <= min <= max")
    try:
        return _auto_or_positive_int(value)
    except ValueError:
        raise ValueError("give 'auto', a whole number above 0, or [min, max]") from None


def _auto_or_share(value: Any) -> Any:
    if value == "auto" or (
        isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
    ):
        return value
    raise ValueError(
        "give 'auto' or a number of GPUs from 0 to 1: a worker trains on one; take more workers"
    )


_BESIDE_RUNS = ("mlflow.db", "mlartifacts")


def _file_name(value: str) -> str:
    if value in {".", ".."} or "/" in value or "\\" in value or not value.strip():
        raise ValueError("the name becomes a folder under output_dir, so it holds no slash")
    if not value.isprintable():
        raise ValueError("the name becomes a folder under output_dir: no line breaks or the like")
    if value.startswith(".") or value in _BESIDE_RUNS:
        raise ValueError(f"the folder {value} under output_dir is kept for other things")
    return value


def _model_name(value: str) -> str:
    if not value.strip() or "/" in value or ":" in value:
        raise ValueError("MLflow names models without / and :, such as support-bot")
    return value


_STORES = ("s3", "gs", "gcs")


def _output_dir(value: str) -> str:
    if not is_uri(value):
        return value
    parts = urlsplit(value)
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return unquote(parts.path)
    if parts.scheme not in _STORES or not parts.netloc.rpartition("@")[2]:
        raise ValueError(
            "give a folder that all nodes share, or a URI of an object store such as "
            f"s3://bucket/runs ({', '.join(_STORES)})"
        )
    return value


PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class ModelConfig(_Section):
    """Which base model is fine-tuned."""

    base: Annotated[str, Field(min_length=1)]
    """A hub id, a folder in the Hugging Face layout, or a .gguf file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; null takes the default branch."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Off unless you have read that code."""


class QuantizationConfig(_Section):
    """How the frozen base is stored."""

    type: Literal["nf4", "fp4", "none"] = "nf4"
    """4-bit data type of the base's linear layers; `none` keeps them in the compute dtype."""
    double_quant: bool = True
    """Quantize the quantization constants too (QLoRA paper, section 3)."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of the matrix products; `auto` takes bfloat16 where the device has it."""


class LoraConfig(_Section):
    """The adapter."""

    rank: PositiveInt = 16
    """Width of the two matrices beside each adapted layer."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """The adapter's output is scaled by alpha / rank (alpha / sqrt(rank) with rslora)."""
    dropout: Share = 0.0
    """Probability that an input element of the adapter is zeroed while training."""
    target_modules: Annotated[
        Literal["all-linear"] | tuple[str, ...], BeforeValidator(_target_modules)
    ] = "all-linear"
    """Linear layers that get an adapter, by name; `all-linear`: all but the output head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), so that a high rank learns as fast as a low one."""


class DataConfig(_Section):
    """What is trained on."""

    train: Annotated[Source, BeforeValidator(_one_or_many)]
    """File(s) of jsonl, json, csv or parquet, a folder of them, or a hub id: owner/name,
    owner/name:split or owner/name:config:split."""
    validation: Annotated[float | Source | None, BeforeValidator(_validation)] = 0.05
    """A share of the training rows, a source of its own, or null for none."""
    format: Literal[
        "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "question_answer", "text"
    ] = "auto"
    """What the columns mean; `auto` chooses by their names."""
    columns: dict[str, str] = {}
    """Maps a format's column to the data's own name, such as {question: Q, answer: A}."""
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Tokens an example may have."""
    train_on: Literal["completion", "all"] = "completion"
    """Loss on the assistant's turns, or on every token."""
    too_long: Literal["cut", "drop"] = "cut"
    """An example over max_length loses its prompt's oldest tokens, or is left out."""
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    """Whether a row that does not fit the format ends the job, or is counted and left out."""


class TrainingConfig(_Section):
    """The optimization."""

    epochs: Annotated[float, Field(gt=0)] = 3
    """Passes over the training examples; a part of one is allowed."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: PositiveInt = 16
    """Sequences per optimizer step, over all workers."""
    learning_rate: Annotated[float, Field(gt=0)] = 2.0e-4
    """The rate after warm-up, from which scheduler goes on."""
    scheduler: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up; linear and cosine end at 0."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises to learning_rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled, as in AdamW: each step shrinks the adapter by learning_rate times this."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 0.3
    """Gradients are scaled down to this global norm; null switches clipping off."""
    optimizer: Literal["auto", "adamw", "paged_adamw", "paged_adamw_8bit"] = "auto"
    """`auto` takes paged AdamW on CUDA, torch's AdamW on the CPU and for trials that share a base:
    adapters come and go there, and bitsandbytes never frees what it has paged."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides the adapter's first weights, the order of the data and dropout."""
    tokens_per_pass: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_positive_int)] = (
        "auto"
    )
    """Tokens in one forward pass. Changes speed and memory, never the result."""
    gradient_checkpointing: Annotated[Literal["auto"] | bool, BeforeValidator(_auto_or_bool)] = (
        "auto"
    )
    """Keep only each layer's input and compute the rest again in the backward pass."""

    @field_validator("warmup_steps")
    @classmethod
    def _ends_in_time(cls, value: int, others: ValidationInfo) -> int:
        steps = others.data.get("max_steps")
        if steps is not None and value > steps:
            raise ValueError(f"it is over training.max_steps ({steps})")
        return value


class EvaluationConfig(_Section):
    """What is measured on the validation set."""

    every: PositiveInt = 50
    """Steps between evaluations; there is always one before the first step, one after the last."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Prompts of the validation set that are answered before and after training."""


class CheckpointConfig(_Section):
    """What survives a kill."""

    every: PositiveInt = 50
    """Steps between checkpoints."""
    keep: PositiveInt = 2
    """Newest checkpoints kept, beside the best by eval loss."""


class ClusterConfig(_Section):
    """Where the job runs."""

    address: str = "auto"
    """A Ray address; `auto` joins the cluster this machine belongs to, or starts Ray here; `local`
    starts Ray here in any case."""
    workers: Annotated[Literal["auto"] | int | tuple[int, int], BeforeValidator(_workers)] = "auto"
    """One worker per GPU, on our own CPUs one, and one per trial of a sweep at a time; a number; or
    [min, max] for an elastic run."""
    gpus_per_worker: Annotated[Literal["auto"] | float, BeforeValidator(_auto_or_share)] = "auto"
    """1, a share such as 0.5 where workers divide a GPU, or 0 to train on the CPU; `auto`: 1 where
    there are GPUs."""
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    """CPUs that Ray gives each worker."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures after which the run ends with exit status 1."""
    collective_timeout: Annotated[float, Field(ge=1)] = 600
    """Seconds of silence after which a worker counts as dead and the run starts again. Workers that
    train trials of their own wait for no other, and none notices that one of them hangs."""


class TrackingConfig(_Section):
    """Where MLflow is."""

    uri: Annotated[str | None, Field(repr=False)] = None
    """An MLflow tracking URI; null keeps a SQLite store under output_dir, or in this machine's
    copy of it where that is a URI."""
    experiment: Annotated[str, Field(min_length=1)] = "default"
    """The MLflow experiment that the run belongs to; made where it is not there."""
    registered_model: Annotated[str, AfterValidator(_model_name)] | None = None
    """Register the adapter under this name; alias `champion` marks the best by eval loss."""


LISTED_KINDS = ("choice", "grid")
"""Of a search space: kinds that list their values; the others give the ends of a range."""
_KINDS = (*LISTED_KINDS, "uniform", "loguniform", "int", "logint")


def _points(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _search_space(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("give a mapping such as {lora.rank: {choice: [8, 16]}}")
    for key, domain in value.items():
        if not (isinstance(domain, dict) and len(domain) == 1 and next(iter(domain)) in _KINDS):
            raise ValueError(f"{key}: give one of {', '.join(_KINDS)}, such as {{choice: [8, 16]}}")
        kind, bounds = next(iter(domain.items()))
        if not isinstance(bounds, list) or not bounds:
            raise ValueError(f"{key}: {kind} takes a list of values")
        if kind not in LISTED_KINDS:
            numbers = all(isinstance(b, (int, float)) and not isinstance(b, bool) for b in bounds)
            if not (len(bounds) == 2 and numbers and bounds[0] < bounds[1]):
                raise ValueError(f"{key}: {kind} takes [low, high] with low below high")
            if kind.startswith("log") and bounds[0] <= 0:
                raise ValueError(f"{key}: {kind} takes a low above 0, for 0 has no logarithm")
    return {str(key): dict(domain) for key, domain in value.items()}


class SweepConfig(_Section):
    """The search; `finetune` leaves it alone."""

    trials: PositiveInt = 16
    """How many values of search_space are tried; a grid must have no more points."""
    search_space: Annotated[dict[str, dict[str, list[Any]]], BeforeValidator(_search_space)] = {}
    """Keys of model, quantization, lora, data and training, each with choice or grid and a list of
    values, or with uniform, loguniform, int or logint and [low, high]; both ends belong to it."""
    points: Annotated[tuple[dict[str, Any], ...], BeforeValidator(_points)] = ()
    """Trials to begin with: a value for each key of search_space."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """Who proposes values: Optuna, learning from the trials before; chance; or every combination of
    listed values once."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """`asha` ends the worse trials at their evaluations; `pbt` lets them go on from a better one's
    checkpoint with another learning rate; `none` trains all to their end."""
    metric: Literal["eval_loss", "perplexity", "train_loss", "tokens_per_second"] = "eval_loss"
    """What trials are compared by, as of their last evaluation."""
    mode: Literal["min", "max"] = "min"
    """Whether a small or a large metric is better; large tokens_per_second are, unless said."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Decides what the searcher proposes; each trial's own seed is training.seed."""
    time_budget: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which no trial goes on."""
    placement: Literal["auto", "shared", "isolated"] = "auto"
    """Trials as tenants of each worker's base, or each in a run of its own."""
    concurrent: Annotated[Literal["auto"] | int, BeforeValidator(_auto_or_positive_int)] = "auto"
    """Trials at a time."""

    @model_validator(mode="before")
    @classmethod
    def _depending_defaults(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        if content.get("metric") == "tokens_per_second":
            content = {"mode": "max", **content}
        if content.get("scheduler") == "pbt":
            content = {"searcher": "random", **content}
        return content

    @property
    def can_share(self) -> bool:
        """Whether trials may be tenants of one base: all that is searched is the adapter's own."""
        return all(
            key.startswith(_OF_THE_ADAPTER) and key not in _OF_THE_PASS for key in self.search_space
        )

    @property
    def shared(self) -> bool:
        """Whether trials are tenants of one base."""
        return self.placement != "isolated" and self.can_share


class JobConfig(_Section):
    """A whole job file, resolved."""

    name: Annotated[str, Field(min_length=1), AfterValidator(_file_name)]
    """Identity: the same name in the same output_dir continues."""
    output_dir: Annotated[str, Field(min_length=1, repr=False), AfterValidator(_output_dir)] = (
        "runs"
    )
    """A folder that all nodes share, or a URI such as s3://bucket/runs."""
    model: ModelConfig
    quantization: QuantizationConfig = QuantizationConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: SweepConfig | None = None

    @property
    def local_dir(self) -> Path:
        """The folder output_dir; this machine's copy of it where that is a URI."""
        if is_uri(self.output_dir):
            return mirror_dir(self.output_dir)
        return Path(self.output_dir).expanduser()

    @property
    def run_dir(self) -> Path:
        """The run's folder on this machine, `output_dir/name`."""
        return self.local_dir / self.name
