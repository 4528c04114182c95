"""Training of Orrery in stages, as for real VLMs: the vision tower first, then the whole model.

Stage 1 trains the SigLIP tower on the facts of the scenes with linear heads over its pooled patches. Then the VLM
learns packed questions (loss on every answer token), the tower at a fraction of the rate.

Accuracy is reported per question group, next to the accuracy with pictures shuffled between the questions. An answer is
right if every token of it is the argmax (teacher forced; for one-word answers this is greedy decoding).

A further term, `Need`, makes answers need the decoder's MLPs. Let m be the mean output of each MLP at a token over the
pictures of the training so far, under the same words, and p_m the answer that the model gives with all MLP outputs at
some positions replaced by m in one forward. The term is the cross-entropy of p_m with the answer prior q of the
question (running counts of its answers):
    need = - sum_a q(a) log p_m(a),
least where nothing of the picture is left in p_m. Without it a tower recognises and attention carries, and MLP features
explain little (docs/anatomy.md). Even steps replace MLPs at soft tokens, odd steps at all positions. m and q are
constants for the gradient, so the term teaches embeddings, tower and attention what to leave to the MLPs.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmscope.core.artifacts import flat, folder_digest, write_json
from vlmscope.core.records import generator
from vlmscope.data.orrery import scenes as world
from vlmscope.data.orrery.dataset import ScenePool
from vlmscope.data.orrery.rendering import hand_scene, make_scene
from vlmscope.models.base import token_strings
from vlmscope.models.orrery import OrreryConfig, build_orrery, build_processor, take_weights
from vlmscope.training.batches import IGNORE, PackedBatch, pack
from vlmscope.training.config import OrreryTrainingConfig, StageConfig, rate_factor
from vlmscope.training.resume import Checkpoints, fit_or_interrupt, uninterrupted

_BATCH = 50  # scenes
_ALL = 100  # more questions than any scene has, so that all are asked
_SIX = 200  # hands with six fingers
_LR_FLOOR = 0.02  # of the peak rate, at the last step
_VAL_SCENES = 200
_STAGES = ("tower", "vlm", "polish")  # folders of their checkpoints
# The fact that each linear head of stage 1 reads, and its classes
_THINGS = ("", *(f"{colour} {shape}" for colour in world.SHAPE_COLOURS for shape in world.SHAPES))
_HEADS: dict[str, tuple[str, ...]] = {
    "planet": tuple(world.PLANETS),
    "first": tuple(world.NUMBERS[:10]),
    "second": tuple(world.NUMBERS[:10]),
    "count": tuple(world.NUMBERS[1:7]),
    "shape": world.SHAPES,
    "shape_colour": tuple(world.SHAPE_COLOURS),
    "fingers": tuple(world.NUMBERS[1:7]),
    # of composed scenes
    "left": tuple(world.PLANETS),
    "right": tuple(world.PLANETS),
    "first_colour": tuple(world.SHAPE_COLOURS),
    "second_colour": tuple(world.SHAPE_COLOURS),
    **{f"thing_{slot}": _THINGS for slot in range(4)},
}


@torch.no_grad()
def accuracy(module: Any, scenes: list[world.Scene], shuffle_images: bool = False) -> dict[str, float]:
    """Fraction of right answers of a `VlmModule` by question group, on scenes of one kind.

    `shuffle_images` gives each question the picture of another scene, so that only a text prior can be right.
    """
    right: dict[str, list[bool]] = {}
    for start in range(0, len(scenes), _BATCH):
        batch = module.collate(scenes[start : start + _BATCH], start, _ALL)
        if shuffle_images:
            # Rotating by half the batch gives every scene another picture.
            batch = replace(batch, pixels=batch.pixels.roll(max(len(batch.pixels) // 2, 1), 0))
        states, labels = module.answer_states(batch)
        hits = module.model.lm_head(states).argmax(-1) == labels
        rows, columns = (batch.labels != IGNORE).nonzero(as_tuple=True)
        answers: dict[tuple[int, int], bool] = {}
        for row, column, hit in zip(rows.tolist(), columns.tolist(), hits.tolist(), strict=True):
            key = (row, int(batch.segments[row, column]))
            answers[key] = answers.get(key, True) and hit
        for (row, segment), is_right in answers.items():
            right.setdefault(batch.asked[row][segment - 1].group, []).append(is_right)
    return {group: float(np.mean(values)) for group, values in sorted(right.items())}


@torch.no_grad()
def six_finger_answers(module: Any) -> dict[str, float]:
    """Fraction of each answer to six-fingered hands, which training never shows."""
    scenes = [hand_scene(generator(0, "six", i), 6) for i in range(_SIX)]
    scenes = [replace(scene, questions=tuple(q for q in scene.questions if q.group == "fingers")) for scene in scenes]
    six, answers = module.tokenizer.convert_tokens_to_ids(world.NUMBERS[6]), Counter()
    for start in range(0, _SIX, _BATCH):
        states, labels = module.answer_states(module.collate(scenes[start : start + _BATCH], start, _ALL))
        top = module.model.lm_head(states[labels == six]).argmax(-1)
        answers.update(token_strings(module.tokenizer, top.tolist()))
    return {word: n / _SIX for word, n in answers.most_common()}


class ScheduledModule(pl.LightningModule, ABC):
    """Base of all stages: the step count, AdamW with two rates, and the schedule."""

    counters: tuple[str, ...] = ("steps_done",)

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self._optimizer: torch.optim.Optimizer | None = None
        self.steps_done = 0

    @abstractmethod
    def collate(self, scenes: list[world.Scene], step: int) -> Any:
        """A batch of these scenes."""

    def tower_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn at `tower_rate` of the rate."""
        return []

    def parts(self) -> dict[str, nn.Module]:
        """The whole module, as one file of a checkpoint."""
        return {"module": self}

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave the batch where it is: training is on the CPU."""
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser, which exists before fitting so that a checkpoint can be loaded into it."""
        return self.optimizer

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW in which matrices decay and vectors do not; made at first use, when a stage has all its parameters."""
        if self._optimizer is not None:
            return self._optimizer
        slow = {id(p) for p in self.tower_parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in self.parameters():
            groups.setdefault((id(p) in slow, p.ndim >= 2), []).append(p)
        settings = [
            {
                "params": params,
                "scale": self.config.tower_rate if is_slow else 1.0,
                "weight_decay": self.config.weight_decay if decays else 0.0,
            }
            for (is_slow, decays), params in groups.items()
        ]
        self._optimizer = torch.optim.AdamW(settings, lr=self.config.lr, betas=(0.9, 0.98))
        return self._optimizer

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set each group's rate from the step."""
        factor = rate_factor(self.steps_done, self.config.max_steps, self.config.warmup, _LR_FLOOR)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.config.lr * factor * group["scale"]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Count steps here: callbacks run before the module's own `on_train_batch_end`."""
        with uninterrupted():
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            self.steps_done += 1

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss at our own step count, since Lightning's restarts on resume."""
        if self.steps_done % 20 == 0 and self.logger is not None:
            self.logger.log_metrics({"train/loss": float(outputs["loss"])}, step=self.steps_done)


