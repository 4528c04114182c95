"""Train a sparse transcoder for every layer of the model from one forward a batch; saved as a transcoder set."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError, bad_picture

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext

USES = ("data", "optim")
RANKS = True  # several processes can run it together
_CACHE_DTYPES = ("float32", "bfloat16", "float16")
MEMORY = "task.micro_tokens (which a resumed training may change), task.tokens_per_batch or transcoder.expansion_factor"


@dataclass
class Config:
    """What a batch is made of, and the loss for dead features. Sizes: transcoder=arch, optim, trainer.

    With data=orrery, `batch` says how many scenes of each kind, `val_scenes` how many of each for validation. With
    data=folder or a mix, a batch has about `tokens_per_batch` tokens, an example at most `max_tokens` (the rest is cut
    off), and `val_examples` at most are validated on. `matryoshka` lists fractions of the features that must do on
    their own; `sparsity_coefficient` weighs the penalty of transcoder.activation=jumprelu (L0, by default 1) and relu
    (L1, by default 0.003). `micro_tokens` bounds memory: so many tokens of a step are encoded and differentiated at a
    time, with the same result (null: all). `max_norm_ratio`, 10 for example, leaves tokens out of a layer's loss whose
    norm is so many times the median (null: none). `cache`, a folder, keeps the captured activations in `cache_dtype`
    (null: the model's): later runs on the same model and data read them instead of running the model (docs/data.md).
    With `epoch_batches` the first so many batches are gone through again and again (null: each is a new one). `license`
    goes into the set's card: an identifier of the hub, such as apache-2.0.
    """

    batch: dict[str, int] = field(
        default_factory=lambda: {"planets": 14, "digits": 18, "shapes": 12, "hands": 8, "text": 12}
    )
    val_scenes: int = 100
    tokens_per_batch: int = 2048
    max_tokens: int = 4096
    val_examples: int = 100
    init: str = "samples"
    pool_batches: int = 8
    steps_per_batch: int = 2
    micro_tokens: int | None = None
    aux_coefficient: float = 1 / 32
    aux_k: int = 64
    dead_after_tokens: int = 100_000
    matryoshka: list[float] = field(default_factory=list)
    sparsity_coefficient: float | None = None
    max_norm_ratio: float | None = None
    cache: str | None = None
    cache_dtype: str | None = None
    epoch_batches: int | None = None
    clip: float = 1.0
    license: str = "unknown"

    def __post_init__(self) -> None:
        for key in ("tokens_per_batch", "max_tokens", "val_examples"):
            if getattr(self, key) < 1:
                raise UserError(f"task.{key}={getattr(self, key)}: it must be at least 1")
        if self.cache_dtype not in (None, *_CACHE_DTYPES):
            raise UserError(f"task.cache_dtype={self.cache_dtype}: choose one of {', '.join(_CACHE_DTYPES)}, or null")
        if self.cache_dtype is not None and self.cache is None:
            raise UserError(f"task.cache_dtype={self.cache_dtype} without a cache; name its folder: task.cache=FOLDER")


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Train, save to `<run_dir>/transcoders`, and report FVU, L0, dead features and the change of cross-entropy."""
    from vlmscope.config.schema import TranscoderArchConfig
    from vlmscope.core.artifacts import read_json, write_json, write_text
    from vlmscope.core.origin import folder_digest
    from vlmscope.report.training_figures import fvu_by_layer
    from vlmscope.tasks.transcoders.activation_cache import cache_settings, rounding
    from vlmscope.tasks.transcoders.batches import batches_for
    from vlmscope.tasks.transcoders.cards import training_card
    from vlmscope.tasks.wiring import load_model
    from vlmscope.training.config import PRECISIONS
    from vlmscope.training.ranks import own_share
    from vlmscope.training.transcoder_training import train_transcoders
    from vlmscope.transcoders.formats import save_set
    from vlmscope.transcoders.hub import CARD

    if not isinstance(cfg.transcoder, TranscoderArchConfig):
        raise UserError("training needs an architecture, not a trained set: add transcoder=arch")
    if cfg.trainer.precision not in PRECISIONS:
        raise UserError(f"trainer.precision={cfg.trainer.precision}: transcoders take {' or '.join(PRECISIONS)}")
    training_config(cfg).check()
    origin = _origin(cfg) if context.per_host is None or own_share().index == 0 else {}
    unread = context.run_dir / "unread_picture.json"
    if cfg.trainer.resume and unread.is_file() and cfg.data.path is not None and origin:
        stopped = read_json(unread)
        if folder_digest(cfg.data.path, Path(stopped["picture"])) == stopped["others"]:
            origin |= {"data.files": stopped["data.files"]}  # as they were, but for the picture that is mended
    vlm, source = batches_for(cfg, lambda: load_model(cfg), context.run_dir)
    data = ", ".join(words for words in (source.settings, rounding(cfg)) if words is not None) or None
    try:
        transcoders, metrics = train_transcoders(
            vlm,
            source.train,
            source.val,
            training_config(cfg, data),
            context.run_dir,
            context.tracked.lightning_logger(),
            cfg.trainer.resume,
            per_host=cfg.trainer.per_host or context.per_host,
            data_figures=source.figures,
            cache=cache_settings(cfg, source.settings),
            origin=origin,
        )
    except UserError as error:
        picture = bad_picture(error)
        if picture is not None and cfg.data.path is not None and "data.files" in origin:
            others = folder_digest(cfg.data.path, picture)
            write_json(unread, {"picture": str(picture), "others": others, "data.files": origin["data.files"]})
        raise
    unread.unlink(missing_ok=True)
    save_set(transcoders, context.run_dir / "transcoders", dtype="bfloat16")
    write_text(context.run_dir / "transcoders" / CARD, training_card(cfg, training_config(cfg), transcoders, metrics))
    layers = range(vlm.adapter.n_layers)
    series = {
        name: [metrics[f"layers/{key}/layer_{i:02d}"] for i in layers]
        for name, key in (("all tokens", "fvu"), ("text", "fvu_text"), ("image", "fvu_image"))
        # Without pictures there is no figure for them.
        if all(f"layers/{key}/layer_{i:02d}" in metrics for i in layers)
    }
    dead = [metrics[f"layers/dead_frac/layer_{i:02d}"] for i in layers]
    fvu_by_layer(series, dead, context.run_dir / "figures" / "fvu_by_layer.png")
    return metrics


def _origin(cfg: "AppConfig") -> dict[str, Any]:
    """What decides the set besides `training_config`, but for what says how it is made and by whom."""
    from vlmscope.core.origin import flat
    from vlmscope.tasks.origin import data_origin, model_origin

    task = {key: value for key, value in asdict(cfg.task).items() if key not in ("cache", "micro_tokens", "license")}
    return model_origin(cfg) | data_origin(cfg) | flat("task", task) | {"seed": cfg.seed}


def training_config(cfg: "AppConfig", data: str | None = None):
    """The settings of `vlmscope.training` from the groups transcoder, optim, trainer and this task; `data` as there."""
    from vlmscope.config.schema import TranscoderArchConfig
    from vlmscope.training.config import TranscoderTrainingConfig

    task: Config = cfg.task
    arch: TranscoderArchConfig = cfg.transcoder
    sparsity = task.sparsity_coefficient
    if sparsity is None:  # L1 is of the activations' size, L0's penalty of 1's
        sparsity = 0.003 if arch.activation == "relu" else 1.0
    return TranscoderTrainingConfig(
        expansion_factor=arch.expansion_factor,
        k=arch.k,
        activation=arch.activation,
        skip=arch.skip,
        cross_layer=arch.cross_layer,
        bandwidth=arch.bandwidth,
        matryoshka=tuple(task.matryoshka),
        sparsity_coefficient=sparsity,
        init=task.init,
        pool_batches=task.pool_batches,
        steps_per_batch=task.steps_per_batch,
        epoch_batches=task.epoch_batches,
        micro_tokens=task.micro_tokens,
        precision=cfg.trainer.precision,
        max_norm_ratio=task.max_norm_ratio,
        max_steps=cfg.trainer.max_steps,
        lr=cfg.optim.lr,
        betas=(cfg.optim.betas[0], cfg.optim.betas[1]),
        weight_decay=cfg.optim.weight_decay,
        schedule=cfg.optim.schedule,
        warmup=cfg.optim.warmup,
        clip=task.clip,
        aux_coefficient=task.aux_coefficient,
        aux_k=task.aux_k,
        dead_after_tokens=task.dead_after_tokens,
        checkpoint_every=cfg.trainer.checkpoint_every,
        val_every=cfg.trainer.val_every,
        log_every=cfg.trainer.log_every,
        seed=cfg.seed,
        data=data,
    )
