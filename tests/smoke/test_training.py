"""Training on the command line: own data, shards and sweeps; the Python API says what it says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import vlmscope
from vlmscope.app import main
from vlmscope.data.samples import drawn
from vlmscope.data.tables import load_folder
from vlmscope.models.tiny import tiny_image
from vlmscope.transcoders.hub import parts_of

TRAIN = [
    "task=train_transcoders", "model=tiny", "model.family=llava",
    "transcoder=arch", "transcoder.expansion_factor=2", "transcoder.k=4",
    "data=folder", "task.tokens_per_batch=50", "trainer.max_steps=6", "task.steps_per_batch=1", "task.pool_batches=2",
    "trainer.checkpoint_every=2", "optim.warmup=1", "tracking=none",
]  # fmt: skip
MIX = [*TRAIN, "data=mix_orrery", "data.context=32", "task.tokens_per_batch=80", "task.val_examples=6"]
MIX += ["trainer.max_steps=10"]


def transcoders(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "transcoders").iterdir()}


def test_a_damaged_picture_stops_training_and_its_repair_resumes_it_exactly(
    tmp_path: Path, refusal: Callable[..., str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = [{"images": [f"{number}.png"], "text": "the red planet"} for number in range(80)]
    (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for number in range(80):
        tiny_image(number).save(data / f"{number}.png")
    command = [*TRAIN, f"data.path={data}", "trainer.max_steps=60", "trainer.checkpoint_every=0"]
    assert main([*command, f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text())["val/fvu"] < 1

    # An example whose turn comes late: after those that are looked at before the first step.
    train, _ = load_folder(data, 0.05, 0)
    number = train.lines[drawn(0, 50, len(train))].number
    picture = data / f"{number - 1}.png"
    sound = picture.read_bytes()
    Image.effect_noise((80, 80), 90).convert("RGB").save(picture)
    picture.write_bytes(picture.read_bytes()[:300])
    half = [*command, f"hydra.run.dir={tmp_path / 'half'}"]
    error = refusal(*half)
    assert f"train.jsonl line {number}: image" in error and "cannot be read as a picture" in error
    assert list((tmp_path / "half" / "transcoder_checkpoint").glob("step_*/complete.json"))  # what was learnt is kept
    picture.write_bytes(sound)
    assert "30 an example" in refusal(*half, "trainer.resume=true", "task.max_tokens=30")
    assert main([*half, "trainer.resume=true"]) == 0
    assert transcoders(tmp_path / "half") == transcoders(tmp_path / "whole")  # the card's count of tokens among it
    metrics = json.loads((tmp_path / "half" / "metrics.json").read_text())
    facts = parts_of((tmp_path / "half" / "transcoders" / "README.md").read_text())[0]["vlmscope"]
    assert facts["figures"][0]["fvu"] == metrics["layers/fvu/layer_00"] and facts["ce_delta"] == metrics["val/ce_delta"]
    assert facts["data"] == {"folder": metrics["train/tokens"]} and facts["settings"]["max_steps"] == 60


@pytest.mark.parametrize(
    ("name", "content", "arguments", "words"),
    [
        ("train.jsonl", "", [], "train.jsonl holds no example"),
        ("2.png", None, [], "train.jsonl line 3: image"),
        ("train.jsonl", '{"text": "x"}\n{"caption": "x"}\n', [], "line 2: it has neither texts nor text"),
        ("4.png", "not a picture", [], "line 5: image"),
        ("", "", ["model.family=gemma3_text"], "line 1: it has pictures, and tiny_gemma3_text takes none"),
        ("", "", ["model.family=paligemma"], "line 9: it has no picture, and tiny_paligemma needs one"),
        ("", "", ["task.max_tokens=5"], "do not fit into 5 tokens"),
    ],
)
def test_mistakes_in_the_data_are_one_line_before_training_starts(
    data: Path, tmp_path: Path, name: str, content: str | None, arguments: list[str], words: str,
    refusal: Callable[..., str],
) -> None:  # fmt: skip
    if content is None:
        (data / name).unlink()
    elif name:
        (data / name).write_text(content)
    assert words in refusal(*TRAIN, f"data.path={data}", f"hydra.run.dir={tmp_path / 'r'}", *arguments)
    assert not (tmp_path / "r" / "transcoder_checkpoint").exists()


def test_shards_of_a_mix_are_built_and_trained_on(tmp_path: Path, refusal: Callable[..., str]) -> None:
    limits = [f"data.sources.{name}.limit=40" for name in ("text", "captions", "questions")]
    build = ["task=build_data", "data=mix_orrery", f"data.path={tmp_path / 'shards'}", *limits, "task.shard_size=16"]
    build += ["task.workers=1", "task.parts=1", "tracking=none"]
    assert main([*build, f"hydra.run.dir={tmp_path / 'build'}"]) == 0
    metrics = json.loads((tmp_path / "build" / "metrics.json").read_text())
    assert metrics["data/rows"] == 240 and metrics["data/shards"] == 18
    train = [*MIX, "data=mix_shards", f"data.path={tmp_path / 'shards'}", "trainer.max_steps=3"]
    assert main([*train, f"hydra.run.dir={tmp_path / 'train'}"]) == 0
    for shard in (tmp_path / "shards").glob("train-text-*.tar"):
        shard.write_bytes(b"")
    assert "number 3, and data.max_bad_shards=2" in refusal(*train, f"hydra.run.dir={tmp_path / 'bad'}")


def test_the_command_line_and_the_python_api_say_the_same(tmp_path: Path) -> None:
    """On Orrery, with what a graph says: features whose removal or exchange moves the answer more than others do."""
    from vlmscope.data.orrery.dataset import concept_scenes

    prompt = "what planet is this ?"
    paths = {}
    for name in ("mars", "earth"):
        picture = concept_scenes(name, "test", 1, seed=99)[0].image
        assert picture is not None
        paths[name] = tmp_path / f"{name}, (1).png"
        Image.fromarray(picture).save(paths[name])
    base = [f"image={paths['mars']}", f"prompt={prompt}", "tracking=none"]
    assert main(["task=trace", *base, "task.figure=false", f"hydra.run.dir={tmp_path / 'trace'}"]) == 0
    chosen = [*base, f"task.from_graph={tmp_path / 'trace'}", "task.top=60"]
    assert main(["task=steer", *chosen, f"hydra.run.dir={tmp_path / 'steer'}"]) == 0
    donor = f"task.donor_image={paths['earth']}"
    assert main(["task=patch", *chosen, donor, "task.strength=3", f"hydra.run.dir={tmp_path / 'patch'}"]) == 0
    scope = vlmscope.load()
    for name in ("steer", "patch"):
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics[f"{name}/free/kl"] > 100 * metrics[f"{name}/free/kl_control"]
        assert metrics[f"{name}/free/kl"] > 10 * metrics[f"{name}/free/kl_random_direction"]
        written = json.loads((tmp_path / name / f"{name}.json").read_text())
        features = written["features"]
        assert len(features) == metrics[f"{name}/features"] == 60
        assert written["answer"]["before"] == "mars"
        after = (
            vlmscope.steer(scope, prompt, [paths["mars"]], dict.fromkeys(features, 0.0))
            if name == "steer"
            else vlmscope.patch(scope, prompt, [paths["mars"]], [paths["earth"]], features, 3.0)
        )
        assert after.after.answer == written["answer"]["after"]
