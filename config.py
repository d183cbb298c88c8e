"""All settings of a training run with their defaults, which are those of `python train.py --dataset flickr8k`.

Edit a default here, or override it for one run with a flag: `--alpha 0.2 --batch-size 64 --no-pretrained`. The tables
below Config contain other values for the sample set, for other data and for pretrained dual encoders.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Train an image-text retrieval model. Every setting below is a default of config.py."""

    # Data
    dataset: str = "sample"  # "sample", "flickr8k", "flickr30k", "coco", a folder or caption file, or OWNER/NAME (hub)
    data_dir: str | None = None  # folder of the data set; without it a named data set is downloaded with kagglehub
    allow_bad_rows: bool = False  # continue although more than 5 % of the caption rows cannot be used
    image_column: str | None = None  # name of the column (or JSON key) with the photos' file names; None: found
    caption_column: str | None = None  # ... with the captions
    split_column: str | None = None  # ... with train, val or test
    split: Literal["auto", "random"] = "auto"  # "auto": the split that the data set has, else a random one
    split_seed: int = 0  # seed of the split into training, validation and test photos, if the data set has none
    limit: int | None = None  # photos of all splits together, drawn with the split seed, for a first try; None: all
    cache_images: bool = False  # cache photos, decoded and resized, in cache_dir; for machines with few cores
    image_size: int | None = None  # pixels; None: the size at which the image tower was trained (ResNet50: 224)
    captions_per_image: int = 2  # captions that are drawn for each photo of a batch
    max_tokens: int = 64  # longer captions are truncated
    allow_unknown_words: bool = False  # train although the text tower knows less than half of the captions' words
    augment: bool = True  # random crops and horizontal flips, which swap "left" and "right" in the captions
    min_crop: float = 0.6  # smallest share of a photo's area that a random crop contains; 1: no crops

    # Model
    model: str | None = None  # a pretrained dual encoder instead of two towers: CLIP, SigLIP, ...; a name or folder
    image_encoder: str = "resnet50"  # a timm model, or a folder or file with its weights
    text_encoder: str = "sentence-transformers/all-mpnet-base-v2"  # a transformers model, a folder, or "scratch"
    pretrained: bool = True  # False: random weights; the text tower is then "scratch": small, with its own vocabulary
    freeze_image: bool = False  # do not train the image tower
    freeze_text: bool = False  # do not train the text tower; if both are frozen, the heads train on cached features
    unfreeze_image_stages: int | None = 1  # train only the last stages of the image tower (ResNet50 has 4); None: all
    unfreeze_text_layers: int | None = 6  # train only the last layers of the text tower (MPNet has 12); None: all
    cached_views: int = 4  # augmented views per photo whose frozen activations are cached on disk; 0: no cache
    lora: int = 0  # rank of low-rank adapters (LoRA, needs peft) that train instead of the towers' weights; 0: none
    freeze_epochs: int = 8  # train only the heads in the first epochs, then the towers too
    fold_batch_norm: bool = True  # fold pretrained batch norms, with fixed statistics, into the convolutions (faster)
    image_pooling: str = "own"  # POOLINGS in modules.py: own (the backbone's), mean, max or gpo over regions
    text_pooling: str = "mean"  # POOLINGS in modules.py: mean, max, gpo over tokens, or cls
    image_head: str = "auto"  # HEADS in modules.py: residual, linear, adaptor, none; auto: residual, with --model none
    text_head: str = "auto"  # as image_head
    embed_dim: int = 1024  # dimensions of the shared space
    dropout: float = 0.5  # in the projection heads
    image_feature_dropout: float = 0.3  # on the image features, before the head; helps if the image tower is frozen
    word_dropout: float = 0.1  # share of a caption's tokens that are masked in training
    start_from: str | None = None  # a run folder: start from its towers and its best weights

    # Evaluation and search; `evaluate.py --as-trained` uses neither
    eval_image_scale: float = 8 / 7  # image size relative to that of training (arXiv 1906.06423)
    tta_flip: bool = True  # average the embeddings of a photo and its mirror image

    # Objective: a main term over all pairs of the batch + alpha * triplet margin loss
    objective: str = "info_nce"  # OBJECTIVES in training/objectives.py: info_nce, sigmoid, cosine, soft
    softness: float = 0.2  # of "soft": share of the targets that follows the similarity of images and of captions
    cosine_margin: float = 0.2  # of "cosine": negatives below this cosine add no loss
    alpha: float = 1.0  # weight of the triplet term; 0: no triplet term
    alpha_warmup_epochs: float = 2.0  # alpha grows from 0, because hardest negatives mislead an untrained model
    negatives: Literal["hardest", "semi-hard", "all"] = "hardest"  # of the triplet term, within the batch
    distance: Literal["euclidean", "cosine"] = "euclidean"  # of the triplet term: between unit vectors, or 1 - cosine
    margin: float = 0.2  # in units of `distance`
    temperature: float = 0.07  # initial value of the learned temperature, which divides the cosines
    nested_dims: tuple[int, ...] = ()  # also train the first 64, 128 ... values of embeddings alone (arXiv 2205.13147)

    # Optimisation
    epochs: int = 13  # passes over the training photos
    batch_size: int = 256  # photos; the captions of all other photos in the batch are negatives
    micro_batch_size: int | None = None  # photos in memory at a time; fewer need less memory and more time
    lr_image: float = 3e-4  # peak learning rate of the image tower
    lr_text: float = 4e-4  # ... of the text tower
    lr_heads: float = 1e-3  # ... of the projection heads and the temperature
    weight_decay: float = 0.05  # AdamW; never on norms, biases and the temperature
    warmup_epochs: float = 0.5  # learning rates grow linearly from 0, then fall along a cosine
    max_grad_norm: float = 1.0  # gradients are clipped to this norm

    # Run
    name: str | None = None  # folder name of the run in runs_dir; default: the data set and the time
    runs_dir: str = "runs"  # folder for checkpoints, logs and plots of runs
    cache_dir: str = "cache"  # folder for cached features, token ids and photos; safe to delete
    seed: int = 0  # of weights, order, crops and dropout
    patience: int = 0  # stop after this many epochs in a row without a higher validation rsum; 0: train all epochs
    log_every_steps: int = 0  # steps between lines in steps.jsonl, beside those per epoch in log.jsonl; 0: no such file
    save_every_steps: int | None = None  # steps between checkpoints, in addition to the one after each epoch
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = ()  # experiment trackers
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" selects the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders; the loss is in float32
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the image tower: faster steps after compilation; needs a C++ compiler
    num_workers: int = -1  # processes that load photos; -1 selects by the number of cores and the device

    def __post_init__(self):
        for names, bounds, is_valid in BOUNDS:
            for name in names.split():
                value = getattr(self, name)
                if not is_valid(value):
                    raise ValueError(f"--{name.replace('_', '-')} must be {bounds}, got {format_value(value)}")
        object.__setattr__(self, "report_to", tuple(dict.fromkeys(self.report_to)))  # a list in config.json
        if unknown := set(self.report_to) - set(TRACKERS):
            raise ValueError(f"--report-to takes {', '.join(TRACKERS)}, got {', '.join(map(format_value, unknown))}")
        for name, value in vars(self).items():
            if isinstance(value, str) and ("\0" in value or len(value) > MAX_TEXT):
                problem = "contains a NUL character" if "\0" in value else f"has more than {MAX_TEXT:,} characters"
                raise ValueError(f"--{name.replace('_', '-')} {problem}: {value[:40]!r}")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            bounds = f"from 1 to --batch-size ({self.batch_size})"
            raise ValueError(f"--micro-batch-size must be {bounds}, got {self.micro_batch_size}")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name):
            raise ValueError(f"--name must be a plain folder name, got {self.name!r}")
        if self.image_size is not None and round(self.image_size * self.eval_image_scale) > MAX_IMAGE_SIZE:
            raise ValueError(
                f"--image-size {self.image_size} times --eval-image-scale {self.eval_image_scale} is more than "
                f"{MAX_IMAGE_SIZE:,} pixels: choose smaller ones"
            )
        object.__setattr__(self, "nested_dims", tuple(sorted(set(self.nested_dims))))
        self._check_combinations()

    def _check_combinations(self):
        if self.nested_dims and self.embed_dim_applies and self.nested_dims[-1] >= self.embed_dim:
            found = f"got {self.nested_dims[-1]}; all values are trained anyway"
            raise ValueError(f"--nested-dims must be below --embed-dim ({self.embed_dim}), {found}")
        if self.model is not None and (self.image_pooling, self.text_pooling) != ("own", "mean"):
            raise ValueError("--model has its own pooling: leave out --image-pooling and --text-pooling")
        if self.text_pooling == "own":
            raise ValueError("--text-pooling own: only image towers have a pooling of their own; use mean, max or gpo")
        if self.lora and (self.unfreeze_image_stages or self.unfreeze_text_layers):
            raise ValueError(
                "--lora trains adapters in whole towers: leave out --unfreeze-image-stages and --unfreeze-text-layers"
            )
        if self.word_dropout and self.freeze_text:
            raise ValueError(
                "--word-dropout needs a text tower that trains: pass --word-dropout 0, or leave out --freeze-text"
            )
        if self.cached_views and not (self.freeze_image or self.unfreeze_image_stages):
            raise ValueError(
                "--cached-views caches activations of frozen stages: add --unfreeze-image-stages 1, or --freeze-image"
            )
        if self.cached_views > 1 and not self.augment:
            raise ValueError("--no-augment makes all views of a photo equal: add --cached-views 1")
        if self.freeze_image and self.freeze_text:
            if self.lora:
                raise ValueError("--lora has no tower to adapt: leave out --freeze-image or --freeze-text")
            if self.heads == ("none", "none"):
                raise ValueError("there is nothing to train: add --image-head adaptor --text-head adaptor")

    @property
    def bias(self) -> float | None:
        """Initial value of the sigmoid loss's learned bias (arXiv 2303.15343, section 3.2); None for other losses."""
        return -10.0 if self.objective == "sigmoid" else None

    @property
    def heads(self) -> tuple[str, str]:
        """Names of the image head and the text head in modules.HEADS."""
        default = "residual" if self.model is None else "none"
        return tuple(default if head == "auto" else head for head in (self.image_head, self.text_head))

    @property
    def embed_dim_applies(self) -> bool:
        """Whether the shared space has embed_dim dimensions; the heads "none" and "adaptor" keep those of a tower."""
        return not {"none", "adaptor"} & set(self.heads)

    @property
    def unfreeze_epoch(self) -> int:
        """Number of epochs before the towers begin to train; 0 if they train from the start, or never."""
        never = (self.freeze_image and self.freeze_text) or self.freeze_epochs >= self.epochs
        return 0 if never else self.freeze_epochs

    @property
    def views(self) -> int:
        """Cached views per photo, at least 1 if both towers are frozen; 0 if photos are loaded in every epoch."""
        return self.cached_views or int(self.freeze_image and self.freeze_text)