class _Reader(nn.Module):
    """Two heads for a fact: one attends to soft tokens with one query, as a later layer will, one is linear over all.

    The latter learns faster, but lets each token have a code of its own, which a question's one query cannot read.
    """

    def __init__(self, tokens: int, width: int, classes: int) -> None:
        super().__init__()
        self.query, self.values = nn.Linear(width, 1), nn.Linear(width, classes)
        self.grid = nn.Linear(tokens * width, classes)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, classes] of the linear head and of the attending one from soft tokens [B, S, d]."""
        return self.grid(tokens.flatten(1)), self.values((self.query(tokens).softmax(1) * tokens).sum(1))


class TowerModule(ScheduledModule):
    """Stage 1: the SigLIP tower, and `depth` layers of the decoder, with heads that read facts of the picture.

    Without decoder layers the heads are linear over the flattened grid of pooled patches; else they are `_Reader` of
    the decoder's normed soft tokens.
    """

    def __init__(self, config: StageConfig, model: Any, tokenizer: Any, kinds: Sequence[str], depth: int = 0) -> None:
        super().__init__(config)
        projector, decoder = model.model.multi_modal_projector, model.model.language_model
        self.tower, self.pool, self.side = model.model.vision_tower, projector.avg_pool, projector.patches_per_image
        self.depth, self.kinds = depth, kinds
        if depth:
            self.front = nn.ModuleList([projector, decoder.embed_tokens, decoder.norm, *decoder.layers[:depth]])
        self._whole = (model, tokenizer)  # in a tuple, so that it is no part of this module
        width = model.config.vision_config.hidden_size
        soft = (self.side // int(self.pool.kernel_size)) ** 2
        known = {name for kind in kinds if kind != "text" for name in make_scene("train", kind, 0).facts}
        heads = {name: classes for name, classes in _HEADS.items() if name in known}
        self.heads = nn.ModuleDict(
            {
                name: _Reader(soft, decoder.config.hidden_size, len(c)) if depth else nn.Linear(soft * width, len(c))
                for name, c in heads.items()
            }
        )

    def collate(self, scenes: list[world.Scene], step: int) -> tuple[PackedBatch, dict[str, Tensor]]:
        """Pictures without questions, and the class of each head (-1 if the scene has no such fact)."""
        targets = {
            name: torch.tensor([_HEADS[name].index(s.facts[name]) if name in s.facts else -1 for s in scenes])
            for name in self.heads
        }
        model, tokenizer = self._whole
        assert all(s.image is not None for s in scenes), "stage 1 takes scenes with pictures only"
        rng = generator(self.config.seed, "pack", step)
        return pack(scenes, tokenizer, model.config.mm_tokens_per_image, rng, max_questions=0), targets

    def training_step(self, batch: tuple[PackedBatch, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Mean over all (picture, fact) pairs of the cross-entropy."""
        return self.losses(batch)[0]

    def losses(self, batch: tuple[PackedBatch, dict[str, Tensor]]) -> tuple[Tensor, dict[str, tuple[int, int]]]:
        """The loss and, for each head, the numbers of right answers and of questions."""
        pictures, targets = batch
        if self.depth:
            model = self._whole[0]
            states = run_packed(model, pictures, depth=self.depth).last_hidden_state
            features = states[pictures.input_ids == model.config.image_token_id].unflatten(0, (len(states), -1))
        else:
            states = self.tower(pixel_values=pictures.pixels).last_hidden_state
            grid = states.transpose(1, 2).unflatten(2, (self.side, self.side))
            features = self.pool(grid).flatten(1)  # pooled patch states [B, soft * width]
        total, n_questions, right = features.new_zeros(()), 0, {}
        for name, target in targets.items():
            mask = target >= 0
            count = int(mask.sum())
            if count == 0:
                continue
            logits = self.heads[name](features[mask])
            if self.depth:
                grid, logits = logits
                total = total + F.cross_entropy(grid, target[mask], reduction="sum")
            total = total + F.cross_entropy(logits, target[mask], reduction="sum")
            right[name] = (int((logits.argmax(-1) == target[mask]).sum()), count)
            n_questions += count
        return total / max(n_questions, 1), right


