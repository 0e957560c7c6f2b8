"""What a file says of itself, against what is said of it."""

from __future__ import annotations

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_sampler import ExpertSource, HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError
from moe_sampler.loading.expert_files import find_training
from moe_sampler.loading.hub import Hub

pytestmark = pytest.mark.usefixtures("one_thread")

SOL = experts_path() / "unet_sol" / "diffusion_pytorch_model.safetensors"
ZERO_SNR = {
    **{"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    **{"timestep_spacing": "trailing", "clip_sample": False},
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}


def marked(folder, metadata=None, tensors=()):
    file = folder / "model.safetensors"
    weights = load_file(SOL)
    save_file({**weights, **{key: torch.ones(1) for key in tensors}}, file, metadata)
    return file


def load(name, source, training=None):
    pipe = HybridPipeline.from_pretrained(experts_path(), experts={name: ExpertSource(source, training)})
    return next(expert for expert in pipe.experts() if expert.name == name)


@pytest.mark.parametrize(
    ("metadata", "tensors", "prediction", "zero"),
    [
        ({"modelspec.prediction_type": "v"}, (), "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon", False),
        ({"modelspec.predict_key": "v-prediction"}, (), "v_prediction", False),
        ({"modelspec.prediction_type": "rectified flow"}, (), "flow_prediction", False),
        ({"ss_base_model_version": "sd_v2_768_v"}, (), "v_prediction", False),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, (), "v_prediction", True),
        ({}, ("v_pred",), "v_prediction", False),
        ({}, ("v_pred", "ztsnr"), "v_prediction", True),
    ],
)
def test_marks_alone_count(tmp_path, metadata, tensors, prediction, zero):
    expert = load("mine", marked(tmp_path, metadata, tensors))
    assert expert.prediction == prediction
    assert getattr(expert.path, "zero_terminal_snr", False) == zero


