"""Settings of training: what they refuse, and what of them decides a checkpoint."""

from dataclasses import fields, replace

import pytest

from featcache.config import fingerprint
from featcache.errors import ConfigError
from heads.config.training import HEAD_KINDS, PRESETS, STAGES, StageConfig, TrainConfig, preset

SPATIAL = TrainConfig(head="spatial")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "places"}, "--head: expected one of linear, spatial, core; found 'places'"),
        ({"layers": "all"}, "--layers: expected --head spatial with it; found --head linear"),
        ({"token_dropout": 0.0}, "--token-dropout: expected --head spatial"),
        ({"head": "spatial", "token_dropout": 1.0}, "--token-dropout: expected a number from 0 and below 1"),
        ({"head": "core", "token_dropout": 0.0}, "--token-dropout: expected --head spatial with it; found --head core"),
        ({"head": "core", "core_dropout": 1.0}, "--core-dropout: expected a number from 0 and below 1"),
        ({"head": "core", "hidden": 0}, "--hidden: expected 1 or more"),
        ({"head": "spatial", "rank": 0}, "--rank: expected 1 or more"),
        ({"head": "spatial", "space": -1}, "--space: expected 0 or more"),
        ({"head": "spatial", "smoothness": -0.1}, "--smoothness: expected 0 or more"),
        ({"head": "spatial", "grid": "fine"}, "--grid: expected auto, native or a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_pooled_heads_keep_their_key_and_spatial_settings_are_in_theirs():
    assert "layers" not in TrainConfig().key() and "head" not in TrainConfig().key()
    changed = {"layers": "all", "grid": "5", "space": 4, "rank": 2, "token_dropout": 0.3, "smoothness": 1.0}
    changed |= {"sparsity": 1.0}
    keys = [SPATIAL.key(), *(replace(SPATIAL, **{name: value}).key() for name, value in changed.items())]
    assert len({str(key) for key in keys}) == len(keys)
    assert replace(SPATIAL, layers="0, pooled").key() == replace(SPATIAL, layers="0,pooled").key()


def test_the_order_of_settings_in_a_key_stays():
    """It is that of checkpoint.json."""
    assert list(TrainConfig().key()) == [
        *("loss", "epochs", "batch_size", "accumulate", "correlation_batch", "learning_rate", "head_learning_rate"),
        *("layer_decay", "weight_decay", "warmup", "clip_norm", "ema", "precision", "freeze_norm", "head_start"),
        *("augment", "stop", "patience", "embedding", "seed"),
    ]


def test_losses_have_one_way_to_be_written_in_a_key():
    assert TrainConfig(loss="0.5*mnnpc+ smooth_l1").key()["loss"] == "smooth_l1+0.5*mnnpc"


def test_every_setting_has_a_help_and_a_group_of_its_own_kind():
    for setting in fields(TrainConfig):
        assert setting.metadata["help"].endswith(".") and setting.metadata["panel"]
        readers = [kind for kind, spec in HEAD_KINDS.items() if setting.name in spec.settings]
        assert (setting.metadata["panel"] == "Spatial heads") == (readers == ["spatial"])
        assert (setting.metadata["panel"] == "Layers") == (readers == ["spatial", "core"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "--epochs: expected 1 or more; found 0; raise it"),
        ({"batch_size": 1}, "--batch-size: expected 2 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected a number above 0; found nan"),
        ({"weight_decay": float("inf")}, "--weight-decay: expected a finite number; found inf"),
        ({"ema": 1.5}, "--ema: expected a number from 0 to 1"),
        ({"stop": "soon"}, "--stop: expected one of fold, never; found 'soon'"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_presets_are_settings_of_both_stages():
    assert all(isinstance(preset(name, stage), TrainConfig) for name in PRESETS for stage in STAGES)
    assert preset("fast", "finetune") == TrainConfig(loss="smooth_l1+pearson+mnnpc")
    with pytest.raises(ConfigError, match="--preset: expected one of fast, paper"):
        preset("slow", "pretrain")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fold": 5}, "--fold: expected all or a number from 0 to 4; found 5"),
        ({"n_folds": 1}, "--folds: expected 2 or more"),
        ({"save_every": -1}, "--save-every: expected 0 or more"),
    ],
)
def test_stages_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        StageConfig(stage="pretrain", **settings)


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        (preset("fast", "pretrain"), "59fe12a0c9db"),
        (preset("fast", "finetune"), "b8ae5251e247"),
        (preset("paper", "pretrain"), "92d9d5ce7092"),
        (TrainConfig(head="spatial", loss="smooth_l1+mnnpc", rank=2), "a62749c67aa9"),
    ],
)
def test_keys_without_heads_of_rois_are_older_than_their_losses_and_stay(settings, digest):
    """On a CPU, where auto is float32."""
    assert fingerprint(replace(settings, precision="float32").key()) == digest


def test_the_key_of_heads_of_rois_has_their_loss():
    same = TrainConfig(loss="smooth_l1")
    assert same.key(roi_heads=True) == same.key() | {"roi_loss": "smooth_l1"}
    assert replace(same, roi_loss="smooth_l1").key(roi_heads=True) == same.key(roi_heads=True)
    assert replace(same, roi_loss="mnnpc+smooth_l1").key(roi_heads=True)["roi_loss"] == "smooth_l1+mnnpc"


def test_a_loss_of_heads_of_rois_is_refused_without_them():
    with pytest.raises(ConfigError, match="--roi-loss: expected --head linear with it; found --head spatial"):
        TrainConfig(head="spatial", roi_loss="mse")
    with pytest.raises(ConfigError, match=r"--roi-loss: expected stage 2 .*; found stage 1"):
        StageConfig(stage="pretrain", train=TrainConfig(roi_loss="mse"))
    with pytest.raises(ConfigError, match="--roi-loss: expected each loss once"):
        TrainConfig(roi_loss="mse+mse")


def test_a_correlation_of_heads_of_rois_wants_several_images_too():
    assert TrainConfig(loss="smooth_l1", roi_loss="mnnpc").uses_correlation
    assert not TrainConfig(loss="pattern", roi_loss="smooth_l1").uses_correlation
