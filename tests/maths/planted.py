"""Tiny models whose circuit is known, since every weight that matters is set by hand (as InterpBench does it, arXiv
2407.14494).

A Gemma 3 decoder of three layers whose MLPs *are* transcoders. Two prompts differ in one word; attention is uniform and
carries only some directions. On the clean side (and, with other directions, on the corrupt one):

    word --u--> A (layer 0, question) --attention--> B, I (layer 1, last) ; B --> C (layer 2, last) --> answer
                                                     I --> minus the answer

Everything else is a distractor, active and correlated with the word: D (large decoder norm, read by nothing), G (reads
A, is read by nothing), H (reads B, likewise), E (moves both answers alike), and B, C, I at all other positions after
the word. A large constant in the stream keeps norm scales nearly fixed.

Other kinds of circuit: `copying`, in which attention brings u to the last position and C reads it there (no A, B);
`redundant`, with a second, stronger path A2, B2, C2 beside the first (no I). With `says`, the answers are also what the
model says, and where neither is written it says a third word.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlmscope.circuits.discovery.nodes import ANSWER, Kind, Nodes
from vlmscope.circuits.pairs import PairSubject, pair_subject
from vlmscope.core.records import generator
from vlmscope.models.base import ModelInputs
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3
from vlmscope.scope import Scope
from vlmscope.transcoders.config import TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet

D, WIDTH, CONSTANT = 48, 40, 10.0
LOUD = 10  # how much louder answers are that have to be said: the constant leaves little else in the last norm
PROMPTS = (
    ("what is this {} ?", "red", "blue"),
    ("what is the {} ?", "red", "blue"),
    ("is this the {} ?", "red", "blue"),
)
ANSWERS = ("one", "two")
NEITHER = "planet"
KINDS = ("two steps", "copying", "redundant")
COPIES = 4  # of each kind of distractor


@dataclass(frozen=True)
class Planted:
    """The model, its pairs and the truth: features by name, `(layer, role, index)`, and edges between names."""

    scope: Scope
    subject: PairSubject
    features: dict[str, tuple[int, str, int]]
    edges: set[tuple[str, str]]

    def node(self, nodes: Nodes, name: str) -> int:
        if name == "answer":
            return ANSWER
        if name == "word":
            return nodes.rows()[Kind.EMBEDDING, -1, nodes.roles.index("question"), -1]
        layer, role, index = self.features[name]
        return nodes.rows()[Kind.FEATURE, layer, nodes.roles.index(role), index]

    def truth(self, nodes: Nodes) -> np.ndarray:
        """[N] bool: the causal nodes."""
        out = np.zeros(len(nodes), bool)
        out[[self.node(nodes, name) for name in ("word", *self.features)]] = True
        return out

    def true_edges(self, nodes: Nodes) -> set[tuple[int, int]]:
        return {(self.node(nodes, source), self.node(nodes, target)) for source, target in self.edges}


class _TranscoderMLP(nn.Module):
    """An MLP that is its transcoder."""

    def __init__(self, transcoder: Transcoder) -> None:
        super().__init__()
        self.transcoder = transcoder

    def forward(self, x: Tensor) -> Tensor:
        return self.transcoder(x).reconstruction


def planted(seed: int, inhibition: float = 0.4, kind: str = "two steps", says: bool = False) -> Planted:
    """A planted circuit; the seed draws directions, feature numbers and which of the two words is the clean one.

    Edges are listed of the kind "two steps" alone.
    """
    assert kind in KINDS, kind
    rng = generator(seed, "planted")
    directions = torch.from_numpy(np.linalg.qr(rng.standard_normal((D, D)))[0].T)
    names = ["const", "u", "u'", "a", "a'", "b", "b'", "y", "y'", "both"]
    names += ["a2", "a2'", "b2", "b2'"] if kind == "redundant" else []
    at = {name: directions[i] for i, name in enumerate(names)}
    junk = iter(directions[len(names) :])
    vlm = tiny_gemma3(
        seed, text_only=True, d_model=D, n_heads=1, n_kv_heads=1, head_dim=D, layer_types=("full_attention",) * 3,
        dtype=torch.float64,
    )  # fmt: skip
    model = vlm.model
    words = ("red", "blue")[:: rng.choice([1, -1])]
    _set_embeddings(vlm, at, words, rng, says)
    _set_attention(vlm, at, ("u", "u'") if kind == "copying" else ("a", "a'", "a2", "a2'"))
    free = {layer: rng.permutation(WIDTH).tolist() for layer in range(3)}
    transcoders, features = {}, {}
    for layer in range(3):
        transcoder = Transcoder(TranscoderConfig(D, WIDTH, 8, layer, "relu"), dtype=torch.float64).requires_grad_(False)
        transcoder.b_dec.add_(4 * CONSTANT * at["const"])
        transcoders[layer] = transcoder
        model.model.layers[layer].mlp = _TranscoderMLP(transcoder)
    both = [[_prepare(vlm, form, word) for form, _, _ in PROMPTS] for word in words]
    for layer, planned in enumerate(_plan(at, junk, inhibition, kind)):
        # What a feature reads is known once all layers below are set: gains follow from a run.
        seen = {mark: _mlp_input(vlm, both[side][0], layer) for side, mark in ((0, ""), (1, "'"))}
        for name, read, write, role in planned:
            x = seen["'" if read.endswith("'") else ""]
            place = np.flatnonzero(both[0][0].roles == role)
            value = float((x[place] @ at[read]).max())
            index = free[layer].pop()
            transcoders[layer].W_enc[index] = 2.0 / value * at[read]
            transcoders[layer].b_enc[index] = -0.5
            transcoders[layer].W_dec[index] = write
            if name:
                features[name] = (layer, role, index)
    tokens = [vlm.tokenizer.convert_tokens_to_ids(word) for word in ANSWERS]
    first, second = (torch.full((len(PROMPTS),), token) for token in tokens)
    scope = Scope(vlm, TranscoderSet(transcoders, TranscoderSetConfig(3, 8, "relu")))
    subject = pair_subject(scope, "planted", both[0], both[1], first, second, 2, answerable=False)
    edges = {("word", "A"), ("word", "A'"), ("A", "B"), ("A'", "B'"), ("B", "C"), ("B'", "C'"), ("A", "I")}
    edges |= {("C", "answer"), ("C'", "answer"), ("I", "answer")}
    return Planted(scope, subject, features, edges)


def _plan(at: dict[str, Tensor], junk, inhibition: float, kind: str) -> list[list[tuple[str, str, Tensor, str]]]:
    """By layer: name ("" for a distractor), direction read, what is written, the role where it is calibrated."""

    def wasted(read: str, role: str) -> list[tuple[str, str, Tensor, str]]:
        return [("", read, 6.0 * next(junk), role) for _ in range(COPIES)]

    rest = wasted("u", "question") + wasted("u'", "question") + [("", "u", 4 * at["both"], "question")]
    if kind == "copying":
        third = [("C", "u", 4 * at["y"], "last"), ("C'", "u'", 4 * at["y'"], "last"), *wasted("u", "last")]
        return [rest, wasted("u", "last") + wasted("u'", "last"), third]
    first = [("A", "u", 4 * at["a"], "question"), ("A'", "u'", 4 * at["a'"], "question"), *rest]
    second = [("B", "a", 4 * at["b"], "last"), ("B'", "a'", 4 * at["b'"], "last")]
    second += [("I", "a", -4 * inhibition * at["y"], "last"), *wasted("a", "last"), *wasted("a'", "last")]
    third = [("C", "b", 4 * at["y"], "last"), ("C'", "b'", 4 * at["y'"], "last"), *wasted("b", "last")]
    if kind == "redundant":
        second = [feature for feature in second if feature[0] != "I"]
        for side in ("", "'"):
            first.append((f"A2{side}", f"u{side}", 4 * at[f"a2{side}"], "question"))
            second.append((f"B2{side}", f"a2{side}", 4 * at[f"b2{side}"], "last"))
            third.append((f"C2{side}", f"b2{side}", 6 * at[f"y{side}"], "last"))
    return [first, second, third]


def _set_embeddings(
    vlm: VLM, at: dict[str, Tensor], words: tuple[str, ...], rng: np.random.Generator, says: bool
) -> None:
    rows = vlm.model.get_input_embeddings().weight
    noise = torch.from_numpy(rng.standard_normal(tuple(rows.shape))) * 0.02
    # Noise stays off what the circuit uses.
    for direction in at.values():
        noise -= (noise @ direction)[:, None] * direction
    rows.copy_(noise + CONSTANT * at["const"])
    for word, name in zip(words, ("u", "u'"), strict=True):
        for token in (word, f"Ġ{word}"):
            rows[vlm.tokenizer.convert_tokens_to_ids(token)] += 3 * at[name]
    for answer, name in zip(ANSWERS, ("y", "y'"), strict=True):
        rows[vlm.tokenizer.convert_tokens_to_ids(answer)] = (LOUD if says else 1) * at[name] + at["both"]
    if says:  # the constant raises all words alike, the third a little more, and E all three
        spoken = [vlm.tokenizer.convert_tokens_to_ids(word) for word in (*ANSWERS, NEITHER)]
        rows[spoken[-1]] = at["both"] + 0.04 * at["const"]
        rows[spoken] += CONSTANT * at["const"]
    rows /= D**0.5  # Gemma multiplies by it


def _set_attention(vlm: VLM, at: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Uniform attention that carries the constant, some directions and what moves both answers."""
    carried = at["const"][:, None] * at["const"]
    for name in (*names, "both"):
        if name in at:
            # u stays in the stream to the end, where its own word would be said if there were much of it.
            carried = carried + (1 if name[0] == "u" else 12) * at[name][:, None] * at[name]
    for block in vlm.model.model.layers:
        attention = block.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.zero_()
        attention.v_proj.weight.copy_(carried)
        attention.o_proj.weight.copy_(torch.eye(D))
        for norm in (block.input_layernorm, block.post_attention_layernorm, block.pre_feedforward_layernorm,
                     block.post_feedforward_layernorm):  # fmt: skip
            norm.weight.zero_()
    vlm.model.model.norm.weight.zero_()


def _prepare(vlm: VLM, form: str, word: str) -> ModelInputs:
    return vlm.prepare(form.format(word), [])


def _mlp_input(vlm: VLM, inputs: ModelInputs, layer: int) -> Tensor:
    found = []
    handle = vlm.adapter.mlp(layer).register_forward_pre_hook(lambda _m, args: found.append(args[0][0]))
    vlm.adapter.forward(inputs.tensors, use_cache=False)
    handle.remove()
    return found[0]