def run_packed(model: Any, batch: PackedBatch, with_hidden: bool = False, depth: int | None = None) -> Any:
    """The decoder's output on a packed batch, or that of its first `depth` layers."""
    inner, config = model.model, model.config.text_config
    states = inner.get_input_embeddings()(batch.input_ids)
    if len(batch.pixels):
        soft = inner.get_image_features(batch.pixels).pooler_output
        is_soft = (batch.input_ids == model.config.image_token_id).unsqueeze(-1).expand_as(states)
        states = states.masked_scatter(is_soft, soft.to(states.dtype))
    full, sliding = batch.masks(config.sliding_window, model.config.image_token_id)
    whole = inner.language_model.config.num_hidden_layers
    try:
        inner.language_model.config.num_hidden_layers = whole if depth is None else depth
        return inner.language_model(
            inputs_embeds=states,
            attention_mask={"full_attention": full, "sliding_attention": sliding},
            position_ids=batch.position_ids,
            output_hidden_states=with_hidden,
        )
    finally:
        inner.language_model.config.num_hidden_layers = whole


RATE = 0.03  # least share of a step in the running means: they follow the drifting outputs
_WIDTH = 32  # tokens of a prefix, or of a question with its answer, at most
_KINDS = (*world.KINDS, *world.COMPOSED)
# Questions by group and wording; those of composed scenes, and all captions, share their means.
_ASKED = [(group, wording) for group, wordings in world.QUESTIONS.items() for wording in wordings]
_ASKED += [(group, "") for group in world.COMPOSED_QUESTIONS] + [
    ("caption", wording) for wording in world.CAPTION_PROMPTS
]
_ASKED += [("text", "")]
_GROUPS = tuple(dict.fromkeys(group for group, _ in _ASKED))


