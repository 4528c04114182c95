"""What becomes of pictures in every family: soft tokens, the map from them to the picture, batches, saved models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vlmscope.core.records import PatchBox
from vlmscope.data.images import decode_image
from vlmscope.models.base import ModelInputs
from vlmscope.models.batching import make_batch
from vlmscope.models.boxes import grid_boxes, square_window
from vlmscope.models.loading import VLM, load_vlm
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this red planet ?"
SIZES = ((48, 48), (72, 48), (48, 96))  # width and height


@pytest.fixture(scope="module", params=("gemma3", *FAMILIES))
def vlm(request: pytest.FixtureRequest) -> VLM:
    return tiny_vlm(request.param, 5)


@torch.no_grad()
def logits(vlm: VLM, inputs: ModelInputs) -> torch.Tensor:
    return vlm.model(**inputs.tensors).logits[0]


def test_pictures_move_the_logits(vlm: VLM) -> None:
    first, second = (vlm.prepare(PROMPT, [tiny_image(i)]) for i in (0, 1))
    assert first.input_ids == second.input_ids
    assert (logits(vlm, first)[-1] - logits(vlm, second)[-1]).abs().max() > 1e-3
    if not vlm.adapter.needs_pictures:
        assert torch.isfinite(logits(vlm, vlm.prepare(PROMPT))).all()


def embedded(vlm: VLM, picture: Image.Image) -> torch.Tensor:
    """What enters the decoder at the soft tokens."""
    batch = make_batch(vlm.adapter, [vlm.prepare(PROMPT, [picture])])
    return batch.tensors["inputs_embeds"][0, torch.from_numpy(batch.is_image)]


def painted(picture: Image.Image, box: PatchBox) -> Image.Image:
    """The picture with the middle of a box in other colours."""
    left, top, right, bottom = box.pixels(*picture.size)
    dx, dy = (right - left) // 5, (bottom - top) // 5
    pixels = np.array(picture)
    inner = pixels[top + dy : bottom - dy, left + dx : right - dx]
    pixels[top + dy : bottom - dy, left + dx : right - dx] = (inner.astype(int) + 128) % 256
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES)
def test_boxes_are_where_the_soft_tokens_look(vlm: VLM, size: tuple[int, int]) -> None:
    """Of all soft tokens with boxes of its size, the one whose box is painted moves most."""
    picture = tiny_image(3).resize(size)
    boxes = [box for box in vlm.prepare(PROMPT, [picture]).patch_boxes if box is not None]
    before = embedded(vlm, picture)
    assert len(boxes) == len(before)
    areas = np.array([(box.right - box.left) * (box.bottom - box.top) for box in boxes])
    right = []
    for number, box in enumerate(boxes):
        if areas[number] == 0:
            continue
        moved = (embedded(vlm, painted(picture, box)) - before).norm(dim=1).numpy()
        alike = np.isclose(areas, areas[number], rtol=0.3)
        right.append(number == int(np.argmax(np.where(alike, moved, -1.0))))
    assert len(set(boxes)) > len(boxes) / 2 and len(right) >= 4
    assert all(right)


def drawn(size: tuple[int, int]) -> Image.Image:
    """Black strokes on a transparent ground, which without its alpha is all black."""
    alpha = np.zeros(size[::-1], np.uint8)
    alpha[::3, :] = alpha[:, ::5] = 255
    return Image.merge("RGBA", [Image.new("L", size)] * 3 + [Image.fromarray(alpha)])


TURNED = Image.Exif()
TURNED[0x0112] = 6
# Name of the file -> picture and how it is saved.
FILES = {
    "grey_alpha.png": (drawn((72, 48)).convert("LA"), {}),
    "alpha.webp": (drawn((48, 96)), {"lossless": True}),
    "palette.png": (drawn((72, 48)).quantize(4), {}),
    "scan.png": (tiny_image(1).resize((2100, 60)), {}),
    "turned.jpg": (tiny_image(2).resize((72, 48)), {"exif": TURNED}),
}


@pytest.mark.parametrize("name", FILES)
def test_every_door_gives_what_hugging_face_makes_of_a_file(vlm: VLM, tmp_path: Path, name: str) -> None:
    path, (picture, settings) = tmp_path / name, FILES[name]
    picture.save(path, **settings)
    template = getattr(vlm.processor, "chat_template", None)
    text = vlm.adapter.wrap_prompt(PROMPT, 1, vlm.tokenizer, template).text
    upright = ImageOps.exif_transpose(Image.open(path)) if name == "turned.jpg" else Image.open(path)
    theirs = vlm.processor(text=[text], images=[[upright]], return_tensors="pt", add_special_tokens=False)
    transcoders = random_set(1, 2, 2, 1)  # no one looks at them
    for given in (path, Image.open(path), decode_image(path.read_bytes(), name)):
        inputs = Scope(vlm, transcoders).inputs(PROMPT, [given])
        pictures = [] if isinstance(given, Path) else [given]
        ours = [inputs.tensors, *(vlm.tokenised(text, [one]) for one in pictures)]
        assert all(torch.equal(one["input_ids"], theirs["input_ids"]) for one in ours)
        assert all(torch.equal(one["pixel_values"], theirs["pixel_values"]) for one in ours)
        assert inputs.sizes == (upright.size,)
        assert sum(box is not None for box in inputs.patch_boxes) == inputs.is_image.sum()


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_processor_alone_limits_the_soft_tokens(family: str, tmp_path: Path) -> None:
    """A scan larger than 2,048 pixels has a soft token for every patch that the checkpoint's own limit allows."""
    vlm = tiny_vlm(family, 5)
    vlm.processor.image_processor.size["longest_edge"] = 10**6
    tiny_image(1).resize((2400, 24)).save(tmp_path / "scan.png")
    inputs = Scope(vlm, random_set(1, 2, 2, 1)).inputs(PROMPT, [tmp_path / "scan.png"])
    assert inputs.is_image.sum() == 400 * 4  # patches of 3 pixels, of which 2 x 2 are a soft token
    boxes = [box for box in inputs.patch_boxes if box is not None]
    assert boxes[1] == pytest.approx(PatchBox(1 / 400, 0, 2 / 400, 1 / 4))
    assert boxes[-1] == pytest.approx(PatchBox(399 / 400, 3 / 4, 1, 1))


