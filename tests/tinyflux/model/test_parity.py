"""The same numbers as upstream's checkpoints give, and as the mathematics gives for any configuration."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tinyflux_helpers import inputs_of, new_config, trained, v4_config
from tinyflux_reference import Reference
from torch.testing import assert_close

from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig

FIXTURES = Path(__file__).parents[2] / "fixtures"
EXACT = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def published():
    """(model, inputs, features, everything in the file)"""
    with safe_open(FIXTURES / "tinyflux_deep_parity.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    part = lambda start: {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}  # noqa: E731
    model = TinyFlux(TinyFluxConfig.from_dict(config)).eval()
    model.load_state_dict(part("weight."))
    inputs = part("in.")
    features = {name: inputs.pop(name) for name in ("lune_features", "sol_stats", "sol_spatial")}
    return model, inputs, features, tensors, part("grad.")


def test_names_and_shapes_of_the_published_checkpoint():
    expected = json.loads((FIXTURES / "tinyflux_deep_keys.json").read_text())["tensors"]
    with torch.device("meta"):
        model = TinyFlux(TinyFluxConfig.deep_v4())
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == expected
    assert len(expected) == 683
    assert model.num_parameters() == 245_347_234


def test_alone(published):
    model, inputs, _, tensors, _ = published
    out = model(**inputs)
    assert_close(out.sample, tensors["out.alone"], **EXACT)
    for name in (
        "expert_signal",
        "lune_pred",
        "pred_stats",
        "pred_spatial",
        "spatial_importance",
        "temperature",
    ):
        assert_close(out[name], tensors[f"out.alone.{name}"], **EXACT)


def test_guided(published):
    model, inputs, features, tensors, _ = published
    assert_close(model(**inputs, **features).sample, tensors["out.guided"], **EXACT)


def test_loss_and_gradients(published):
    model, inputs, _, tensors, gradients = published
    model.zero_grad()
    loss = (model(**inputs).sample - tensors["loss.target"]).square().mean()
    loss.backward()
    assert_close(loss.detach(), tensors["loss"], **EXACT)
    assert gradients
    for name, expected in gradients.items():
        assert_close(model.get_parameter(name).grad, expected, **EXACT)


WIDE = {"hidden_size": 48, "num_attention_heads": 3, "in_channels": 6, "mlp_ratio": 2.5}
CONFIGS = {
    "published": v4_config(),
    "more heads, channels, blocks": v4_config(**WIDE, num_double_layers=1, num_single_layers=3),
    "no experts": v4_config(use_lune_expert=False, use_sol_prior=False),
    "no experts, no pooled tokens": v4_config(use_lune_expert=False, use_sol_prior=False, use_t5_vec=False),
    "Lune alone": v4_config(use_sol_prior=False),
    "Sol alone": v4_config(use_lune_expert=False, use_t5_vec=False),
    "a small map": v4_config(sol_spatial_size=3, sol_hidden_dim=7),
    "double blocks alone": v4_config(num_single_layers=0),
    "single blocks alone": v4_config(num_double_layers=0),
    "new": new_config(),
    "new, wide": new_config(**WIDE),
    "new, no experts": new_config(use_lune_expert=False, use_sol_prior=False),
}


def float32_of(config):
    """New models' times turn angles up to 1000, where float32's spacing is 6e-5."""
    return {"rtol": 1e-5, "atol": 1e-5 if config.time_factor == 1 else 1e-4}


def wanted(config):
    return [e for e, used in (("lune", config.use_lune_expert), ("sol", config.use_sol_prior)) if used]


@pytest.mark.parametrize("size", [(4, 4), (3, 6)], ids=["square", "wide"])
@pytest.mark.parametrize("real", [False, True], ids=["alone", "guided"])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_configuration(name, real, size):
    config = CONFIGS[name]
    model = trained(config)
    inputs = inputs_of(config, size=size, real=wanted(config) if real else ())
    expected = Reference(config, model.state_dict())(**inputs)
    assert expected.abs().max() > 0.05
    assert_close(model(**inputs).sample.double(), expected, **float32_of(config))
    exact = model.double()(**{k: v.double() if k != "size" else v for k, v in inputs.items()}).sample
    assert exact.dtype == torch.float64
    assert_close(exact, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", [v4_config(), new_config()], ids=["published", "new"])
def test_gradients_of_every_parameter(config):
    model = trained(config)
    inputs = inputs_of(config, real=("lune", "sol"))
    target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3))
    del inputs["lune_features"], inputs["sol_spatial"], inputs["sol_stats"]
    model(**inputs).sample.sub(target).square().mean().backward()
    leaves = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    reference = Reference(config, model.state_dict())
    reference.s |= leaves
    reference(**inputs).sub(target.double()).square().mean().backward()
    unused = {n for n in leaves if "spatial_to_qk_scale" in n or n.startswith("null_")}
    for name, leaf in leaves.items():
        if name in unused:
            assert leaf.grad is None and model.get_parameter(name).grad is None
        else:
            assert_close(model.get_parameter(name).grad.double(), leaf.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("config", [v4_config(), new_config()], ids=["published", "new"])
def test_text_mask(config):
    model = trained(config)
    inputs = inputs_of(config)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    expected = Reference(config, model.state_dict())(**inputs, encoder_attention_mask=mask)
    out = model(**inputs, encoder_attention_mask=mask).sample
    assert_close(out.double(), expected, **float32_of(config))
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].masked_fill(~mask[..., None], 7.0)
    assert_close(model(**inputs, encoder_attention_mask=mask).sample, out, **EXACT)
    assert (model(**inputs).sample - out).abs().max() > 1e-3
