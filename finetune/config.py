"""What a user can set for `finetune`: frozen dataclasses, checked when made, in the shape Lightning users know:
trainer, model, data.

No heavy import here: help and mistakes answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from curate.errors import ConfigError
from curate.keys import flags_of

PROJECTIONS = ("q", "k", "v", "out", "fc", "proj", "projection", "conv", "pool")
TOWERS = ("image", "text")
SHARDED = "fsdp2"  # trainer.strategy
TORCHVISION = "torchvision:"  # before the name of one of its datasets
WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")  # of files whose architecture is read from their shapes
Precision = Literal["auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "16-true", "64-true"]
# Arguments of lightning.Trainer that are no keys here: what stands in their place.
NOT_TRAINER_KEYS = {
    "default_root_dir": "everything is written into `out`",
    "logger": "metrics.csv and TensorBoard are always written; another logger: CLIPModule in a Lightning script",
    "callbacks": "not in a file; use CLIPModule and CLIPDataModule in a Lightning script (docs/finetune.md)",
    "plugins": "not in a file; use CLIPModule and CLIPDataModule in a Lightning script (docs/finetune.md)",
    "fast_dev_run": "use --dry_run for the plan alone, or trainer.max_steps",
    "limit_train_batches": "an epoch is every pair once; use trainer.max_steps",
    "limit_test_batches": "fit tests nothing; see `finetune test`",
    "limit_predict_batches": "fit predicts nothing; see `finetune predict`",
    "overfit_batches": "give a data.dataset of a few pairs",
    "min_epochs": "nothing ends a run early but max_time; use trainer.max_epochs",
    "min_steps": "nothing ends a run early but max_time; use trainer.max_steps",
    "num_sanity_val_steps": "the untouched CLIP is evaluated before the first step anyway",
    "enable_checkpointing": "checkpoints are what a run goes on from; see checkpoint_every_n_steps",
    "enable_model_summary": "the plan says what is trained; see --dry_run",
    "enable_autolog_hparams": "config.yaml in `out` has every key",
    "inference_mode": "evaluation takes care of it",
    "use_distributed_sampler": "data does its own sharding",
    "reload_dataloaders_every_n_epochs": "data is the same in all epochs",
    "barebones": "metrics and checkpoints are what a run is for",
    "model_registry": "not here; checkpoints lie in `out`/checkpoints",
}


OPEN_CLIP_FLAGS = flags_of(
    "open_clip_train",
    {
        "train_data": "data.dataset, or data.sources",
        "train_data_upsampling_factors": "data.sources[…].weight",
        "val_data": "the val split of data.dataset, and evaluate.retrieval",
        "imagenet_val": "evaluate.zero_shot",
        "csv_img_key": "data.sources[…].image",
        "csv_caption_key": "data.sources[…].caption",
        "epochs": "trainer.max_epochs",
        "accum_freq": "trainer.accumulate_grad_batches (contrast over one batch), or "
        "model.compute.micro_batch_size (contrast over all of it, as open_clip's)",
        "wd": "model.optimizer.weight_decay",
        "beta1": "model.optimizer.betas",
        "beta2": "model.optimizer.betas",
        "grad_clip_norm": "trainer.gradient_clip_val",
        "grad_checkpointing": "model.compute.gradient_checkpointing",
        "torchcompile": "model.compute.compile",
        "force_patch_dropout": "model.compute.patch_dropout",
        "lock_image": "model.adapter.lock: [image]",
        "lock_text": "model.adapter.lock: [text]",
        "siglip": "model.loss.kind: sigmoid",
        "use_bn_sync": "trainer.sync_batchnorm",
        "workers": "data.num_workers",
        "resume": "the same command goes on by itself, and --ckpt_path names a checkpoint",
        "save_frequency": "checkpoint_every_n_steps",
        "val_frequency": "trainer.val_check_interval",
        "logs": "out",
        "name": "out",
    },
)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Handed to `lightning.Trainer` as it is; the same names, the same meaning."""

    not_here = NOT_TRAINER_KEYS

    accelerator: str = "auto"
    """auto takes the best there is: cuda, mps, cpu."""
    devices: int | str | list[int] = "auto"
    """How many devices, or which."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto (ddp where there are several devices), ddp: every device holds all weights, or fsdp2: each holds a part of
    them, of their gradients and of AdamW's moments, for towers that do not fit on one."""
    precision: Precision = "auto"
    """auto: bf16-mixed on a CUDA GPU that has bfloat16, else 32-true. 16-mixed has a loss scaler: for an older GPU."""
    tf32: bool = True
    """On a CUDA GPU multiply matrices of float32 in TensorFloat-32: several times faster, ten bits of mantissa."""
    max_epochs: int | None = None
    """Passes over the training samples; the run ends at max_epochs or max_steps, whichever comes first."""
    max_steps: int = -1
    """Optimiser steps; -1 for no limit."""
    val_check_interval: int | float | None = None
    """Evaluate every so many steps, counted over epochs (int; of accumulate_grad_batches batches each, also where an
    epoch's last step has fewer), or shares of an epoch (float); null: at an epoch's end.
    The last step is always followed by an evaluation."""
    check_val_every_n_epoch: int | None = 1
    """Evaluate in one of so many epochs only; plays no part where val_check_interval counts steps."""
    gradient_clip_val: float | None = 1.0
    """Largest gradient norm."""
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    """value: clip each number of the gradient instead."""
    accumulate_grad_batches: int = 1
    """Batches a step. Their contrasts stay their own: this makes a step longer, not the contrastive batch larger."""
    limit_val_batches: int | float | None = None
    """Batches of the val split in val/loss (int), or a share of them (float); the metrics take all of it."""
    max_time: str | None = None
    """End after so long at the latest: DAYS:HH:MM:SS."""
    log_every_n_steps: int = 10
    """Log every so many steps."""
    deterministic: bool | None = None
    """Only deterministic algorithms."""
    benchmark: bool | None = None
    """Let cuDNN look for its fastest kernels first."""
    sync_batchnorm: bool = False
    """Statistics of BatchNorm over all devices, where they are trained: a ResNet from random weights."""
    profiler: Literal["simple", "advanced", "pytorch"] | None = None
    """Say at the end where the time went."""
    detect_anomaly: bool = False
    """Say which operation made a NaN; slow."""
    enable_progress_bar: bool = True
    """Show progress where there is a terminal."""

    def __post_init__(self) -> None:
        if (self.max_epochs or 0) < 1 and self.max_steps < 1:
            raise ConfigError("trainer: needs max_epochs or max_steps of at least 1")
        if self.strategy not in ("auto", SHARDED) and not self.strategy.startswith("ddp"):
            raise ConfigError(f"trainer.strategy: expected auto, ddp or {SHARDED}, got '{self.strategy}'")


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """The CLIP to start from."""

    name: str = "ViT-B-32"
    """open_clip architecture, OpenAI's name (ViT-B/32), a folder of open_clip's or transformers', an id of the hub
    (ORG/NAME), a file of OpenAI's, or the path of an open_clip model configuration (.json)."""
    pretrained: str | None = "openai"
    """open_clip tag, path of a weights file, or null: random weights (training from scratch). A name that brings its
    own weights (a folder, a file, an id) passes over it."""

    @property
    def brings_weights(self) -> bool:
        """Whether the name alone says which weights."""
        from curate.clip import brings_weights

        return self.name.endswith(WEIGHTS) or brings_weights(self.name)

    @property
    def is_random(self) -> bool:
        """Whether there are no weights to start from."""
        return self.pretrained is None and not self.brings_weights

    @property
    def weights(self) -> str | None:
        """What the weights are loaded from beside the name."""
        return None if self.brings_weights else self.pretrained

    @property
    def label(self) -> str:
        """What this CLIP is called in tables and reports."""
        return f"{self.name} {self.weights}" if self.weights else self.name


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained."""

    kind: Literal["full", "lora", "layernorm", "bias", "last", "probe"] = "lora"
    """full: all weights of the towers that are not locked. lora: low-rank updates to them (peft). layernorm: the norms'
    gains and biases. bias: all biases. last: the last blocks of each tower and what is behind them. probe: only the
    linear maps at the ends of the towers, into the common space."""
    variant: Literal["lora", "dora", "rslora", "pissa"] = "lora"
    """Of kind lora. dora: a trained length of each row too. rslora: scaled by alpha / √rank. pissa: starts with the
    largest singular values of the weights (no conv)."""
    rank: int | dict[str, int] = 16
    """Rank of the LoRA update; of each tower its own: {image: 16, text: 8}."""
    alpha: float | dict[str, float] = 32.0
    """Scale of the LoRA update: (alpha / rank) · B·A; a number, or one a tower."""
    dropout: float = 0.0
    """Dropout on the LoRA path's input."""
    targets: list[str] = field(default_factory=lambda: ["q", "k", "v", "out", "fc", "proj"])
    """Which projections get LoRA: q, k, v, out of the attention, fc and proj of the MLP; projection: the linear maps
    into the common space; conv (and the downsampling) of a ResNet; pool: the attention pool of a ResNet or SigLIP."""
    last_blocks: int = 1
    """Of kind last: how many blocks of each tower."""
    lock: list[Literal["image", "text"]] = field(default_factory=list)
    """Towers that stay as they are (LiT: [image]): in eval mode, without gradient."""
    train_logit_scale: bool = True
    """Train the temperature too."""

    def __post_init__(self) -> None:
        _check_by_tower("model.adapter.rank", self.rank)
        _check_by_tower("model.adapter.alpha", self.alpha)
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.adapter.dropout: expected a share, 0 to below 1, got {self.dropout}")
        if self.last_blocks < 1:
            raise ConfigError(f"model.adapter.last_blocks: expected at least 1, got {self.last_blocks}")
        if unknown := [target for target in self.targets if target not in PROJECTIONS]:
            raise ConfigError(f"model.adapter.targets: '{unknown[0]}' is none of {', '.join(PROJECTIONS)}")
        if self.variant == "pissa" and "conv" in self.targets:
            raise ConfigError("model.adapter.variant: pissa needs matrices; take conv out of model.adapter.targets")
        if set(self.lock) == set(TOWERS):
            raise ConfigError("model.adapter.lock: with both towers locked nothing is trained")

    def rank_of(self, tower: str) -> int:
        """Rank of the LoRA update in a tower, image or text."""
        return self.rank[tower] if isinstance(self.rank, dict) else self.rank

    def alpha_of(self, tower: str) -> float:
        """Alpha of the LoRA update in a tower, image or text."""
        return self.alpha[tower] if isinstance(self.alpha, dict) else self.alpha