class Need(nn.Module):
    """Running means of MLP outputs by layer and context, and answer priors by question; they are saved with a stage."""

    means: Tensor  # [L, contexts, d]
    seen: Tensor  # [contexts], in how many steps
    answers: Tensor  # [groups, V], how often

    def __init__(self, n_layers: int, d_model: int, n_words: int) -> None:
        super().__init__()
        contexts = (len(_KINDS) + len(_ASKED)) * _WIDTH
        self.register_buffer("means", torch.zeros(n_layers, contexts, d_model))
        self.register_buffer("seen", torch.zeros(contexts))
        self.register_buffer("answers", torch.zeros(len(_GROUPS), n_words))

    def contexts(self, batch: PackedBatch) -> Tensor:
        """[B, T] int64, the row of `means` of each token: its kind and place, or its question and place in it."""
        rows = torch.zeros_like(batch.input_ids)
        place = torch.arange(batch.input_ids.shape[1]).expand_as(rows)
        for row, kind in enumerate(batch.kinds):
            segments = batch.segments[row]
            prefix = segments <= 0  # padding too, whose outputs nobody reads
            rows[row, prefix] = _KINDS.index(kind) * _WIDTH + place[row, prefix].clamp(max=_WIDTH - 1)
            for number, question in enumerate(batch.asked[row], start=1):
                inside = segments == number
                first = (len(_KINDS) + _asked(question.group, question.question)) * _WIDTH
                rows[row, inside] = first + torch.arange(int(inside.sum())).clamp(max=_WIDTH - 1)
        return rows

    @torch.no_grad()
    def follow(self, outputs: Sequence[Tensor], contexts: Tensor, batch: PackedBatch) -> None:
        """Move the means towards this step's outputs [B, T, d], a tensor per layer, and count its answers."""
        alive = batch.segments >= 0
        rows, where = contexts[alive].unique(return_inverse=True)
        counts = torch.bincount(where, minlength=len(rows)).float()
        self.seen[rows] += 1
        rate = (1 / self.seen[rows]).clamp(min=RATE)[:, None]
        for means, out in zip(self.means, outputs, strict=True):
            sums = torch.zeros(len(rows), out.shape[-1]).index_add_(0, where, out[alive].float())
            means[rows] += rate * (sums / counts[:, None] - means[rows])
        groups, _, labels = answers(batch)
        self.answers.index_put_((groups, labels), torch.ones(len(labels)), accumulate=True)

    def loss(self, logits: Tensor, groups: Tensor) -> Tensor:
        """Mean cross-entropy of the answers' priors and logits [N, V] with the means in place."""
        priors = self.answers[groups]
        priors = priors / priors.sum(-1, keepdim=True).clamp(min=1)
        return -(priors * logits.float().log_softmax(-1)).sum(-1).mean()