@pytest.mark.parametrize(
    ("name", "training", "metadata", "tensors"),
    [
        ("sol", None, {"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "False"}, ("v_pred",)),
        ("mine", "sol", {}, ("v_pred",)),
        ("mine", ZERO_SNR, {}, ("v_pred", "ztsnr")),
        ("mine", FLOW, {"modelspec.prediction_type": "flow"}, ()),
        ("mine", {**ZERO_SNR, "rescale_betas_zero_snr": None}, {"ss_zero_terminal_snr": "False"}, ()),
        ("mine", FLOW, {"modelspec.title": "castles", "ss_v2": "True"}, ()),
    ],
)
def test_marks_that_agree_change_nothing(tmp_path, name, training, metadata, tensors):
    expert = load(name, marked(tmp_path, metadata, tensors), training)
    plain = load(name, SOL, training)
    assert (expert.prediction, expert.path, expert.shift) == (plain.prediction, plain.path, plain.shift)


def assert_refused(name, file, training, message):
    """In one line, by whoever loads the file and by whoever only asks what it was trained on."""
    with pytest.raises(CheckpointError, match=message) as error:
        load(name, file, training)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(CheckpointError, match=message):
        find_training(name, ExpertSource(file, training), Hub())


@pytest.mark.parametrize(
    ("name", "training", "metadata", "tensors", "message"),
    [
        ("sol", None, {"modelspec.prediction_type": "epsilon"}, (), "the name sol says v_prediction"),
        ("lune", None, {}, ("v_pred",), "v_pred that its prediction_type is v_prediction, but the name"),
        ("sd15", None, {"modelspec.prediction_type": "v"}, (), "but the name sd15 says epsilon"),
        ("sol", None, {}, ("ztsnr",), "rescale_betas_zero_snr is True, but the name sol says False"),
        ("mine", ZERO_SNR, {"ss_zero_terminal_snr": "False"}, (), "is False, but the training given"),
        ("mine", "sd15", {"modelspec.prediction_type": "flow"}, (), "given for mine says epsilon"),
        ("mine", FLOW, {}, ("v_pred",), "says flow_prediction"),
        ("mine", None, {"modelspec.prediction_type": "epsilon"}, ("v_pred",), "contradicts itself"),
        ("mine", None, {"modelspec.prediction_type": "score"}, (), "predicts score, which is not supported"),
        ("mine", None, {}, ("edm_vpred.sigma_max",), "predicts EDM, which is not supported"),
        ("mine", None, {}, ("ztsnr",), "nothing says what it was trained on"),
    ],
)
def test_marks_that_contradict_are_refused(tmp_path, name, training, metadata, tensors, message):
    file = marked(tmp_path, metadata, tensors)
    assert_refused(name, file, training, message)


def torch_marked(folder, outer=(), tensors=(), suffix=".ckpt"):
    file = folder / f"model{suffix}"
    weights = {**load_file(SOL), **{key: torch.ones(1) for key in tensors}}
    torch.save({"state_dict": weights, "global_step": 7, **dict(outer)}, file)
    return file


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
@pytest.mark.parametrize(
    ("outer", "tensors", "prediction", "zero"),
    [
        ({}, ("v_pred",), "v_prediction", False),
        ({}, ("v_pred", "ztsnr"), "v_prediction", True),
        ({"v_pred": torch.ones(())}, (), "v_prediction", False),
        ({"metadata": {"modelspec.prediction_type": "v"}}, (), "v_prediction", False),
        ({"__metadata__": {"ss_v_parameterization": "True"}}, (), "v_prediction", False),
        ({"modelspec.prediction_type": "epsilon"}, (), "epsilon", False),
        ({"hyper_parameters": {"parameterization": "v", "base_lr": 1e-4}}, (), "v_prediction", False),
        ({"hyper_parameters": {"params": {"parameterization": "eps"}}}, (), "epsilon", False),
        ({"cfg": {"prediction_type": "flow_matching"}}, (), "flow_prediction", False),
        (
            {"args": {"v_parameterization": True, "zero_terminal_snr": True, "lr": None}},
            (),
            *("v_prediction", True),
        ),
        ({"cfg": {"scheduler": {"prediction_type": "v_prediction"}}}, (), "v_prediction", False),
    ],
)
def test_marks_of_torch_files_count_as_those_of_safetensors(
    tmp_path, suffix, outer, tensors, prediction, zero
):
    file = torch_marked(tmp_path, outer, tensors, suffix)
    expert = load("mine", file)
    assert expert.prediction == prediction
    assert getattr(expert.path, "zero_terminal_snr", False) == zero


@pytest.mark.parametrize(
    ("name", "training", "outer", "tensors", "message"),
    [
        ("sd15", None, {}, ("v_pred",), "its tensor v_pred that its prediction_type .* sd15 says epsilon"),
        ("sol", None, {"cfg": {"prediction_type": "epsilon"}}, (), "the name sol says v_prediction"),
        ("lune", None, {"hyper_parameters": {"parameterization": "v"}}, (), "but the name lune says flow"),
        ("mine", "sol", {"zero_terminal_snr": True}, (), "zero_terminal_snr = True .* given for mine says"),
        ("mine", None, {"metadata": {"modelspec.prediction_type": "score"}}, (), "predicts score, which is"),
        ("mine", None, {"cfg": {"prediction_type": "epsilon"}}, ("v_pred",), "contradicts itself"),
        ("mine", None, {"cfg": {"prediction_type": "velocity"}}, (), "nothing says what it was trained on"),
        ("mine", None, {"cfg": {"prediction_type": None, "lr": 1e-4}}, (), "nothing says what it was"),
    ],
)
def test_marks_of_torch_files_that_contradict_are_refused(tmp_path, name, training, outer, tensors, message):
    file = torch_marked(tmp_path, outer, tensors)
    assert_refused(name, file, training, message)


def test_a_trainers_velocity_contradicts_neither_v_nor_a_flow(tmp_path):
    file = torch_marked(tmp_path, {"cfg": {"prediction_type": "velocity"}})
    assert load("sol", file).prediction == "v_prediction"
    assert load("lune", file).prediction == "flow_prediction"


def test_a_folders_file_against_the_config_beside_it(tmp_path):
    pipe = diffusers.UNet2DConditionModel.from_pretrained(SOL.parent)
    pipe.save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler.from_config(ZERO_SNR).save_pretrained(tmp_path / "scheduler")
    marked(tmp_path, {"modelspec.prediction_type": "epsilon"}).rename(tmp_path / "unet" / SOL.name)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json says v_prediction"):
        load("mine", tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".sft"])
def test_a_safetensors_file_under_another_suffix_is_said_to_be_one(tmp_path, suffix):
    file = marked(tmp_path).rename(tmp_path / f"model{suffix}")
    with pytest.raises(CheckpointError, match=rf"model\{suffix} is a safetensors file: rename it to"):
        load("sol", file)
