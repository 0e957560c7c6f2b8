"""What the student promises beyond its numbers: options that act, precision, memory, compilation."""

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from tinyflux_helpers import inputs_of, new_config, trained, v4_config
from torch import nn
from torch.testing import assert_close

from moe_sampler.tinyflux import TinyFlux, TinyFluxConfig
from moe_sampler.tinyflux.model import dense
from moe_sampler.tinyflux.model.dense import Linear
from moe_sampler.tinyflux.model.layers import SingleBlock

BOTH = pytest.mark.parametrize("config", [v4_config(), new_config()], ids=["published", "new"])


# Initialisation


def test_a_new_model_predicts_nothing_and_its_blocks_do_nothing():
    torch.manual_seed(0)
    config = new_config()
    model, inputs = TinyFlux(config).eval(), inputs_of(config)
    assert model(**inputs).sample.abs().max() == 0
    seen = {}
    model.single_blocks[0].register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    model.single_blocks[-1].register_forward_hook(lambda *args: seen.update(after=args[-1]))
    model(**inputs)
    start = [model.txt_in(inputs["encoder_hidden_states"]), model.img_in(inputs["hidden_states"])]
    assert_close(seen["before"], torch.cat(start, 1), rtol=0, atol=0)
    assert_close(seen["after"], seen["before"], rtol=0, atol=0)


def test_initialisations_survive():
    model = TinyFlux(new_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("norm1.linear.weight", "norm.linear.weight")) or "spatial_to_mod" in name:
            assert parameter.abs().max() == 0, name
    assert torch.sigmoid(model.sol_prior.blend_gate).item() == pytest.approx(0.7)
    weight = model.lune_predictor.input_proj.weight
    glorot = 0.5 * math.sqrt(6 / sum(weight.shape))
    assert 0.9 * glorot < weight.abs().max().item() <= glorot


def test_every_parameter_learns():
    """A few steps from the start, which zeros pass on one by one, none is left without a gradient."""
    torch.manual_seed(0)
    config = new_config()
    model = TinyFlux(config)
    inputs = inputs_of(config, batch=4) | {"drop_text": torch.tensor([True, False, False, False])}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        optimiser.zero_grad()
        out = model(**inputs)
        loss = (out.sample - inputs["hidden_states"]).square().mean() + out.pred_stats.square().mean()
        loss.backward()
        optimiser.step()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert not silent


def test_frozen_predictors():
    model = TinyFlux(new_config(freeze_lune=True, freeze_sol=True))
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"lune_predictor", "sol_prior"}
    assert not any(
        p.requires_grad for p in [*model.lune_predictor.parameters(), *model.sol_prior.parameters()]
    )


