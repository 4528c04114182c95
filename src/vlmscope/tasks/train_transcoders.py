"""Train a sparse transcoder for every layer of the model from one forward a batch; saved as a transcoder set."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext


@dataclass
class Config:
    """What a batch is made of (scenes of each kind), and the loss for dead features. Sizes: transcoder=arch, optim,
    trainer.
    """

    batch: dict[str, int] = field(
        default_factory=lambda: {"planets": 14, "digits": 18, "shapes": 12, "hands": 8, "text": 12}
    )
    val_scenes: int = 100
    init: str = "samples"
    pool_batches: int = 8
    steps_per_batch: int = 2
    aux_coefficient: float = 1 / 32
    aux_k: int = 64
    dead_after_tokens: int = 100_000
    clip: float = 1.0


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Train, save to `<run_dir>/transcoders`, and report FVU, L0, dead features and the change of cross-entropy."""
    from pathlib import Path

    from vlmscope.config.schema import TranscoderArchConfig
    from vlmscope.core.errors import UserError
    from vlmscope.core.seeds import generator
    from vlmscope.data.chat import chat_batch
    from vlmscope.data.orrery.dataset import ScenePool
    from vlmscope.data.orrery.scene import KINDS
    from vlmscope.report.training_figures import fvu_by_layer
    from vlmscope.tasks.wiring import load_model
    from vlmscope.training.transcoder_training import train_transcoders
    from vlmscope.transcoders.formats import save_set

    if not isinstance(cfg.transcoder, TranscoderArchConfig):
        raise UserError("training needs an architecture, not a trained set: add transcoder=arch")
    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder with Orrery's shards (task=build_data writes them)")
    task: Config = cfg.task
    config = training_config(cfg)
    config.check()
    train, val = (ScenePool(Path(cfg.data.path), split) for split in ("train", "val"))
    vlm = load_model(cfg)
    soft = int(vlm.processor.image_seq_length)

    def batch(step: int) -> dict:
        return chat_batch(
            train.batch(cfg.seed, step, task.batch), vlm.tokenizer, soft, generator(cfg.seed, "chat", step)
        )

    val_batches = [
        chat_batch(val.scenes(kind, task.val_scenes), vlm.tokenizer, soft, generator(cfg.seed, "val", kind))
        for kind in KINDS
    ]
    transcoders, metrics = train_transcoders(
        vlm,
        batch,
        val_batches,
        config,
        context.run_dir,
        context.tracked.lightning_logger(),
        cfg.trainer.resume,
    )
    save_set(transcoders, context.run_dir / "transcoders", dtype="bfloat16")
    layers = range(vlm.adapter.n_layers)
    series = {
        name: [metrics[f"layers/{key}/layer_{i:02d}"] for i in layers]
        for name, key in (("all tokens", "fvu"), ("text", "fvu_text"), ("image", "fvu_image"))
    }
    dead = [metrics[f"layers/dead_frac/layer_{i:02d}"] for i in layers]
    fvu_by_layer(series, dead, context.run_dir / "figures" / "fvu_by_layer.png")
    return metrics


def training_config(cfg: "AppConfig"):
    """The settings of `vlmscope.training` from the groups transcoder, optim, trainer and this task."""
    from vlmscope.config.schema import TranscoderArchConfig
    from vlmscope.training.transcoder_config import TranscoderTrainingConfig

    task: Config = cfg.task
    arch: TranscoderArchConfig = cfg.transcoder
    return TranscoderTrainingConfig(
        expansion_factor=arch.expansion_factor,
        k=arch.k,
        activation=arch.activation,
        skip=arch.skip,
        init=task.init,
        pool_batches=task.pool_batches,
        steps_per_batch=task.steps_per_batch,
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
    )