# Values for other data: field -> (the default above that it replaces, the value). A default that you edited above has
# priority over these tables, and a flag over both. The first lines of a run print which values are from here.

OWN_PHOTOS = {  # a folder, a caption file, a data set of the hub, flickr30k, coco: both towers train end to end
    "text_encoder": ("sentence-transformers/all-mpnet-base-v2", "distilbert-base-uncased"),
    "unfreeze_image_stages": (1, None),
    "unfreeze_text_layers": (6, None),
    "cached_views": (4, 0),
    "freeze_epochs": (8, 0),
    "captions_per_image": (2, 5),
    "embed_dim": (1024, 512),
    "dropout": (0.5, 0.1),
    "image_feature_dropout": (0.3, 0.0),
    "word_dropout": (0.1, 0.0),
    "eval_image_scale": (8 / 7, 1.0),
    "tta_flip": (True, False),
    "alpha": (1.0, 0.1),
    "epochs": (13, 12),
    "batch_size": (256, 128),
    "lr_image": (3e-4, 5e-5),
    "lr_text": (4e-4, 5e-5),
    "lr_heads": (1e-3, 5e-4),
    "warmup_epochs": (0.5, 1.0),
}
SAMPLE = OWN_PHOTOS | {  # small towers from scratch: no download, and minutes on two CPU cores
    "pretrained": (True, False),
    "image_encoder": ("resnet50", "resnet10t"),
    "image_size": (None, 96),
    "min_crop": (0.6, 0.9),
    "epochs": (13, 40),
    "batch_size": (256, 32),
    "lr_image": (3e-4, 1e-3),
    "lr_text": (4e-4, 1e-3),
    "lr_heads": (1e-3, 1e-3),
}
PRETRAINED_DUAL_ENCODER = OWN_PHOTOS | {  # --model: trained for this task already; large steps would destroy that
    "lr_image": (3e-4, 5e-6),
    "lr_text": (4e-4, 5e-6),
}
# Flags that change what trains: with one of them, flickr8k uses OWN_PHOTOS too.
FLAGS_WITHOUT_RECIPE = ("--start-from", "--no-pretrained", "--freeze-image", "--freeze-text", "--lora")


