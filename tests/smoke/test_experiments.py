"""Every experiment runs end to end on the shipped model with tiny limits and leaves what it promises."""

import json
from pathlib import Path

import pytest

from vlmscope.app import main
from vlmscope.config import catalog
from vlmscope.data.orrery.dataset import OrreryDataConfig, build
from vlmscope.data.orrery.scene import KINDS

PIPELINE = [
    "intervention.pictures=3",
    "intervention.generate=2",
    "intervention.unrelated=1",
    "intervention.controls=1",
    "intervention.strengths=[0.0,2.0]",
    "circuit.pictures=2",
    "circuit.per_layer=2",
    "circuit.graphs=1",
    "attribution.max_nodes=300",
]
TINY_MODEL = [f"task.architecture.{key}={value}" for key, value in {
    "d_model": 16, "n_layers": 2, "d_mlp": 16, "head_dim": 4, "vision_width": 8, "vision_layers": 1, "vision_mlp": 8,
}.items()]  # fmt: skip
PICTURES = "planets:2,digits:2,shapes:1,hands:1"  # every key: dictionaries merge
STAGES = [f"task.training.tower.batch={{{PICTURES}}}"]
STAGES += [f"task.training.{stage}.batch={{{PICTURES},text:1}}" for stage in ("vlm", "polish")]
PAIRS = [
    "pairs.train=4",
    "pairs.test=4",
    "interchange.least=2",
    "interchange.counts=[2,5]",
    "interchange.steps=1",
    "interchange.features=4",
    "interchange.generate=1",
    "interchange.scenes=[40,20]",
    "intervention.controls=1",
    "intervention.modes=[direct,free]",
    "intervention.scopes=[no_last_layer]",
]
FEW = [*PAIRS, "intervention.modes=[free]", "interchange.generate=0", "interchange.counts=[2]", "interchange.steps=1"]
LIMITS = {
    "planet_matrix": [
        "concept_matrix.concepts=[mars,earth]",
        "concept_matrix.questions={name:{prompt:'what planet is this ?',answers:{mars:mars,earth:earth}}}",
        "concept_matrix.pictures=2",
        "concept_matrix.graphs=1",
        "concept_matrix.per_layer=4",
        "concept_matrix.test=3",
        "concept_matrix.third=1",
        "concept_matrix.least=1",
        "attribution.max_nodes=300",
    ],
    "linear_story": [
        "single_edits.inputs=1",
        "single_edits.features=3",
        "single_edits.factors=[0]",
        "intervention.modes=[direct,free]",
        "attribution.max_nodes=200",
    ],
    "mars_earth_patch": [*PIPELINE, "~circuit.questions.cover"],
    "mars_earth_curves": [*PIPELINE, "~circuit.questions.colour", "~circuit.questions.cover"],
    "modality_by_layer": ["study.limit=40", "study.samples=4"],
    "cross_modal": [
        "cross_modal.concepts=[mars,earth,saturn]",
        "cross_modal.pictures=4",
        "cross_modal.test_pictures=2",
        "cross_modal.permutations=20",
        "intervention.controls=1",
    ],
    "cross_modal_association": [
        "~association.planets",
        "~association.descriptions",
        "association.digits.concepts=[three,five,eight]",
        *(
            f"association.{name}.{key}"
            for name in ("digits", "colours")
            for key in ("pictures=3", "test_pictures=2", "permutations=10", "others=1")
        ),
    ],
    "hierarchy": [*PAIRS, "interchange.scenes=[42,14]"],
    "visual_arithmetic": PAIRS,
    "six_fingers": [*PAIRS, "interchange.strengths=[0,4]"],
    "find_circuits": [
        *PAIRS,
        "discovery.graphs=1",
        "discovery.steps=1",
        "discovery.methods=[eap_ig,random]",
        "discovery.modes=[free]",
        "discovery.edge_nodes=10",
        "discovery.edge_pairs=2",
        "discovery.draws=1",
        "discovery.minimality=2",
        "attribution.max_nodes=200",
    ],
    "counting": [*FEW, "interchange.strengths=[1]", "interchange.transfer=10", "interchange.scenes=[60,36]"],
    "object_recognition": FEW,
    "captioning": [
        *(f"captions.{key}=3" for key in ("train", "test", "validation", "features", "conflicts")),
        *(f"captions.{key}=1" for key in ("graphs", "steps", "others")),
        "captions.kinds=[planets]",
        "captions.strengths=[1.0]",
        "captions.max_new_tokens=12",
        "~captions.swaps.circle_to_star",
        "attribution.max_nodes=200",
        "intervention.controls=1",
    ],
    "hallucination_prediction": [
        "hallucination.scenes={planets:3,digits:2,shapes:0,hands:4}",
        "hallucination.levels=[0,1]",
        "hallucination.folds=2",
        "hallucination.shuffles=2",
        "attribution.max_nodes=40",
    ],
    "train_orrery": [*TINY_MODEL, *STAGES, "task.max_steps=2", "task.test_scenes=4"],
    "train_orrery_transcoders": [
        "transcoder.expansion_factor=1",
        "transcoder.k=4",
        f"task.batch={{{PICTURES},text:1}}",
        "task.val_scenes=2",
        "task.pool_batches=1",
        "trainer.max_steps=2",
    ],
    "where_in_the_picture": [
        "where.chosen_on=3",
        "where.scenes=1",
        "where.features=1",
        "where.least_share=0.0",
        "where.least_active=0.0",
        "where.draws=1",
        "where.counts=[8]",
    ],
}
LEAVES = {
    "planet_matrix": ["matrix.json", "circuits/mars_earth/circuit.yaml", "report.html", "figures/matrix_steer.png"],
    "linear_story": ["predicted_effects.parquet", "report.html", "figures/predicted.png", "figures/by_edit.png"],
    "mars_earth_patch": ["graph.json", "graph.safetensors", "report.html", "figures/flip_rates.png"],
    "mars_earth_curves": ["curves.json", "report.html", "figures/ablation.png"],
    "modality_by_layer": ["report.html", "study/study.json", "modality.parquet", "figures/modality_by_layer.png"],
    "cross_modal_association": ["report.html", "digits/shared.parquet", "colours/figures/effects.png"],
    "hierarchy": [
        "layer_ranges.json",
        "report.html",
        *(f"figures/{name}.png" for name in ("planet_by_layer", "kinds_picture", "range_first", "alike")),
    ],
    "cross_modal": [
        "shared.parquet",
        "report.html",
        *(f"figures/{name}.png" for name in ("coincidences", "shared_by_layer", "effects")),
    ],
    "visual_arithmetic": ["interchange.json", "sum_features.json", "report.html", "figures/grid_sum.png"],
    "six_fingers": ["report.html", "figures/amplify_fingers.png"],
    "find_circuits": ["discovery.json", "circuits/name/circuit.yaml", "report.html", "figures/edges_name.png"],
    "counting": ["number_line.json", "report.html", "figures/tuning_last.png", "figures/transfer_count_shape.png"],
    "object_recognition": ["report.html", "figures/object_maps.png", "figures/places_changes.png"],
    "captioning": ["caption_words.json", "caption_steering.json", "report.html", "figures/captions.png"],
    "hallucination_prediction": ["cases.parquet", "report.html", "figures/areas.png", "figures/asked.png"],
    "train_orrery": ["model/config.json", "model/model.safetensors", "vlm/checkpoint.safetensors"],
    "train_orrery_transcoders": ["transcoders/config.yaml", "transcoders/layer_7.safetensors"],
    "where_in_the_picture": [
        "report.html",
        "maps.json",
        "figures/deletion.png",
        "figures/pointing.png",
        "figures/lens.png",
    ],
}
METRICS = {
    "planet_matrix": [
        "matrix/steer/name/mars_to_earth/flip_rate_control",
        "matrix/patch/flip_rate_ci_low",
        "matrix/steer/no_last_layer/lowest_flip_rate",
        "matrix/steer/significant_frac",
    ],
    "linear_story": ["predicted/direct/ablate/edge/error", "predicted/free/ablate/total/spearman_ci_low"],
    "mars_earth_patch": [
        "steer/free/flip_rate",
        "ablate/free/changed_rate",
        "steer/generate/name/flip_rate_ci_low",
        "patch/direct/name/flip_rate_ci_low",
        "graph/replacement_score",
    ],
    "mars_earth_curves": ["ablation/layer_07/last/accuracy_drop", "steer/free/role_image/name/flip_rate"],
    "modality_by_layer": ["layers/modality_both/layer_07", "modality/meeting_layer", "study/items"],
    "cross_modal": [
        "cross_modal/colour/by_rule_p",
        "cross_modal/cover/matching/p",
        "ablate/text/changed_rate",
        "patch/text_to_picture/flip_rate_control",
        "patch/picture_to_text/no_last_layer/flip_rate_ci_low",
    ],
    "cross_modal_association": [
        "association/digits/cross_modal/plus_one/by_rule_p",
        "association/colours/cross_modal/earth/shared",
        "association/colours/base/neptune/picture/accuracy",
    ],
    "hierarchy": [
        "read/picture/layer_00/texture",
        "read/last_name/layer_07/planet",
        "depth/name_ci_low",
        "depth/colour_less_cover",
        "way/name/cover/follow_rate_control",
        "ranges/cover/first/layer_03/follow_rate_random_direction",
        "alike/name_cover/last/layer_07_shuffled",
    ],
    "visual_arithmetic": [
        "interchange/all_features/free/sum/follow_rate_ci_low",
        "interchange/features_of_sum/direct/sum/recovered",
        "interchange/all_features/free/second/changed_rate",
        "interchange/features_of_sum/generate/sum/follow_rate",
        "sums/features/by_chance",
    ],
    "find_circuits": ["discovery/name/free/faithfulness", "discovery/name/edges/rank_correlation"],
    "six_fingers": [
        "amplify/fingers/counterfactual/logit_gap",
        "amplify/fingers/original/strength_4/follow_rate_ci_high",
        "amplify/fingers/counterfactual/strength_4/follow_rate_control",
    ],
    "counting": [
        "interchange/features_of_count/free/count/follow_rate",
        "numbers/last/monotone/rho_at_equal_area_ci_low",
        "dose/count/strength_1/shift_control",
        "transfer/count/over_shape/another/recovered_ci_high",
        "interchange/peak_kind/free/shape/changed_rate",
    ],
    "object_recognition": [
        "dissociation/features_of_shape/own_minus_other_ci_low",
        "dissociation/shape/features_of_shape_colour/shape/changed_rate_control",
        "dissociation/features_of_shape/active_under/shape_colour",
        "places/shape/fires/on_object_control",
        "places/shape_colour/carried/ground/recovered_ci_low",
    ],
    "captioning": [
        "captions/planets/colour/from_picture_ci_low",
        "captions/planets/cover/follows_text",
        "caption_steer/mars_to_earth/steered/all_right",
        "caption_steer/red_to_blue/matched_features/log_likelihood",
        "caption_steer/mars_to_earth/others_ungated/planets/changed_rate",
    ],
    "hallucination_prediction": [
        "errors/wrong_rate",
        "errors/pooled/question/auc",
        "errors/within/graph/auc_ci_low",
        "errors/within/probability/auc_control",
        "errors/unseen_question/both/auc",
        "errors/within/gain_ci_high",
    ],
    "train_orrery": ["test/accuracy/name", "test/accuracy_shuffled/sum"],
    "train_orrery_transcoders": ["val/fvu", "layers/fvu/layer_07", "val/ce_delta", "val/dead_frac"],
    "where_in_the_picture": ["where/rollout/deletion_gain_ci_low", "where/vision_path/pointing", "where/maps_kb"],
}