def test_the_demo_student_learns():
    torch.manual_seed(0)
    config = TinyFluxConfig.demo(num_double_layers=1, num_single_layers=1)
    model, inputs = TinyFlux(config), inputs_of(config, size=(8, 8), batch=4)
    target = inputs["hidden_states"].roll(1, 1)  # wants attention: every token its neighbour's latent
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(model(**inputs).sample, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# Options


def test_neighbouring_times_differ_for_new_models():
    """Cosine of the embeddings of 0.30 and 0.31 before their MLP."""
    cosines = {}
    for config in (v4_config(), new_config()):
        time, seen = TinyFlux(config).time_in, []
        time.mlp[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        time(torch.tensor([0.30, 0.31]))
        cosines[config.time_factor] = F.cosine_similarity(*seen[0], dim=0).item()
    assert cosines[1.0] > 0.99999
    assert cosines[1000.0] < 0.9


def test_each_heads_temperature_acts():
    """Statistics that move the heads' temperatures apart but not their mean change new models alone."""
    for config, acts in ((v4_config(), False), (new_config(), True)):
        model, inputs = trained(config), inputs_of(config)
        before = model(**inputs)
        prior = model.sol_prior.stat_to_temperature
        prior.register_forward_hook(lambda _, args, out: out + torch.tensor([0.3, -0.3]))
        after = model(**inputs)
        assert_close(before.temperature.mean(1), after.temperature.mean(1))
        assert ((after.sample - before.sample).abs().max() > 1e-4) == acts


def test_the_maps_scale():
    """A real map may sum to 1 or average 1; predicted, real and blended maps average 1."""
    config = new_config()
    model, inputs = trained(config), inputs_of(config, real=("sol",))
    out = model(**inputs)
    assert_close(out.pred_spatial.mean((1, 2)), torch.ones(2))
    assert_close(out.spatial_importance.mean((1, 2)), torch.ones(2))
    inputs["sol_spatial"] = 64 * inputs["sol_spatial"]
    assert_close(model(**inputs).sample, out.sample)


def test_a_map_of_zeros_is_no_division_by_zero():
    config = new_config()
    model, inputs = trained(config), inputs_of(config, real=("sol",))
    inputs["sol_spatial"] = torch.zeros_like(inputs["sol_spatial"]).requires_grad_()
    out = model(**inputs)
    assert out.sample.isfinite().all() and out.spatial_importance.isfinite().all()
    out.sample.square().mean().backward()
    assert inputs["sol_spatial"].grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@BOTH
def test_dropped_text_is_the_null_condition(config):
    model, inputs = trained(config), inputs_of(config, batch=3)
    dropped = torch.tensor([True, False, True])
    out = model(**inputs, drop_text=dropped).sample
    null = model.null_condition(3, inputs["encoder_hidden_states"].shape[1])
    without = model(**{**inputs, **null}).sample
    assert_close(out, torch.where(dropped[:, None, None], without, model(**inputs).sample))
    assert (without - model(**inputs).sample).abs().max() > 1e-3
    values = torch.cat([null["encoder_hidden_states"].flatten(), null["pooled_projections"].flatten()])
    assert (values.abs().max() == 0) == (config.null_condition == "zero")


def test_dropped_text_uncovers_masked_tokens():
    config = new_config()
    model, inputs = trained(config), inputs_of(config)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    out = model(**inputs, encoder_attention_mask=mask, drop_text=torch.tensor([True, True])).sample
    null = model.null_condition(2, 5, mask=True)
    assert_close(out, model(**{**inputs, **null}).sample)
    assert model(**inputs, encoder_attention_mask=mask).sample.isfinite().all()  # a text without any token


def test_positions():
    """The default ids are (0, y, x) and zeros; other ids act."""
    config = new_config()
    model, inputs = trained(config), inputs_of(config, size=(3, 6))
    default = model(**inputs).sample
    img_ids, txt_ids = TinyFlux.create_img_ids(3, 6), torch.zeros(5, 3)
    assert img_ids[7].tolist() == [0, 1, 1]
    given = {"img_ids": img_ids.expand(2, -1, -1), "txt_ids": txt_ids.expand(2, -1, -1)}
    assert_close(model(**inputs, **given).sample, default, rtol=0, atol=0)
    moved = model(**inputs, img_ids=2 * img_ids).sample
    assert (moved - default).abs().max() > 1e-4
    txt_ids[:, 1] = torch.arange(5)
    assert (model(**inputs, txt_ids=txt_ids).sample - default).abs().max() > 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": torch.zeros(2, 16, 3)}, "hidden_states must have shape"),
        ({"hidden_states": torch.zeros(2, 15, 4), "size": None}, "give size"),
        ({"hidden_states": torch.zeros(16, 4)}, "hidden_states and encoder_hidden_states"),
        ({"size": (2, 6)}, "2×6"),
        ({"size": None, "img_ids": TinyFlux.create_img_ids(2, 8)}, "give size"),
        ({"img_ids": torch.zeros(15, 3)}, "img_ids"),
        ({"txt_ids": torch.zeros(4, 3)}, "txt_ids"),
        ({"pooled_projections": torch.zeros(1, 20)}, "pooled_projections"),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"encoder_attention_mask": torch.ones(2, 4)}, "encoder_attention_mask"),
        ({"drop_text": torch.zeros(3, dtype=torch.bool)}, "drop_text"),
        ({"lune_features": torch.zeros(2, 41)}, "lune_features"),
        ({"sol_spatial": torch.zeros(2, 4, 4)}, "sol_spatial"),
    ],
)
def test_refusals(change, message):
    config = new_config()
    model = TinyFlux(config)
    with pytest.raises(ValueError, match=message):
        model(**{**inputs_of(config), **change})