def _asked(group: str, wording: str) -> int:
    if group.startswith("text"):
        return _ASKED.index(("text", ""))
    return _ASKED.index((group, "" if group in world.COMPOSED_QUESTIONS else wording))


def answers(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each answer of one word about a picture: its group's number [N], its place [B, T] bool, its label [N]."""
    first = (batch.labels != IGNORE) & (batch.labels.roll(1, 1) == IGNORE)
    groups = torch.full_like(batch.input_ids, -1)
    for row, asked in enumerate(batch.asked):
        for number, question in enumerate(asked, start=1):
            if question.group in _GROUPS and question.group != "caption":
                groups[row, batch.segments[row] == number] = _GROUPS.index(question.group)
    place = first & (groups >= 0)
    return groups[place], place, batch.labels[place]


def pictured(batch: PackedBatch, contexts: Tensor, soft_id: int, step: int) -> tuple[PackedBatch, Tensor]:
    """Every other row with a picture, by turns, and their contexts."""
    has = (batch.input_ids == soft_id).any(1)
    numbers = has.nonzero()[:, 0]
    chosen = torch.arange(len(numbers)) % 2 == step // 2 % 2
    rows = numbers[chosen]
    part = {name: getattr(batch, name)[rows] for name in ("input_ids", "position_ids", "segments", "labels")}
    kinds, asked = ([of[row] for row in rows.tolist()] for of in (batch.kinds, batch.asked))
    return replace(batch, **part, kinds=kinds, asked=asked, pixels=batch.pixels[chosen]), contexts[rows]


@contextmanager
def listening(mlps: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the detached outputs of modules that run in this order."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for mlp in mlps:
            stack.callback(mlp.register_forward_hook(lambda _m, _a, out: outputs.append(out.detach())).remove)
        yield outputs


@contextmanager
def averaged(mlps: Sequence[nn.Module], means: Tensor, contexts: Tensor, where: Tensor) -> Iterator[None]:
    """Replace outputs of the modules by `means` [L, rows, d] of `contexts` [B, T] at `where` [B, T] bool."""
    with ExitStack() as stack:
        for mlp, table in zip(mlps, means, strict=True):

            def hook(_m: Any, _a: Any, out: Tensor, table: Tensor = table) -> Tensor:
                return torch.where(where[..., None], table[contexts].to(out.dtype), out)

            stack.callback(mlp.register_forward_hook(hook).remove)
        yield


class VlmModule(ScheduledModule):
    """Second and third stage: all of Orrery on packed questions."""

    def __init__(self, config: StageConfig, model: Any, tokenizer: Any) -> None:
        super().__init__(config)
        self.model, self.tokenizer = model, tokenizer
        self.soft_tokens = model.config.mm_tokens_per_image
        text = model.config.text_config
        sizes = (text.num_hidden_layers, text.hidden_size, text.vocab_size)
        self.need = Need(*sizes) if config.need_weight > 0 else None

    def tower_parameters(self) -> list[nn.Parameter]:
        """The vision tower, which is already trained and so learns more slowly."""
        return list(self.model.model.vision_tower.parameters())

    def collate(self, scenes: list[world.Scene], step: int, questions: int | None = None) -> PackedBatch:
        """Pack a batch, at most `questions` of a scene (None: the stage's number); the draw depends on the step."""
        rng = generator(self.config.seed, "pack", step)
        return pack(scenes, self.tokenizer, self.soft_tokens, rng, questions or self.config.questions)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Cross-entropy over answer tokens, plus `exit_weight` times that of answers read up to `exit_layers` early.

        This early-exit loss (LayerSkip, arXiv 2404.16710, eq. 5) reads the residual stream through the final norm and
        unembedding. It makes the middle layers recognise; without it Orrery named planets only in its last MLP.
        """
        weight, early = self.config.exit_weight, self.config.exit_layers
        mlps = [layer.mlp for layer in self.model.model.language_model.layers]
        with listening(mlps if self.need is not None else []) as outputs:
            out = run_packed(self.model, batch, with_hidden=weight > 0 and early > 0)
        keep = batch.labels != IGNORE
        labels = batch.labels[keep]
        loss = F.cross_entropy(self.model.lm_head(out.last_hidden_state[keep]), labels)
        norm = self.model.model.language_model.norm
        # the last entry is the normed output itself
        for states in out.hidden_states[-1 - early : -1] if out.hidden_states is not None else ():
            loss = loss + weight * F.cross_entropy(self.model.lm_head(norm(states[keep])), labels)
        if self.need is None or not len(batch.pixels):
            return loss
        contexts = self.need.contexts(batch)
        self.need.follow(outputs, contexts, batch)
        soft_id, step = self.model.config.image_token_id, self.steps_done
        part, contexts = pictured(batch, contexts, soft_id, step)
        where = part.input_ids == soft_id if step % 2 == 0 else torch.ones_like(part.input_ids, dtype=torch.bool)
        with averaged(mlps, self.need.means, contexts, where):
            states = run_packed(self.model, part).last_hidden_state
        groups, places, _ = answers(part)
        need = self.need.loss(self.model.lm_head(states[places]), groups)
        self.parts_of_loss = (loss.item(), need.item())
        return loss + self.config.need_weight * need

    def answer_states(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Final states [N, d] and labels [N] at the positions that predict answer tokens."""
        keep = batch.labels != IGNORE
        return run_packed(self.model, batch).last_hidden_state[keep], batch.labels[keep]


class ValidationCallback(pl.Callback):
    """Logs what `measure` returns every `every` of our own steps and at the end."""

    def __init__(self, every: int, total: int, measure: Any) -> None:
        self.every, self.total, self.measure = every, total, measure

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if pl_module.steps_done % self.every and pl_module.steps_done != self.total:
            return
        pl_module.eval()
        metrics = self.measure()
        pl_module.train()
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, step=pl_module.steps_done)
        shown = ", ".join(f"{k.split('/')[-1]} {v:.3f}" for k, v in metrics.items())
        print(f"\nstep {pl_module.steps_done}: {shown}", flush=True)


def train_orrery(
    data: Path | None,
    kinds: Sequence[str],
    architecture: OrreryConfig,
    config: OrreryTrainingConfig,
    run_dir: Path,
    logger: Any,
    resume: bool,
    test_scenes: int | None = None,
) -> dict[str, float]:
    """Train the tower, then the VLM on Orrery's scenes; save to `run_dir/model`; return test metrics.

    The scenes are those of the shards in `data`, or rendered when it is None. With `resume` the stages continue from
    the checkpoints in `run_dir`, which are removed otherwise. `logger` is Lightning's, or False; `test_scenes` of each
    kind are tested (None: all).
    """
    processor = build_processor(world.vocabulary(kinds), architecture.image_size, architecture.soft_tokens)
    stages = {key: value for key, value in asdict(config).items() if key not in ("checkpoint_every", "val_every")}
    settings = flat("training", stages) | flat("architecture", asdict(architecture))
    origin = {"data": "rendered" if data is None else folder_digest(data)}
    if not resume:  # else this run could later resume from another run's checkpoint of a later stage
        for stage in _STAGES:
            shutil.rmtree(run_dir / stage, ignore_errors=True)
    model = build_orrery(architecture, len(processor.tokenizer), config.tower.seed)
    if config.start is not None:
        take_weights(model, processor.tokenizer, config.start)
    pools = {split: ScenePool(data, split, tuple(kinds)) for split in world.SPLITS}

    def fit(name: str, module: ScheduledModule, measure: Callable[[], dict[str, float]]) -> None:
        total = module.config.max_steps
        checkpoints = Checkpoints(run_dir / name, config.checkpoint_every, total, settings, origin)
        if resume:
            checkpoints.restore(module)
        callbacks = [checkpoints, ValidationCallback(config.val_every, total, measure)]
        fit_stage(module, pools["train"], callbacks, logger, config.precision)

    tower = TowerModule(config.tower, model, processor.tokenizer, kinds, config.tower_depth)
    fit(_STAGES[0], tower, lambda: tower_accuracy(tower, pools["val"]))
    modules = [VlmModule(stage, model, processor.tokenizer) for stage in (config.vlm, config.polish)]
    for name, module in zip(_STAGES[1:], modules, strict=True):
        fit(name, module, partial(vlm_accuracy, module, pools["val"], _VAL_SCENES, prefix="val/accuracy/"))
    vlm = modules[-1]
    model.to(torch.bfloat16).to(torch.float32)  # what is shipped is bf16: measure that  # pyright: ignore[reportArgumentType]
    vlm.eval()
    metrics = vlm_accuracy(vlm, pools["test"], test_scenes, prefix="test/accuracy/")
    metrics |= vlm_accuracy(vlm, pools["test"], test_scenes, shuffle_images=True, prefix="test/accuracy_shuffled/")
    metrics |= {f"test/six_fingers/{word}": fraction for word, fraction in six_finger_answers(vlm).items()}
    folder = run_dir / "model"
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    processor.save_pretrained(folder)
    write_json(folder / "metrics.json", metrics)
    return metrics


@contextmanager
def float32_attention() -> Iterator[None]:
    """Keep attention in float32 under autocast: the backward of its bfloat16 kernel is three times slower on a CPU."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def wide(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return plain(module, query.float(), key.float(), value.float(), *args, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = wide
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def fit_stage(
    module: ScheduledModule, pool: Any, callbacks: list[pl.Callback], logger: Any, precision: str = "32"
) -> None:
    """Run the remaining steps of a stage."""
    trainer = pl.Trainer(
        max_steps=-1,
        max_epochs=1,
        accelerator="cpu",
        precision=precision,  # pyright: ignore[reportArgumentType]
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=module.config.clip,
        callbacks=callbacks,
        log_every_n_steps=20,
    )
    config = module.config
    if module.steps_done < config.max_steps:
        # From the next step on, so that resuming skips nothing.
        steps = range(module.steps_done, config.max_steps)
        batches = (module.collate(pool.batch(config.seed, step, config.batch), step) for step in steps)
        with float32_attention() if precision != "32" else nullcontext():
            fit_or_interrupt(trainer, module, batches)


def tower_accuracy(tower: TowerModule, pool: ScenePool) -> dict[str, float]:
    """Validation accuracy of each head of stage 1."""
    right: dict[str, list[int]] = {}
    with torch.no_grad():
        for kind in (kind for kind in tower.kinds if kind != "text"):
            for name, counts in tower.losses(tower.collate(pool.scenes(kind, _VAL_SCENES), 0))[1].items():
                right[name] = [a + b for a, b in zip(right.get(name, (0, 0)), counts, strict=True)]
    return {f"val/tower_accuracy/{name}": hits / total for name, (hits, total) in right.items()}


def vlm_accuracy(
    vlm: VlmModule, pool: ScenePool, limit: int | None, shuffle_images: bool = False, prefix: str = ""
) -> dict[str, float]:
    """Accuracy of every question group of every kind, captions as `caption_<kind>`; `prefix` starts each name."""
    result: dict[str, float] = {}
    for kind in pool.samples:
        if shuffle_images and kind == "text":
            continue
        for group, value in accuracy(vlm, pool.scenes(kind, limit), shuffle_images).items():
            result[prefix + (f"caption_{kind}" if group == "caption" else group)] = value
    return result
