"""Every setting of a training run, with its default.

Edit a default here, or override it for one run by its name: `--alpha 0.2 --batch-size 64 --no-pretrained`.
"""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Config:
    """Train an image-text retrieval model. Every setting below is a default of config.py."""

    # Data
    dataset: str = "sample"  # "sample", "flickr8k", "flickr30k", "coco", a folder or caption file, or owner/name (hub)
    data_dir: str | None = None  # where the data set lies; without it a named one is downloaded with kagglehub
    allow_bad_rows: bool = False  # go on though more than 5 % of the caption rows cannot be used
    split_seed: int = 0  # which images are held out where the data set brings no split lists
    cache_images: bool = False  # keep photos decoded at training size in cache_dir; for machines with few cores
    image_size: int | None = None  # pixels; None is what the image tower was trained with (ResNet50: 224)
    captions_per_image: int = 5  # captions that come along with each image of a batch
    max_tokens: int = 64  # a longer caption is cut
    augment: bool = True  # random crops and mirror images ("left" and "right" are swapped in the caption)
    min_crop: float = 0.6  # smallest part of a photo's area that a random crop keeps; 1 never crops

    # Model
    model: str | None = None  # instead of two towers a pretrained pair: CLIP, SigLIP, Chinese-CLIP ...; name or folder
    image_encoder: str = "resnet50"  # a timm model, or a folder or file with its weights
    text_encoder: str = "distilbert-base-uncased"  # a transformers model, a folder with its weights, or "scratch"
    pretrained: bool = True  # False: random weights; the text tower is then "scratch", small, with its own vocabulary
    freeze_image: bool = False  # keep the image tower as it is
    freeze_text: bool = False  # keep the text tower as it is; with both frozen, training runs on stored features
    image_stages: int | None = None  # train only so many stages of the image tower, the last ones (ResNet50 has 4)
    text_layers: int | None = None  # train only so many layers of the text tower, the last ones
    stored_views: int = 0  # keep what the image tower's frozen part says of so many crops of a photo; 0: read anew
    lora: int = 0  # rank of adapters (LoRA, needs peft) that train instead of the towers' weights; 0 is none
    freeze_epochs: int = 0  # only the heads train in the first epochs, then the towers too
    fold_batch_norm: bool = True  # pretrained only: fixed batch norm statistics, absorbed by the convolutions (faster)
    image_pooling: Literal["own", "mean", "max", "gpo"] = "own"  # of the photo's regions; "gpo" learns how
    text_pooling: Literal["mean", "cls", "max", "gpo"] = "mean"  # of the caption's tokens; "cls" takes the first
    image_head: Literal["auto", "residual", "linear", "adaptor", "none"] = "auto"  # "residual"; of a pair "none"
    text_head: Literal["auto", "residual", "linear", "adaptor", "none"] = "auto"  # ... "none" keeps the tower's space
    embed_dim: int = 512  # dimensions of the space that photos and captions share
    dropout: float = 0.1  # in the projection heads
    image_feature_dropout: float = 0.0  # of the image tower's features, before their head; helps a frozen tower
    word_dropout: float = 0.0  # share of a caption's tokens that a text tower in training does not see

    # Search and evaluation; see evaluate.py --as-trained
    search_scale: float = 1.0  # photos are read so many times larger than in training (arXiv 1906.06423)
    search_mirrored: bool = False  # an embedding is the mean of the photo's and its mirror image's

    start_from: str | None = None  # a run's folder: training starts from its best weights, and its towers

    # Objective: a main term over all pairs of the batch + alpha * triplet margin
    objective: Literal["info_nce", "sigmoid", "cosine", "soft"] = "info_nce"  # the main term; see losses.py
    softness: float = 0.2  # of "soft": the share of its targets that goes by resemblance
    cosine_margin: float = 0.2  # of "cosine": unlike pairs below this cosine cost nothing
    alpha: float = 0.1  # weight of the triplet term; 0 is the main term alone
    alpha_warmup_epochs: float = 2.0  # alpha grows from 0: the hardest negatives of an untrained model lead nowhere
    negatives: Literal["hardest", "semi-hard", "all"] = "hardest"  # that the triplet term pushes away
    distance: Literal["euclidean", "cosine"] = "euclidean"  # between unit vectors, so at most 2; or 1 - cosine
    margin: float = 0.2  # in that distance
    temperature: float = 0.07  # where the learned temperature starts; it divides the cosines

    # Optimisation
    epochs: int = 12  # passes over the training images
    batch_size: int = 128  # images; each brings its captions, and the others are its negatives
    micro_batch_size: int | None = None  # images in memory at a time; fewer than batch_size need less, and more time
    lr_image: float = 5e-5  # highest learning rate of the image tower
    lr_text: float = 5e-5  # ... of the text tower
    lr_heads: float = 5e-4  # ... of the projection heads and the temperature
    weight_decay: float = 0.05  # AdamW; never on norms, biases and the temperature
    warmup_epochs: float = 1.0  # learning rates grow from 0, then fall along a cosine
    max_grad_norm: float = 1.0  # longer gradients are cut to this length

    # Run
    name: str | None = None  # folder of the run below runs_dir; without it, the data set and the time
    runs_dir: str = "runs"  # a run's checkpoints, log and pictures
    cache_dir: str = "cache"  # features of frozen towers, token ids, kept photos; safe to delete
    seed: int = 0  # weights, order, crops and dropout
    save_every_steps: int | None = None  # steps between checkpoints within an epoch; one is written after each epoch
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # "auto" takes the GPU if there is one
    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of the encoders; the loss is always float32
    compile: bool = False  # torch.compile the image tower: faster steps after a wait; needs a C++ compiler
    num_workers: int = -1  # processes that load photos; -1 chooses by the cores and the device

    def __post_init__(self):
        _require(self, "at least 1", lambda v: v >= 1, "captions_per_image", "epochs", "batch_size", "embed_dim")
        _require(self, "at least 16", lambda v: v is None or v >= 16, "image_size")
        _require(self, "at least 3", lambda v: v >= 3, "max_tokens")  # [CLS], a word, [SEP]
        _require(self, "at least -1", lambda v: v >= -1, "num_workers")
        _require(self, "at least 0", lambda v: v >= 0, "split_seed", "seed", "lora", "freeze_epochs", "stored_views")
        _require(self, "at least 1", lambda v: v is None or v >= 1, "image_stages", "text_layers")
        _require(self, "above 0 and at most 1", lambda v: 0 < v <= 1, "min_crop")
        _require(
            self, "at least 0 and below 1", lambda v: 0 <= v < 1, "dropout", "image_feature_dropout", "word_dropout"
        )
        _require(
            self, "at least 0.01 (the logits would explode) and finite", lambda v: 0.01 <= v < math.inf, "temperature"
        )
        _require(self, "from 0.5 to 4", lambda v: 0.5 <= v <= 4, "search_scale")
        _require(self, "from 0 to 1", lambda v: 0 <= v <= 1, "softness")
        _require(self, "from -1 to 1", lambda v: -1 <= v <= 1, "cosine_margin")
        _require(self, "above 0 and finite", lambda v: 0 < v < math.inf, "max_grad_norm")
        _require(
            self,
            "at least 0 and finite",
            lambda v: 0 <= v < math.inf,
            *(
                "alpha",
                "alpha_warmup_epochs",
                "margin",
                "lr_image",
                "lr_text",
                "lr_heads",
                "weight_decay",
                "warmup_epochs",
            ),
        )
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise ValueError(f"--save-every-steps must be at least 1, got {self.save_every_steps}")
        self._require_parts_that_fit()
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            bounds = f"from 1 to --batch-size ({self.batch_size})"
            raise ValueError(f"--micro-batch-size must be {bounds}, got {self.micro_batch_size}")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name):
            raise ValueError(f"--name must be a plain folder name, got {self.name!r}")

    def _require_parts_that_fit(self):
        if self.model is not None and (self.image_pooling, self.text_pooling) != ("own", "mean"):
            raise ValueError("--model brings its own pooling: leave out --image-pooling and --text-pooling")
        if self.lora and (self.image_stages or self.text_layers):
            raise ValueError("--lora trains adapters in the whole tower: leave out --image-stages and --text-layers")
        if self.word_dropout and self.freeze_text:
            raise ValueError("--word-dropout is for a text tower that trains: leave it or --freeze-text out")
        if self.stored_views and not (self.freeze_image or self.image_stages):
            raise ValueError("--stored-views keeps what frozen stages say: add --image-stages 1, or --freeze-image")
        if self.stored_views > 1 and not self.augment:
            raise ValueError("--no-augment leaves one view of a photo: --stored-views 1")
        if self.freeze_image and self.freeze_text:
            if self.lora:
                raise ValueError("--lora has no tower to adapt: leave out --freeze-image or --freeze-text")
            if self.heads == ("none", "none"):
                raise ValueError("nothing is left to train: add --image-head adaptor --text-head adaptor")

    @property
    def bias(self) -> float | None:
        """Where the learned bias of the sigmoid loss starts (arXiv 2303.15343, section 3.2)."""
        return -10.0 if self.objective == "sigmoid" else None

    @property
    def heads(self) -> tuple[str, str]:
        """The kinds of the image head and the text head."""
        own = "residual" if self.model is None else "none"
        return tuple(own if head == "auto" else head for head in (self.image_head, self.text_head))

    @property
    def views(self) -> int:
        """How many views of each photo are stored, 0 where photos are read anew; two frozen towers need one."""
        return self.stored_views or int(self.freeze_image and self.freeze_text)