def test_features_need_their_expert():
    config = new_config(use_lune_expert=False, use_sol_prior=False)
    model = TinyFlux(config)
    for real in ("lune", "sol"):
        with pytest.raises(ValueError, match="False"):
            model(**inputs_of(config, real=(real,)))


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="from_config"):
        TinyFlux({"hidden_size": 32})


def test_output_forms():
    config = new_config(use_sol_prior=False)
    model, inputs = trained(config), inputs_of(config)
    out = model(**inputs)
    assert out.temperature is None and out.lune_pred is not None
    (sample,) = model(**inputs, return_dict=False)
    assert_close(sample, out[0], rtol=0, atol=0)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_time_and_positions_stay_float32(dtype, caplog, monkeypatch):
    """Neighbouring pixels at 100 and times at 0.3 keep apart in a model of 8 bits of mantissa."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    model = TinyFlux(new_config()).to(dtype)
    assert not caplog.records
    assert model.img_in.weight.dtype == dtype
    cos, sin = model.rope(torch.tensor([[0, 0, 100], [0, 0, 101]]))
    exact = 100 + torch.arange(2, dtype=torch.float64)
    assert_close(cos[:, 5].double(), exact.cos(), rtol=0, atol=1e-5)
    assert sin.dtype == torch.float32
    seen = []
    model.time_in.mlp[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    model.time_in(torch.tensor([0.3001]))
    assert_close(seen[0][0, 0], torch.tensor(math.sin(300.1)).double(), rtol=0, atol=5e-3)


@BOTH
def test_low_precision(config):
    """Within the error of the same student with its weights and inputs rounded, and everything else exact."""
    model, inputs = trained(config), inputs_of(config, real=("lune", "sol"))
    exact = model(**inputs).sample
    low = trained(config).to(torch.bfloat16)(**inputs).sample
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(**inputs).sample
    assert mixed.dtype == torch.bfloat16
    assert (mixed.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("rows, bias", [(1, True), (15, True), (16, True), (200, False)])
@pytest.mark.parametrize("onednn", [True, False])
def test_linear_is_torchs(rows, bias, onednn, monkeypatch):
    monkeypatch.setattr(dense, "mkl_keeps_to_avx2", lambda: onednn)
    torch.manual_seed(0)
    layer = Linear(32, 48, bias=bias)
    x = torch.randn(2, rows, 32, requires_grad=True)
    wanted = [x, *layer.parameters()]
    out, expected = layer(x), F.linear(x, layer.weight, layer.bias)
    slope = torch.randn_like(out)
    assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out, wanted, slope), torch.autograd.grad(expected, wanted, slope), strict=True
    ):
        assert ours.shape == theirs.shape
        assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_onednn_is_for_processors_whose_maker_is_not_mkls(monkeypatch):
    for maker, own in (
        ("vendor_id\t: AuthenticAMD", True),
        ("vendor_id\t: GenuineIntel", False),
        ("", False),
    ):
        monkeypatch.setattr(dense.Path, "read_text", lambda *_, text=maker, **__: text)
        assert dense.mkl_keeps_to_avx2.__wrapped__() is own
        monkeypatch.setattr(dense, "mkl_keeps_to_avx2", lambda own=own: own)
        assert Linear(8, 8)._use_onednn(torch.zeros(1, 16, 8)) is own
        monkeypatch.undo()


def test_linear_of_slices_and_frozen_weights(monkeypatch):
    monkeypatch.setattr(dense, "mkl_keeps_to_avx2", lambda: True)
    torch.manual_seed(0)
    layer = Linear(32, 48).requires_grad_(False)
    x = torch.randn(2, 300, 32, requires_grad=True)
    out = layer(x[:, 100:])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert_close(gradient[:, 100:], layer.weight.sum(0).expand(2, 200, 32), rtol=1e-5, atol=1e-5)
    assert_close(out, F.linear(x[:, 100:], layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


# Memory and compilation


@BOTH
def test_gradient_checkpointing(config):
    """Every block runs once more, the gradients are the same to the last bit, and less is kept meanwhile."""
    model, inputs = trained(config), inputs_of(config, size=(16, 16))
    inputs["hidden_states"].requires_grad_()
    runs, kept, gradients = {}, {}, {}
    for enabled in (False, True):
        if enabled:
            model.enable_gradient_checkpointing()
        runs[enabled], kept[enabled] = [], 0
        blocks = [*model.double_blocks, *model.single_blocks]
        hooks = [b.register_forward_pre_hook(lambda *_, n=enabled: runs[n].append(1)) for b in blocks]

        def keep(tensor, n=enabled):
            kept[n] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**inputs).sample.square().mean()
        wanted = [inputs["hidden_states"], *(p for n, p in model.named_parameters() if "attn" in n)]
        gradients[enabled] = torch.autograd.grad(loss, wanted)
        for hook in hooks:
            hook.remove()
    assert (len(runs[False]), len(runs[True])) == (4, 8)
    assert kept[True] < 0.25 * kept[False]
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        assert_close(recomputed, plain, rtol=0, atol=0)
    model.disable_gradient_checkpointing()
    model(**inputs)
    assert not model.gradient_checkpointing


@pytest.mark.parametrize(
    ("config", "checkpointing"),
    [(v4_config(), False), (new_config(), True)],
    ids=["published", "new, with checkpointing"],
)
def test_compiles_whole(config, checkpointing):
    model, inputs = trained(config), inputs_of(config, size=(3, 6), real=("lune", "sol"))
    if checkpointing:
        model.enable_gradient_checkpointing()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    parameters = [p for n, p in model.named_parameters() if "attn" in n]
    results = []
    for run in (model, compiled):
        out = run(**inputs).sample
        results.append((out, torch.autograd.grad(out.square().mean(), parameters)))
    assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(results[1][1], results[0][1], strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_tables_and_maps_are_computed_once(monkeypatch):
    from moe_sampler.tinyflux.model import conditioning

    config = new_config()
    model, inputs, counts = trained(config), inputs_of(config), {"tables": 0, "maps": 0}
    interpolate = F.interpolate
    model.rope.register_forward_hook(lambda *_: counts.update(tables=counts["tables"] + 1))

    def counted(*args, **kwargs):
        counts["maps"] += 1
        return interpolate(*args, **kwargs)

    monkeypatch.setattr(conditioning.F, "interpolate", counted)
    model(**inputs)
    assert counts == {"tables": 1, "maps": 1}


def test_blocks_are_found_by_diffusers():
    model = TinyFlux(new_config())
    kinds = {type(m).__name__ for m in model.modules()}
    assert set(model._no_split_modules) <= kinds
    assert isinstance(model.single_blocks[0], SingleBlock)
    assert all(type(m) is Linear for m in model.modules() if isinstance(m, nn.Linear) and m is not None)


@BOTH
def test_samples_use_real_features_or_predict_them(config):
    """Each as if it were alone in a batch that does either."""
    model, inputs = trained(config), inputs_of(config, batch=4, real=("lune", "sol"))
    lune, sol = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    with torch.no_grad():
        found = model(**inputs, lune_mask=lune, sol_mask=sol)
        for row in range(4):
            own = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
            if not lune[row]:
                del own["lune_features"]
            if not sol[row]:
                del own["sol_stats"], own["sol_spatial"]
            for name, expected in model(**own).items():
                assert_close(found[name][row : row + 1], expected, rtol=1e-4, atol=1e-5)
