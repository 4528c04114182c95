"""Carrying activations to the last position alone, from donors of any length, and the controls of it."""

import pytest
import torch

from vlmscope.circuits.cases import bystanders
from vlmscope.circuits.operations import Carry
from vlmscope.interventions.run import run_edited
from vlmscope.interventions.trials import Cases
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

WIDTH = 30


@pytest.fixture(scope="module")
def scope() -> Scope:
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, WIDTH, 6, seed=6).requires_grad_(False)
    return Scope(vlm, transcoders)


@pytest.fixture(scope="module")
def sides(scope: Scope) -> dict[str, Cases]:
    pictures = [scope.inputs("what is this planet ?", [tiny_image(i)]) for i in range(4)]
    texts = [scope.inputs("what is the other planet in this ?")]
    return {
        "picture": bystanders(scope, "picture", "name", pictures, [f"picture {i}" for i in range(4)]),
        "text": bystanders(scope, "text", "name", texts, ["text 0"]),
    }


@pytest.mark.parametrize(("to", "of"), [("picture", "text"), ("text", "picture")])
@pytest.mark.parametrize("everything", [False, True])
def test_the_donors_last_position_is_carried_to_the_last_alone(
    scope: Scope, sides: dict[str, Cases], to: str, of: str, everything: bool
) -> None:
    """The edited run is the one in which hooks add (donor - own) activations times decoder rows at the last token."""
    cases = sides[to].facing(sides[of], sides["picture"].ids)
    assert cases.batch.size == 4 and cases.ids == sides["picture"].ids and cases.donors is not None
    assert cases.batch.length != cases.donors.length and torch.equal(cases.target, sides[of].answer.expand(4))
    chosen = {layer: torch.arange(WIDTH) if everything else torch.tensor([3, 17, 4]) for layer in (0, 2)}
    every = {layer: torch.arange(WIDTH) for layer in scope.transcoders.layers}
    plan = Carry(None if everything else chosen, last=True).plan(scope, cases, 1.0)
    edited = run_edited(scope, cases.batch, plan)
    handles = []
    given = {layer: scope.transcoders[layer].encode(x).dense(WIDTH) for layer, x in scope.capture(cases.donors).items()}
    for layer, features in (every if everything else chosen).items():
        transcoder = scope.transcoders[layer]

        def hook(_module, args, out, layer=layer, features=features, transcoder=transcoder):
            own = transcoder.encode(args[0]).dense(WIDTH)
            out = out.clone()
            delta = (given[layer][:, -1] - own[:, -1])[:, features]
            out[:, -1] += delta @ transcoder.W_dec[features]
            return out

        handles.append(scope.adapter.mlp(layer).register_forward_hook(hook))
    torch.testing.assert_close(edited, scope.forward(cases.batch), atol=1e-4, rtol=1e-4)
    for handle in handles:
        handle.remove()
    assert not torch.allclose(edited, scope.forward(cases.batch), atol=1e-3)