def _check_by_tower(key: str, value: float | dict[str, int] | dict[str, float]) -> None:
    if isinstance(value, dict) and set(value) != set(TOWERS):
        raise ConfigError(f"{key}: expected a number or both towers, {{image: …, text: …}}, got {value}")
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    if wrong := [number for number in numbers if number <= 0]:
        raise ConfigError(f"{key}: expected above 0, got {wrong[0]}")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The contrast of a batch, and what holds the CLIP to where it started."""

    kind: Literal["auto", "clip", "siglip"] = "auto"
    """clip: symmetric cross-entropy (softmax). siglip: every pair yes or no (sigmoid). auto: siglip for a CLIP that has
    a logit_bias, else clip."""
    multi_positive: bool = True
    """Samples of one batch with equal captions, equal images or one duplicate group are positives of each other, not
    negatives."""
    label_smoothing: float = 0.0
    """Share of the target spread over the batch."""
    logit_scale: float | None = None
    """Factor of the logits, exp(t), to begin with; null: the CLIP's own (10 where siglip gives it a bias)."""
    distill_feature: float = 0.0
    """Weight of the squared distance of the embeddings to those of the starting CLIP."""
    distill_logit: float = 0.0
    """Weight of the divergence of the batch's similarities (softmax of the logits) from those of the starting CLIP."""
    l2_start: float = 0.0
    """Weight of half the squared distance of the trained weights to where they started (L2-SP)."""

    @property
    def distills(self) -> bool:
        """Whether the embeddings of the starting CLIP are needed."""
        return self.distill_feature > 0 or self.distill_logit > 0

    @property
    def holds_to_start(self) -> str | None:
        """The first key of those that need the weights of the start; None without one."""
        keys = ("distill_feature", "distill_logit", "l2_start")
        return next((key for key in keys if getattr(self, key) > 0), None)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up and decay."""

    lr: float = 1e-4
    """Peak learning rate: about 1e-4 for LoRA, 1e-5 for full."""
    image_lr: float | None = None
    """Peak learning rate of the image tower; null: lr."""
    text_lr: float | None = None
    """Peak learning rate of the text tower; null: lr."""
    layer_decay: float = 1.0
    """Each block's learning rate is this share of the next one's; what is behind the blocks has all of it, the
    embeddings the least. 0.65 to 0.8 for full training; 1: all alike."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """From lr to min_lr after the warm-up; constant stays at lr."""
    min_lr: float = 0.0
    """Learning rate at the end; where a tower or block has less than lr, as much less."""
    warmup: float = 0.05
    """Share of all steps with rising learning rate."""
    weight_decay: float = 0.1
    """For matrices; none for biases, norms, embeddings and logit_scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    ema: float | None = None
    """Keep an average of the weights too, in which the past fades by this share a step (0.999): it is what is
    evaluated, saved and exported."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"model.optimizer.lr: expected above 0, got {self.lr}")
        for tower, rate in (("image", self.image_lr), ("text", self.text_lr)):
            if rate is not None and rate <= 0:
                raise ConfigError(
                    f"model.optimizer.{tower}_lr: expected above 0, got {rate}; "
                    f"model.adapter.lock: [{tower}] keeps a tower as it is"
                )
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"model.optimizer.layer_decay: expected above 0, up to 1, got {self.layer_decay}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"model.optimizer.warmup: expected a share of all steps, 0 to 1, got {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a step is computed: what it needs of memory and time."""

    micro_batch_size: int | None = None
    """Pairs that go through the towers at once, of a batch that is contrasted as a whole (cached gradients): the memory
    of so many, the gradient of data.batch_size, for about a third more time. null: all at once."""
    gradient_checkpointing: bool = False
    """Keep of each transformer block its input alone, and compute the rest again for the gradient."""
    compile: bool = False
    """Compile the towers (torch.compile): minutes to start, then faster on a GPU."""
    patch_dropout: float = 0.0
    """Share of the image patches that a ViT leaves out in training (FLIP: 0.5 for a step of half the time)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    clip: ClipConfig = field(default_factory=ClipConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self) -> None:
        key = self.loss.holds_to_start
        if key and self.clip.is_random:
            raise ConfigError(
                f"model.loss.{key}: the start is random weights (model.clip.pretrained: null), to which nothing should "
                "be held; set it to 0"
            )


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several sources of training pairs."""

    path: Path
    """A dataset, a folder of tars or images, or a list file (CSV, TSV, Parquet, JSON lines) of paths and captions."""
    weight: float = 1.0
    """Passes over this source in an epoch: 2 sees each sample twice, 0.5 half of them, the other half in the next."""
    where: str | None = None
    """Only rows for which this DuckDB expression over the columns is true, such as `width >= 224`."""
    templates: list[str] = field(default_factory=list)
    """For captions that are labels: one of these is drawn each time, the label in place of its {}."""
    image: str | None = None
    """Column of the image paths, of a list file; null: the first with a usual name (image, path, file_name, …)."""
    caption: str | None = None
    """Column of the caption or of a list of captions; null: the first with a usual name (caption, text, …)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained and evaluated on."""

    dataset: Path = Path("dataset")
    """What is trained on, in any form of data.sources; its val and retain splits, where it has them, are evaluated.
    A dataset of shards may be far away: s3://BUCKET/NAME (gs://…, any address of fsspec's)."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Train on these together, in place of the train split of `dataset`, which stays what is evaluated and replayed."""
    batch_size: int = 256
    """Pairs a step and device; with several devices the contrastive batch is all of theirs together."""
    eval_batch_size: int = 256
    """Pairs encoded at once in evaluation."""
    batches: Literal["shuffled", "without_twins", "by_length", "hard_negatives"] = "shuffled"
    """Which samples come together. without_twins: no two with equal captions or of one duplicate group. by_length:
    captions of like length. hard_negatives: neighbours by the embeddings that `curate build` stored in the dataset."""
    num_workers: int = 4
    """Processes that decode images; 0 decodes in the training process."""
    replay: float = 0.0
    """Share of each batch drawn from the dataset's retain split (or replay_dataset), against forgetting."""
    replay_dataset: Path | None = None
    """Take the replayed samples from this dataset's train split instead of the retain split."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Random resized crop in training: share of the image's area. [1, 1] is no augmentation."""
    decode: Literal["fast", "exact"] = "fast"
    """Of training images. exact: by Pillow, the very pixels of open_clip's transform, in twice the time."""
    window: int = 50_000
    """Of a dataset far away (s3://…) so many samples are shuffled together: the shards that hold them, which come in a
    random order, are here at once, and the next ones on their way. One with fewer samples is shuffled as a whole."""
    max_broken: float = 0.01
    """Share of an epoch's images that may be unreadable: others stand in for them. More of them stop the run."""
    cache_features: Literal["auto", "never"] = "auto"
    """auto: the embeddings of a locked tower that sees each sample the same way each time (an image tower: crop_scale
    [1, 1]; a text tower: one caption a sample) are computed once, and kept beside `out` for later runs too."""

    def __post_init__(self) -> None:
        if self.batch_size < 2:
            raise ConfigError(f"data.batch_size: a contrastive batch needs at least 2 pairs, got {self.batch_size}")
        if not 0 <= self.replay < 1:
            raise ConfigError(f"data.replay: expected a share of the batch, 0 to below 1, got {self.replay}")
        for number, source in enumerate(self.sources):
            key = f"data.sources[{number}]"
            if not 0 < source.weight < float("inf"):
                raise ConfigError(f"{key}.weight: expected above 0, got {source.weight}")
            if bad := [template for template in source.templates if template.count("{}") != 1]:
                raise ConfigError(f"{key}.templates: '{bad[0]}' needs exactly one {{}}, where the label goes")

    @property
    def trained_on(self) -> list[SourceConfig]:
        """The sources of the training pairs."""
        return self.sources or [SourceConfig(path=self.dataset)]

    def source_key(self, number: int) -> str:
        """What a user calls a source."""
        return f"data.sources[{number}]" if self.sources else "data.dataset"