# What a run's weights and towers are, and no flag can change once they are trained.
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
# What a run that starts from another takes over from it.
MODEL_FIELDS = (*ARCHITECTURE, "image_size", "search_scale", "search_mirrored", "lora")

# What suits a data set better than the defaults above. A flag on the command line wins over this table.
PRESETS = {
    # Small towers from scratch: no download, and minutes on two CPU cores.
    "sample": {
        "pretrained": False,
        "image_encoder": "resnet10t",
        "image_size": 96,
        "min_crop": 0.9,
        "epochs": 40,
        "batch_size": 32,
        "lr_image": 1e-3,
        "lr_text": 1e-3,
        "lr_heads": 1e-3,
    },
}

# What docs/results.md found best for a data set, down to what trains. The rates are those the cosine would have had at
# the start; it has fallen by two thirds by the time that the towers are released.
RECIPES = {
    "flickr8k": {
        "text_encoder": "sentence-transformers/all-mpnet-base-v2",
        "embed_dim": 1024,
        "image_stages": 1,
        "text_layers": 6,
        "stored_views": 4,
        "captions_per_image": 2,
        "dropout": 0.5,
        "image_feature_dropout": 0.3,
        "word_dropout": 0.1,
        "search_scale": 8 / 7,
        "search_mirrored": True,
        "alpha": 1.0,
        "batch_size": 256,
        "epochs": 13,
        "freeze_epochs": 8,
        "warmup_epochs": 0.5,
        "lr_image": 3e-4,
        "lr_text": 4e-4,
        "lr_heads": 1e-3,
    },
}
# A run that says itself what trains, by one of these, is none of them.
FLAGS_WITHOUT_RECIPE = ("--start-from", "--no-pretrained", "--freeze-image", "--freeze-text", "--lora")


# What suits a pretrained pair: it has learned the task already, and large steps make it forget.
PAIR_PRESET = {"lr_image": 5e-6, "lr_text": 5e-6}


def default_config(dataset: str, model: str | None = None, *, recipe: bool = True) -> Config:
    """The configuration before any flag: Config's defaults and the preset of the data set, or of a pretrained pair;
    with `recipe` also the data set's recipe."""
    if model is not None:
        return Config(dataset=dataset, model=model, **PAIR_PRESET)
    preset = PRESETS.get(dataset, {}) | (RECIPES.get(dataset, {}) if recipe else {})
    return Config(dataset=dataset, **preset)


def _require(config, bounds, holds, *names):
    for name in names:
        value = getattr(config, name)
        if not holds(value):
            raise ValueError(f"--{name.replace('_', '-')} must be {bounds}, got {value}")
