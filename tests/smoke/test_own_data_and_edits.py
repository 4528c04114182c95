"""Training on one's own data and editing on the command line: resuming, and mistakes in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import vlmscope
from vlmscope.app import main
from vlmscope.data.folder import load_folder
from vlmscope.data.samples import drawn
from vlmscope.models.tiny import tiny_image
from vlmscope.transcoders.hub import parts_of

TRAIN = [
    "task=train_transcoders", "model=tiny", "model.family=llava",
    "transcoder=arch", "transcoder.expansion_factor=2", "transcoder.k=4",
    "data=folder", "task.tokens_per_batch=50", "trainer.max_steps=6", "task.steps_per_batch=1", "task.pool_batches=2",
    "trainer.checkpoint_every=2", "optim.warmup=1", "tracking=none",
]  # fmt: skip
STEER = [
    "task=steer",
    "model=tiny",
    "model.family=llava",
    "transcoder=random",
    "tracking=none",
    "prompt=what is this ?",
]
PATCH = ["task=patch", *STEER[1:]]


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def transcoders(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "transcoders").iterdir()}


def test_a_damaged_picture_stops_training_and_its_repair_resumes_it_exactly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
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
    capsys.readouterr()
    half = [*command, f"hydra.run.dir={tmp_path / 'half'}"]
    assert main(half) == 2
    error = one_error(capsys)
    assert f"train.jsonl line {number}: image" in error and "cannot be read as a picture" in error
    assert list((tmp_path / "half" / "transcoder_checkpoint").glob("step_*/complete.json"))  # what was learnt is kept
    picture.write_bytes(sound)
    assert main([*half, "trainer.resume=true", "task.max_tokens=30"]) == 2
    assert "30 an example" in one_error(capsys)
    assert main([*half, "trainer.resume=true"]) == 0
    assert transcoders(tmp_path / "half") == transcoders(tmp_path / "whole")  # the card's count of tokens among it
    metrics = json.loads((tmp_path / "half" / "metrics.json").read_text())
    facts = parts_of((tmp_path / "half" / "transcoders" / "README.md").read_text())[0]["vlmscope"]
    assert facts["figures"][0]["fvu"] == metrics["layers/fvu/layer_00"] and facts["ce_delta"] == metrics["val/ce_delta"]
    assert facts["data"] == {"folder": metrics["train/tokens"]} and facts["settings"]["max_steps"] == 60


def spoil(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def picture_gone(folder: Path) -> None:
    (folder / "2.png").unlink()


def nothing(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (spoil("train.jsonl", ""), [], "train.jsonl holds no example"),
        (picture_gone, [], "train.jsonl line 3: image"),
        (spoil("train.jsonl", '{"text": "x"}\n{"caption": "x"}\n'), [], "line 2: it has neither texts nor text"),
        (spoil("4.png", "not a picture"), [], "line 5: image"),
        (
            nothing,
            ["model=tiny", "model.family=gemma3_text"],
            "line 1: it has pictures, and tiny_gemma3_text takes none",
        ),
        (nothing, ["model=tiny", "model.family=paligemma"], "line 9: it has no picture, and tiny_paligemma needs one"),
        (nothing, ["task.max_tokens=5"], "do not fit into 5 tokens"),
    ],
)
def test_mistakes_in_the_data_are_one_line_before_training_starts(
    data: Path, tmp_path: Path, change: Callable[[Path], None], arguments: list[str], words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    change(data)
    assert main([*TRAIN, f"data.path={data}", f"hydra.run.dir={tmp_path / 'r'}", *arguments]) == 2
    assert words in one_error(capsys)
    assert not (tmp_path / "r" / "transcoder_checkpoint").exists()


def edit(command: list[str], folder: Path, *arguments: str) -> int:
    return main([*command, f"hydra.run.dir={folder / 'r'}", "task.new_tokens=2", "task.controls=1", *arguments])


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (STEER, [], "which features?"),
        (STEER, ["task.features={L1/7: 1}", "task.from_graph=/no"], "not both"),
        (STEER, ["task.features={L1-7: 1}"], "not a feature id: 'L1-7'"),
        (STEER, ["task.features={L1/96: 1}"], "L1/96: layer 1 has 96 features"),
        (STEER, ["task.features={L1/7: 1}", "task.positions=[99]"], "position 99"),
        (STEER, ["task.from_graph=/no/graph.safetensors"], "/no/graph.safetensors: no such file"),
        (PATCH, ["task.features=[L1/7]"], "no donor"),
        (PATCH, ["task.features=[L1/7]", "task.donor_prompt=what is this red one ?"], "prompts of a batch must align"),
        (
            PATCH,
            ["task.features=[L1/7]", "task.donor_image=WIDE", "model=tiny", "model.family=llava_onevision"],
            "use the same wording, and pictures of the same shape",
        ),
    ],
)
def test_mistakes_in_an_edit_are_one_line(
    tmp_path: Path, command: list[str], arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_image(0).resize((24, 24)).save(tmp_path / "a.png")
    tiny_image(1).resize((72, 24)).save(tmp_path / "wide.png")
    arguments = [argument.replace("WIDE", str(tmp_path / "wide.png")) for argument in arguments]
    assert edit(command, tmp_path, f"image={tmp_path / 'a.png'}", *arguments) == 2
    assert words in one_error(capsys)
    assert not (tmp_path / "r" / "metrics.json").exists()


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
        assert after == written["answer"]["after"]
