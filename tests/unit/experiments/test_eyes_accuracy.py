"""What experiment=eyes_accuracy calls a right answer."""

from types import SimpleNamespace

from vlmscope.interventions.run import generate_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.tasks.experiment import own_analysis


def test_an_answer_is_right_if_all_of_its_tokens_are_said() -> None:
    vlm, own = tiny_gemma3(5), own_analysis("eyes_accuracy")
    shown = vlm.adapter.placeholder
    images = [tiny_image(0), None, tiny_image(1)]
    prompts = [f"what is this {shown} ?", "what is the other planet ?", f"a {shown}"]
    said = [
        generate_batch(vlm.adapter, [vlm.prepare(prompt, [] if image is None else [image])], 3)[0]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    tokens = {"a": said[0], "b": said[1], "c": said[2], "d": [*said[0][:2], (said[0][2] + 1) % 100]}
    named = _Named(vlm.tokenizer, tokens)
    bench = SimpleNamespace(vlm=SimpleNamespace(adapter=vlm.adapter, prepare=vlm.prepare, tokenizer=named))
    assert own.right(bench, prompts, images, ["a", "b", "c"]).right.tolist() == [True, True, True]
    assert own.right(bench, prompts, images, ["b", "c", "a"]).right.tolist() == [
        tokens[x] == tokens[y] for x, y in ("ab", "bc", "ca")
    ]
    assert own.right(bench, prompts[:1], images[:1], ["d"]).right.tolist() == [False]


class _Named:
    """A tokenizer that knows the tokens of some answers by name."""

    def __init__(self, decoder, tokens) -> None:
        self.decode, self.tokens = decoder.decode, tokens

    def __call__(self, text, **_):
        return {"input_ids": self.tokens[text]}