def preset_name(dataset: str, model: str | None = None, *, recipe: bool = True) -> str | None:
    """Return the name of the table above that applies to a data set; None if the defaults of Config apply."""
    if model is not None:
        return "PRETRAINED_DUAL_ENCODER"
    if dataset == "sample":
        return "SAMPLE"
    return None if dataset == "flickr8k" and recipe else "OWN_PHOTOS"


def preset_values(name: str | None) -> dict:
    """Return the values of a table above, without the fields whose default in Config was edited."""
    table = {} if name is None else globals()[name]
    return {
        field: value
        for field, (shipped, value) in table.items()
        if getattr(Config, field) == shipped and value != shipped
    }


def default_config(dataset: str, model: str | None = None, *, recipe: bool = True) -> Config:
    """Return the configuration for a data set without any flags."""
    return Config(dataset=dataset, model=model, **preset_values(preset_name(dataset, model, recipe=recipe)))


# Fields that determine the towers and the shapes of their weights: no flag can change them after training.
ARCHITECTURE = (
    "model",
    "image_encoder",
    "text_encoder",
    "pretrained",
    "fold_batch_norm",
    "image_pooling",
    "text_pooling",
    "image_head",
    "text_head",
    "embed_dim",
)
# Fields that a run with --start-from copies from the other run.
MODEL_FIELDS = (*ARCHITECTURE, "image_size", "eval_image_scale", "tta_flip", "lora")

