"""What users get wrong on the command line: one line that says it, exit code 2, and nothing written, in every task."""

import shlex
from pathlib import Path

import pytest

from vlmscope.app import main
from vlmscope.models.tiny import tiny_image

TINY = "model=tiny model.family=llava"
EDIT = f"{TINY} transcoder=random prompt='what is this ?' image=PLACE/a.png task.new_tokens=2 task.controls=1"
ASKED = "image=PLACE/a.png prompt='what planet is this ?'"
# The last of two overrides of one key counts, so a row may replace what stands here.
BASES = {
    "run": "",
    "check": "task=check model=tiny",
    "plan": "task=plan",
    "evaluate": "task=evaluate data=folder",
    "trace": f"task=trace {ASKED}",
    "where": f"task=where {ASKED}",
    "steer": f"task=steer {EDIT}",
    "patch": f"task=patch {EDIT} task.features=[L1/7]",
    "pairs": "task=circuit pairs=planet pairs.train=4 pairs.test=4 interchange.least=2",
    "train": f"task=train_transcoders {TINY} transcoder=arch transcoder.expansion_factor=2 transcoder.k=4 "
    "task.tokens_per_batch=80 trainer.max_steps=10 task.steps_per_batch=1 task.pool_batches=2 task.val_examples=6 "
    "optim.warmup=1 data=mix_orrery data.context=32",
}
MISTAKES = [
    ("check transcoder=orrery", "the model has 4 layers"),
    ("trace model=orrery", "not the transcoders of orrery: choose transcoder=orrery"),
    ("check model=gemma3_4b_it", "hf download google/gemma-3-4b-it --revision 093f9f3"),
    ("check model.family=gema3", "choose one of: gemma3, gemma3_text"),
    ("check model.path=/x", "two models"),
    ("check model=orrery model.path=/no/model", "no model at"),
    ("check transcoder=random transcoder.k=1000", "k = 1000"),
    ("check model=orrery2 prompt='what is this zebra ?'", "zebra"),
    ("check model.family=llava prompt='what is <image> <image> <image> ?'", "3 times but"),
    ("evaluate", "data.path is not set"),
    ("plan task.device=h1000", "task.device=h1000: no such choice; did you mean 'h100'?"),
    ("plan model=tiny model.family=qwen2_5_vl", "depends on its size here; say task.tokens="),
    ("plan model=gemma3_4b_it transcoder=path transcoder.path=/no/set", "no transcoder set in /no/set"),
    ("trace image=/no/such.png", "no such file"),
    ("trace prompt='what planet is this zebra ?'", "zebra"),
    ("trace prompt='<start_of_image> <start_of_image> what planet is this ?'", "2 times but 1 picture"),
    # A Latin-1 byte on the command line, as Python passes it on.
    ("trace prompt='what planet is caf\udce9 ?'", r"prompt= has '\udce9' at character 19"),
    ("trace attribution.answer=caf\udce9", "attribution.answer="),
    ("trace attribution.logit_mass=2", "logit_mass"),
    ("trace attribution.choice=best", "attribution.choice=best"),
    ("trace attribution.memory_gb=0.002", "is too little for 29 tokens"),
    ("trace hydra.run.dir=/proc/nothing/here", "/proc/nothing"),
    ("trace image=null attribution.patches=true", "needs a picture"),
    ("where task.features=[L5/99999]", "L5/99999 is active on no soft token"),
    ("where task.top=0", "task.top=0"),
    ("where model=tiny model.family=gemma3_text", "takes no pictures"),
    ("where image=null", "add image="),
    ("run task=compare task.first=/no/run task.second=/no/run", "/no/run is neither"),
    ("run task=compare task.first=a", "give task.first=RUN and task.second=RUN"),
    ("steer", "which features?"),
    ("steer 'task.features={L1/7: 1}' task.from_graph=/no", "give exactly one of"),
    ("steer 'task.features={L1/7: 1}' task.positions=[99]", "position 99"),
    ("steer task.from_graph=/no/graph.safetensors", "/no/graph.safetensors: no such file"),
    ("patch", "no donor"),
    ("patch task.donor_prompt='what is this red one ?'", "prompts of a batch must align"),
    (
        "patch task.donor_image=PLACE/wide.png model.family=llava_onevision",
        "use the same wording, and pictures of the same shape",
    ),
    ("run experiment=mars_earth_patch +images.mars=[/no/mars.png]", "images.mars: no folder or picture /no/mars.png"),
    (
        "run experiment=mars_earth_patch +images.mars=[PLACE/wide.png,PLACE/a.png] +images.mars_train=[PLACE/a.png]",
        "a.png (images.mars) has the same content as",
    ),
    (
        "run experiment=mars_earth_patch +images.mars_train=[PLACE/a.png] +images.earth=[PLACE/same.bmp]",
        "same.bmp (images.earth) has the same content as",
    ),
    ("run experiment=find_circuits pairs.train=0", "pairs.train=0 leaves no pair to choose a circuit by"),
    (
        "run experiment=captioning analysis.swaps.mars_to_earth=[planet,mars]",
        "[change, original, counterfactual]",
    ),
    ("run experiment=captioning analysis.swaps.mars_to_earth=[planet,mars,pink]", "no value 'pink'"),
    ("run experiment=mars_earth_patch circuit.per_layer={image:0,last:0}", "give a role with features"),
    ("run experiment=counting interchange.scenes=[36,5]", "at least 30 training and 30 held-out scenes"),
    ("run task=label", "study.path=FOLDER"),
    ("run task=serve task.root=/no/root", "no such folder"),
    ("steer task.features=[L1/7]", "a list where {key: value} is needed"),
    ("run task=trace task.page=true task.rows=PLACE/a.csv", "task.page=true is for a single trace"),
    ("run task=structure study.path=/no/such", "no study.json in /no/such"),
    ("run task=structure task.twin=2", "task.twin=2"),
    ("run task=study study.path=/x", "leave it out of task=study"),
    ("pairs discovery.question=size", "discovery.question=size: choose from name, colour, cover"),
    ("pairs attribution.tokens=[mars]", "attribution.tokens: the graphs of pairs= explain the difference"),
    ("pairs pairs.original=mars pairs.counterfactual=vulcan", "vulcan"),
    ("pairs pairs=file pairs.path=/no/pairs.jsonl", "/no/pairs.jsonl"),
    ("pairs image=mars.png", "image= without prompt="),
    ("train +task.batch.cats=2", "task.batch=cats: no such choice"),
    ("train data=mix_paper", "HF_HUB_OFFLINE forbids to stream EleutherAI/SmolLM2-135M-10B"),
    ("train data=mix_local", "data.sources.text.path"),
    ("train data.sources.text.wieght=1", "wieght"),
    ("train model.family=gemma3_text", "samples of captions could not be used"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of different shapes and formats."""
    folder = tmp_path_factory.mktemp("place")
    tiny_image(0).resize((24, 24)).save(folder / "a.png")
    tiny_image(0).resize((24, 24)).save(folder / "same.bmp")
    tiny_image(1).resize((72, 24)).save(folder / "wide.png")
    return folder


@pytest.mark.parametrize(("command", "words"), MISTAKES)
def test_a_mistake_is_one_line_before_any_work(
    command: str,
    words: str,
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("the model was loaded")

    base, _, row = command.partition(" ")
    if base == "pairs":
        monkeypatch.setattr("vlmscope.analyses.bench.load_model", load)
    arguments = [word.replace("PLACE", str(place)) for word in shlex.split(f"{BASES[base]} {row}")]
    assert main([f"hydra.run.dir={tmp_path / 'run'}", "tracking=none", *arguments]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert words in error
    assert len(lines) == 1 or base != "plan"
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix not in (".yaml", ".log")]