SWEEPS = {"cross_layer", "expansion_sweep", "modality_mix", "sparsity_frontier"}  # in test_sweeps.py


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    counts = dict.fromkeys(KINDS, 8)
    build(OrreryDataConfig(folder=str(folder), train=counts, val=counts, test=counts))
    return folder


def test_every_experiment_has_its_smoke_test_and_its_card() -> None:
    experiments = catalog.options("experiment")
    assert set(experiments) - SWEEPS == set(LIMITS) == set(LEAVES) == set(METRICS)
    folder = Path(__file__).resolve().parents[2] / "experiments"
    for name in experiments:
        assert (folder / f"{name}.md").is_file(), f"{name} has no card"


# Their parts are tested by themselves and in test_captions.py, and visual_arithmetic runs the steps that they share.
SLOW = {"captioning", "counting", "object_recognition", "find_circuits"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in sorted(LIMITS)])
def test_experiment_runs(name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "run"
    where = [f"data.path={data}", f"hydra.run.dir={run_dir}", "tracking=none", "trainer.threads=1"]
    code = main([f"experiment={name}", *LIMITS[name], *where])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert out.out.strip().splitlines()[-1] == str(run_dir)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert set(METRICS[name]) <= set(metrics)
    for file in ("config.yaml", *LEAVES[name]):
        assert (run_dir / file).stat().st_size > 0, file


def test_a_picture_of_ones_own_that_is_not_there_is_told_before_any_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["+images.mars=[/no/mars.png]", f"hydra.run.dir={tmp_path / 'run'}", "tracking=none"]
    assert main(["experiment=mars_earth_patch", *own]) == 2
    assert "/no/mars.png: no such file" in capsys.readouterr().err
    assert not (tmp_path / "run" / "graph.json").exists()


def test_pairs_that_cannot_choose_a_circuit_are_told_before_any_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["experiment=find_circuits", "pairs.train=0", f"hydra.run.dir={tmp_path / 'run'}", "tracking=none"]) == 2
    )
    assert "pairs.train=0 leaves no pair to choose a circuit by" in capsys.readouterr().err