# Fields and flags that version 1 called differently: old name -> new name.
RENAMED = {
    "image_stages": "unfreeze_image_stages",
    "text_layers": "unfreeze_text_layers",
    "stored_views": "cached_views",
    "search_scale": "eval_image_scale",
    "search_mirrored": "tta_flip",
}

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")  # that --report-to takes
MAX_IMAGE_SIZE = 2048  # pixels; a photo of this size alone takes 50 MB, and a batch several GB

# The values that each number may have, for flags and for the config.json of a run, which may be from a stranger. The
# upper bounds exclude mistakes and damage, not experiments. NaN fails every comparison.
BOUNDS = (  # fields, description of the valid values, test
    ("batch_size", "from 2 to 1,000,000", lambda v: 2 <= v <= 1_000_000),  # a single photo has no negatives
    ("embed_dim", "from 1 to 65,536", lambda v: 1 <= v <= 65_536),
    (
        "nested_dims",
        "numbers from 1 to 65,536, at most 32 of them",
        lambda v: len(v) <= 32 and all(1 <= dim <= 65_536 for dim in v),
    ),
    ("captions_per_image", "from 1 to 10,000", lambda v: 1 <= v <= 10_000),
    ("epochs", "from 1 to 1,000,000", lambda v: 1 <= v <= 1_000_000),
    ("unfreeze_image_stages unfreeze_text_layers", "from 1 to 10,000", lambda v: v is None or 1 <= v <= 10_000),
    ("limit", "from 6 (2 of train, val and test each) to 10**9", lambda v: v is None or 6 <= v <= 10**9),
    ("save_every_steps", "from 1 to 10**9", lambda v: v is None or 1 <= v <= 10**9),
    ("image_size", f"from 16 to {MAX_IMAGE_SIZE:,}", lambda v: v is None or 16 <= v <= MAX_IMAGE_SIZE),
    ("max_tokens", "from 3 to 100,000", lambda v: 3 <= v <= 100_000),  # [CLS], a word, [SEP]
    ("num_workers", "from -1 to 1,024", lambda v: -1 <= v <= 1024),
    ("split_seed seed", "from 0 to 2**63 - 1", lambda v: 0 <= v < 2**63),
    ("lora", "from 0 to 4,096", lambda v: 0 <= v <= 4096),
    ("freeze_epochs", "from 0 to 1,000,000", lambda v: 0 <= v <= 1_000_000),
    ("patience", "from 0 (off) to 1,000,000", lambda v: 0 <= v <= 1_000_000),
    ("log_every_steps", "from 0 (off) to 10**9", lambda v: 0 <= v <= 10**9),
    ("cached_views", "from 0 to 10,000", lambda v: 0 <= v <= 10_000),
    ("min_crop", "above 0 and at most 1", lambda v: 0 < v <= 1),
    ("dropout image_feature_dropout word_dropout", "at least 0 and below 1", lambda v: 0 <= v < 1),
    ("temperature", "from 0.01 (smaller overflows the logits) to 1,000", lambda v: 0.01 <= v <= 1000),
    ("eval_image_scale", "from 0.5 to 4", lambda v: 0.5 <= v <= 4),
    ("softness", "from 0 to 1", lambda v: 0 <= v <= 1),
    ("cosine_margin", "from -1 to 1", lambda v: -1 <= v <= 1),
    ("max_grad_norm", "above 0 and at most 1e12", lambda v: 0 < v <= 1e12),
    ("alpha margin", "from 0 to 1e6", lambda v: 0 <= v <= 1e6),
    ("alpha_warmup_epochs warmup_epochs", "from 0 to 1e6", lambda v: 0 <= v <= 1e6),
    ("lr_image lr_text lr_heads weight_decay", "from 0 to 100", lambda v: 0 <= v <= 100),
)
MAX_TEXT = 4096  # characters of a name or a path: the limit of Linux


def format_value(value: object) -> str:
    """Return the value of a setting for a message, shortened: a number in a file may have thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
