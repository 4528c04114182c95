"""Every experiment and every option composes; a key that does not exist fails."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from tests.configs.composing import composed, rounds

from vlmscope.config import catalog
from vlmscope.config.catalog import adopt, conf_dir, register
from vlmscope.config.resolve import CONFIG_ERRORS, one_line
from vlmscope.core.errors import UserError
from vlmscope.data.config import SourceConfig
from vlmscope.tasks.settings import TASKS, summaries

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(catalog.options("experiment"))
# These have keys that no other experiment has.
LIMITED = [
    "train_orrery", "train_orrery2", "train_orrery_transcoders", "train_orrery2_transcoders", "captioning",
    "mars_earth_patch", "mars_earth_curves", "linear_story", "where_in_the_picture", "hallucination_prediction",
    "visual_arithmetic", "counting", "sixth_finger", "tower_carry", "train_eyes",
    "eyes_accuracy", "flag_capital",
]  # fmt: skip
GROUPS = [
    "model", "data", "transcoder", "optim", "tracking", "study", "circuit_spec", "prompts", "pairs", "debug", "circuit",
    "interchange", "where",
]  # fmt: skip


@pytest.fixture
def hydra() -> Iterator[None]:
    register(TASKS)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


# Every experiment with one published model, and every model once; all pairs are slow, since models do not differ here.
PUBLISHED = ["gemma3_4b_it", "gemma3_270m_it", "medgemma_4b_it"]
PAIRS = [(experiment, model) for experiment in EXPERIMENTS for model in PUBLISHED]
QUICK = [pair for pair in PAIRS if pair[0] == EXPERIMENTS[0] or pair[1] == PUBLISHED[0]]
PAIRS = [pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow) for pair in PAIRS]


@pytest.mark.parametrize(("experiment", "model"), PAIRS)
def test_experiments_compose_with_published_models(
    experiment: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLMSCOPE_MODELS", "/my/models")
    config = composed(f"experiment={experiment}", f"model={model}", "seed=7")
    assert config.model.path.startswith("/my/models/")
    assert config.model.hub == f"google/{config.model.name}"
    check_seeds(config)


def seeds(node: Any, path: str = "") -> dict[str, int]:
    """Every field called seed below a record, by its dotted name."""
    if isinstance(node, dict):
        parts = list(node.items())
    elif is_dataclass(node):
        parts = [(item.name, getattr(node, item.name)) for item in fields(node)]
    else:
        return {path: node} if path.rpartition(".")[2] == "seed" else {}
    return {key: value for name, part in parts for key, value in seeds(part, f"{path}.{name}").items()}


def check_seeds(config: Any) -> None:
    """Every seed follows that of the root, 7."""
    found = seeds(config)
    assert found.pop(".seed") == 7
    # The stages of Orrery's training keep the seeds that the shipped model was made with.
    own = {key for key, value in found.items() if value != 7 and not key.startswith(".task.training.")}
    assert own == set()
    assert ".trainer.seed" in found


@pytest.mark.parametrize("chosen", rounds(*GROUPS))
def test_every_option_composes(chosen: tuple[str, ...]) -> None:
    check_seeds(composed(*chosen, "seed=7"))


@pytest.mark.parametrize("task", sorted(summaries()))
def test_tasks_compose_and_say_what_they_do(task: str) -> None:
    config = composed(f"task={task}")
    assert config.task.name == task
    assert isinstance(config.task, TASKS[task])
    assert summaries()[task]


def test_experiments_are_described_and_run_a_known_task() -> None:
    for name, description in catalog.options("experiment").items():
        assert composed(f"experiment={name}").task.name in summaries(), name
        assert description, f"the first comment line of {name} is its description"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.max_step=3", "did you mean trainer.max_steps"),
        ("+trainer.max_step=3", "did you mean 'trainer.max_steps'"),
        ("modle=orrery", "did you mean model"),
        ("+modle=orrery", "did you mean 'model'"),
        ("model=orery", "did you mean 'orrery'"),
        ("task=trac", "did you mean 'trace'"),
        ("tracking.urj=x", "did you mean tracking.uri"),
        ("seed=abc", "seed: .*Integer"),
        ("seed=[1", "cannot read the override"),
        ("optim.schedule=cosin", "did you mean 'cosine'"),
        ("trainer.max_steps=0", "at least 1"),
        ("model=path", "model.path has no value"),
        ("hydra/launcher=submitit_cloud", r"pip install 'vlmscope\[slurm\]'"),
        ("study=nothing", "no study named|no study=nothing|there is no study"),
    ],
)
def test_mistakes_are_one_line_with_the_nearest_name(override: str, words: str) -> None:
    with pytest.raises((UserError, *CONFIG_ERRORS)) as raised:
        composed(override)
    error = raised.value
    message = str(error) if isinstance(error, UserError) else one_line(error)
    assert "\n" not in message
    assert re.search(words, message), message


def test_a_misspelt_key_in_an_experiment_fails_and_names_the_file(hydra: None, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "wrong.yaml").write_text("# @package _global_\ntrainer:\n  max_step: 3\n")
    with pytest.raises(CONFIG_ERRORS) as raised:
        compose("config", ["experiment=wrong", f"hydra.searchpath=[file://{tmp_path}]"])
    assert "experiment/wrong" in one_line(raised.value)
    assert "trainer.max_steps" in one_line(raised.value)


def test_prompts_and_pictures_reach_the_task(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("from a, file\n")
    config = composed("prompt=a, (b) ${c}", "image=[a.png,b.png]", "images.mars=[c.png]", "images.earth=d.png")
    assert config.prompt == "a, (b) ${c}"
    assert config.image == ["a.png", "b.png"]
    assert config.images == {"mars": ["c.png"], "earth": ["d.png"]}
    assert composed("image=a.png").image == ["a.png"]
    assert composed(f"prompt_file={tmp_path}/p.txt").prompt == "from a, file"
    with pytest.raises(UserError, match="both"):
        composed(f"prompt_file={tmp_path}/p.txt", "prompt=x")
    with pytest.raises(UserError, match="cannot read"):
        composed("prompt_file=/no/such/file")


def test_features_are_named_in_a_dict_or_a_list() -> None:
    steer = composed("task=steer", "task.features={L1/7: 8.0, L2/30: 0, L10/2048: -1.5e1}")
    assert steer.task.features == {"L1/7": 8.0, "L2/30": 0.0, "L10/2048": -15.0}
    assert composed("task=patch", "task.features=[L1/7,L2/30]").task.features == ["L1/7", "L2/30"]
    assert composed("task=steer").task.features == {}
    assert composed("data=folder", "data.path=/my/data").data.val_share == 0.05


def test_a_mix_is_typed_and_its_sources_can_be_left_out() -> None:
    paper = composed("data=mix_paper").data.sources
    assert [one.weight for one in paper.values()] == [2.0, 2.0, 1.0]  # text, captions, questions
    assert all(isinstance(one, SourceConfig) for one in paper.values())
    assert paper["captions"].templates == ["a photo of a {label}."]
    rest = composed("data=mix_paper", "~data.sources.text", "data.sources.captions.repeat=true").data.sources
    assert list(rest) == ["captions", "questions"] and rest["captions"].repeat
    added = composed("data=mix_orrery", "+data.sources={mine: {kind: folder, path: /x, weight: 0.5}}").data.sources
    assert added["mine"].weight == 0.5 and len(added) == 4
    shards = composed("data=mix_shards", "data.path=/my/shards").data.sources
    assert {one.path for one in shards.values()} == {"/my/shards"}
    for key, value in (("shuffle", 0), ("context", 1), ("max_bad_shards", -1)):
        with pytest.raises(UserError, match=f"data.{key}={value}: it must be at least"):
            composed("data=mix_orrery", f"data.{key}={value}")
    with pytest.raises(UserError, match=r"data.sources.a/b: name a source with letters"):
        composed("data=mix_orrery", "+data.sources={a/b: {kind: orrery, stream: text}}")


def test_debug_lowers_what_an_experiment_says_and_not_what_the_command_line_says() -> None:
    shipped, small = composed("experiment=mars_earth_patch"), composed("experiment=mars_earth_patch", "debug=fast")
    assert shipped.circuit is not None and small.circuit is not None
    assert (shipped.circuit.pictures, small.circuit.pictures) == (40, 4)
    assert list(small.circuit.questions) == ["name", "colour"] and small.pairs is None
    own = ("circuit.pictures=7", "association.digits={pictures: 9}", "study.limit=null")
    given = composed("experiment=cross_modal_association", "circuit=mars_earth", "debug=fast", *own)
    assert (
        given.circuit is not None and given.circuit.pictures == 7 and given.circuit.per_layer == {"image": 3, "last": 3}
    )
    assert given.association["digits"].pictures == 9 and given.association["colours"].pictures == 4
    assert given.study.limit is None
    # 0 switches these off, in the experiment too; a number below the limit stays.
    training = composed("experiment=train_orrery_transcoders", "debug=fast")
    assert (training.trainer.max_steps, training.trainer.checkpoint_every, training.trainer.val_every) == (4, 2, 0)
    assert composed("experiment=modality_mix", "modality=text", "debug=fast").task.batch["planets"] == 0


def test_every_limit_of_debug_is_a_setting(hydra: None) -> None:
    limits = compose("config", ["debug=fast"]).limits
    everything = ["circuit=mars_earth", "pairs=count"]
    runs = (["experiment=cross_modal_association", *everything], *([f"experiment={x}"] for x in LIMITED))
    composed_runs = [compose("config", run) for run in (*runs, ["task=anatomy"])]

    def reached(node: Any, path: list[str]) -> bool:
        if not path:
            return True
        keys = list(node) if isinstance(node, DictConfig) and not node._is_none() else []
        return any(reached(node[key], path[1:]) for key in keys if path[0] in ("*", key))

    lost = [key for key in limits if not any(reached(cfg, key.split(".")) for cfg in composed_runs)]
    assert lost == []


def test_the_commands_of_the_documents_compose(tmp_path: Path) -> None:
    recipes = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    own = tmp_path / "my_llava.yaml"
    own.write_text(re.findall(r"```yaml\n(.*?)```", recipes, re.DOTALL)[0])
    for document in ("README.md", "docs/commands.md", "docs/recipes.md"):
        text = (ROOT / document).read_text(encoding="utf-8").replace("./my_llava.yaml", str(own))
        commands = re.findall(r"^(?:python run\.py|python -m torch\S+ .*? run\.py|vlmscope) (.+)$", text, re.MULTILINE)
        assert commands, document
        for command in commands:
            words = [word for word in shlex.split(command, comments=True) if "=" in word]
            sweep = command.startswith("-m ")  # of which the first job is composed
            composed(*adopt([word.partition(",")[0] if sweep else word for word in words]))


def test_recipes_of_published_models_fix_every_key() -> None:
    for name in catalog.options("transcoder"):
        if name.startswith("gemma_scope_2"):
            chosen, size = composed(f"transcoder={name}").transcoder, name.split("_")[3]
            assert chosen.path == f"google/gemma-scope-2-{size}-it" and f"gemma3_{size}_it" in catalog.options("model")
            assert (chosen.format, chosen.width, chosen.l0, chosen.affine) == ("gemma_scope", "16k", "small", True)
    eight, one = composed("experiment=gemma3_4b_transcoders"), composed("experiment=gemma3_4b_transcoders_1gpu")
    for cfg in (eight, one):
        assert (cfg.model.name, cfg.model.device, cfg.data.name, cfg.transcoder.k) == (
            "gemma-3-4b-it",
            "cuda",
            "mix",
            48,
        )
        assert cfg.trainer.max_steps * cfg.task.tokens_per_batch == 28000 * 8192  # as many tokens
    assert (eight.transcoder.expansion_factor, one.transcoder.expansion_factor) == (32, 4)
