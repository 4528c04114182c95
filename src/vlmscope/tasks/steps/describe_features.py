"""The evidence for a circuit's strongest features: top activating pictures and the words that they write towards."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlmscope.circuits.circuit import Circuit
from vlmscope.core.intervention import Supernode
from vlmscope.core.records import FeatureId
from vlmscope.data.images import png_bytes
from vlmscope.data.orrery.scenes import PLANETS
from vlmscope.features.readouts import top_and_bottom_logits
from vlmscope.features.study.top_examples import StudyItem, top_examples

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench

SHOWN = 8  # features of a supernode with evidence
STUDIED = 10  # pictures of each planet searched for top examples, each under every question


def describe_features(bench: Bench, circuit: Circuit) -> tuple[Supernode, ...]:
    """Add top examples and logits to the strongest features of each supernode."""
    strongest = {
        name: sorted(node.features, key=lambda m: -m.influence)[:SHOWN] for name, node in circuit.supernodes.items()
    }
    wanted: list[FeatureId] = list(dict.fromkeys(m.feature for members in strongest.values() for m in members))
    items: list[StudyItem] = []
    for planet in PLANETS:
        images = bench.concept_pictures(planet, "train", STUDIED)
        # A feature that writes `dust` is silent unless it is asked for.
        for question in bench.circuit_config.questions.values():
            pairs = zip(bench.inputs(images, question.prompt), images, strict=True)
            items += [StudyItem(inputs, planet, png_bytes(image)) for inputs, image in pairs]
    examples = top_examples(bench.scope, wanted, items)
    nodes = []
    for name, node in circuit.supernodes.items():
        first = []
        for member in strongest[name]:
            top, bottom = top_and_bottom_logits(bench.scope, member.feature)
            found = examples[member.feature]
            first.append(replace(member, examples=found, top_logits=top, bottom_logits=bottom))
        chosen = {m.feature for m in first}
        rest = sorted((m for m in node.features if m.feature not in chosen), key=lambda m: -m.influence)
        nodes.append(Supernode(name, (*first, *rest)))
    return tuple(nodes)