@dataclass(frozen=True, kw_only=True)
class LabelledConfig:
    """Images, each of one class."""

    images: Path
    """Folder of class folders, or of images with a labels.csv; a table (FILE.csv, FILE.parquet) with a column of
    paths and one of labels; a folder as CLIP_benchmark writes it (webdataset); torchvision:CIFAR10 or another name."""
    split: str = "test"
    """Of torchvision's and CLIP_benchmark's sets."""
    root: Path | None = None
    """Of torchvision's sets: the folder that they are in."""
    download: bool = False
    """Let torchvision download the set into root if it is not there."""
    classes: Path | None = None
    """Text file with the classes' names, one a line: labels that are numbers count its lines from 0."""
    image_column: str = "image"
    """Of a table: paths, from the table's folder on."""
    label_column: str = "label"
    """Of a table: names of classes, or with `classes` their numbers."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(LabelledConfig):
    """A zero-shot classification of labelled images."""

    templates: list[str] | str | None = None
    """Prompt templates, or the name of a list: imagenet (OpenAI's 80), cifar10, food101, … (finetune/templates.json);
    null: those that a set of CLIP_benchmark's brings, else "a photo of a {}." A class's embedding is the normalised
    mean of its normalised prompt embeddings."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A linear probe: logistic regression on the image tower's embeddings, beside the zero-shot classifier."""

    train: LabelledConfig
    """Labelled images to fit it on."""
    validation: LabelledConfig | None = None
    """Labelled images to choose its penalty on; null: four folds of train. All of both fit the final one."""
    test: ZeroShotConfig
    """Labelled images that are counted, for the probe and zero-shot."""
    shots: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    """Also fit probes on so many images of each class, drawn by seed; [] for none."""
    seed: int = 0
    """Of that draw."""


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig:
    """A zero-shot set with the same classes as another, the images of which come from elsewhere."""

    reference: str
    """The other: its name in evaluate.zero_shot."""
    baseline: list[tuple[float, float]] = field(default_factory=list)
    """Top-1 of other models on (reference, this), at least two: the line that accuracy on the one predicts the other
    by. Without it the table has the accuracies alone."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measured before and after training, and at each validation."""

    zero_shot: dict[str, ZeroShotConfig] = field(default_factory=dict)
    """Named zero-shot classification sets."""
    retrieval: dict[str, Path] = field(default_factory=dict)
    """Named further datasets for image–caption retrieval; the val and retain splits of the training dataset are
    always there, as `val` and `retain`."""
    max_retrieval: int = 5_000
    """Most pairs of a retrieval set; a seeded sample of a larger one."""
    monitor: str | None = None
    """Metric that picks the best checkpoint, such as zero_shot/digits/top1; null: val/image_to_text/recall@1, or
    the last step if there is no val split."""


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """What the CLIP knew before, how much of it may be lost, and how a CLIP within that budget is looked for."""

    metrics: list[str] | None = None
    """Whose mean shows forgetting; null: retain/image_to_text/recall@1, or nothing if there is no retain split."""
    budget: float = 0.01
    """By how much that mean may fall: 0.01 is one point of a share. The best checkpoint is the one with the best
    evaluate.monitor within the budget."""
    interpolate: int = 10
    """After training the CLIPs at so many equal steps from the start to the end (WiSE-FT) are evaluated too, and the
    best within the budget is what is exported; 0: the checkpoints alone."""
    towers_apart: bool = False
    """Interpolate each tower on its own: (interpolate + 1)² CLIPs are evaluated."""

    def __post_init__(self) -> None:
        if not 0 <= self.budget < 1:
            raise ConfigError(f"keep.budget: expected a share, 0 to below 1, got {self.budget}")
        if self.interpolate < 0:
            raise ConfigError(f"keep.interpolate: expected 0 or more, got {self.interpolate}")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Everything `finetune fit` needs."""

    not_here = OPEN_CLIP_FLAGS

    out: Path = Path("runs/domain")
    """Folder of the run. The same command again continues it; a folder with other files of such names is refused."""
    seed_everything: int = 0
    """Seed of all randomness."""
    checkpoint_every_n_steps: int = 200
    """Save checkpoints/last.ckpt every so many steps, and at the end of each epoch; a killed run goes on from there.
    The one before stays as previous.ckpt."""
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=10))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    keep: KeepConfig = field(default_factory=KeepConfig)