def test_a_saved_model_is_the_same_model(vlm: VLM, tmp_path: Path) -> None:
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    again = load_vlm(tmp_path)
    pictures = [tiny_image(0), tiny_image(1).resize((20, 12))]
    before, after = vlm.prepare(PROMPT, pictures), again.prepare(PROMPT, pictures)
    assert before.input_ids == after.input_ids and before.patch_boxes == after.patch_boxes
    assert again.tokenizer.backend_tokenizer.to_str() == vlm.tokenizer.backend_tokenizer.to_str()
    assert torch.allclose(logits(vlm, before), logits(again, after), rtol=0, atol=1e-6)


def test_a_batch_of_prompts_is_each_on_its_own(vlm: VLM) -> None:
    inputs = [vlm.prepare(PROMPT, [tiny_image(number)]) for number in range(2)]
    batch = make_batch(vlm.adapter, inputs)
    with torch.no_grad():
        together = vlm.adapter.forward(batch.tensors, use_cache=False).logits
    for row, one in enumerate(inputs):
        assert torch.allclose(together[row], logits(vlm, one), rtol=0, atol=1e-5)
    with torch.no_grad():
        reversed_logits = vlm.adapter.forward(batch.select([1, 0]).tensors, use_cache=False).logits
    assert torch.allclose(reversed_logits, together.flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_batches_do_not_remember_each_other(family: str) -> None:
    """Both families keep the shift of positions that their last pictures made."""
    vlm = tiny_vlm(family, 5)
    text = make_batch(vlm.adapter, [vlm.prepare(PROMPT)])
    wide, tall = (make_batch(vlm.adapter, [vlm.prepare(PROMPT, [tiny_image(0).resize(size)])]) for size in SIZES[1:])
    with torch.no_grad():
        alone = [vlm.adapter.forward(batch.tensors, use_cache=False).logits for batch in (text, wide, tall)]
        make_batch(vlm.adapter, [vlm.prepare(PROMPT, [tiny_image(0)])] * 3)
        after = [vlm.adapter.forward(batch.tensors, use_cache=False).logits for batch in (text, wide, tall)]
    assert all(torch.equal(one, other) for one, other in zip(alone, after, strict=True))
    assert torch.allclose(alone[0][0], logits(vlm, vlm.prepare(PROMPT)), rtol=0, atol=1e-6)
    assert torch.allclose(alone[1][0], logits(vlm, vlm.prepare(PROMPT, [tiny_image(0).resize(SIZES[1])])), atol=1e-6)


def test_a_grid_runs_row_by_row_and_ends_at_the_picture() -> None:
    boxes = grid_boxes(2, 4, square_window((50, 100)))
    assert boxes[1] == pytest.approx((0.0, 0.0, 0.5, 0.5)) and boxes[6] == pytest.approx((0.5, 0.5, 1.0, 1.0))
    assert boxes[0] == PatchBox(0.0, 0.0, 0.0, 0.5)  # padding alone
