"""An attention's projections as one product: the same weights by the same names, whatever happens to them."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn
from unets import inputs, unet

from moe_sampler.pipelines.projections import Projections, join_projections

pytestmark = pytest.mark.usefixtures("one_thread")


def joined(**config) -> UNet2DConditionModel:
    model = unet(**config)
    join_projections([model], joined=True)
    return model


def attentions(model: nn.Module) -> list:
    return [m for name, m in model.named_modules() if name.endswith((".attn1", ".attn2"))]


def products(monkeypatch) -> list[int]:
    """How many weights each matrix product that is asked for by the operator has."""
    from moe_sampler.pipelines import projections

    seen = []
    own = projections._adjacent
    monkeypatch.setattr(
        projections, "_adjacent", lambda weights: (seen.append(len(weights)), own(weights))[1]
    )
    return seen


@torch.no_grad()
def test_one_product_is_the_projections_side_by_side(monkeypatch):
    plain, model = unet(), joined()
    names = list(plain.state_dict())
    assert list(model.state_dict()) == names == [name for name, _ in model.named_parameters()]
    seen = products(monkeypatch)
    x = inputs()
    assert torch.allclose(model(*x)[0], plain(*x)[0], atol=1e-5)
    # self-attention: queries, keys and values; of a text: keys and values
    assert seen == [3, 2] * (len(attentions(model)) // 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    attn = attentions(model)[0]
    where = attn.to_q.weight.untyped_storage().data_ptr()
    assert {getattr(attn, name).weight.untyped_storage().data_ptr() for name in ("to_k", "to_v")} == {where}

    join_projections([model], joined=False)
    assert torch.equal(model(*x)[0], plain(*x)[0])
    assert not any(isinstance(m, Projections) for m in model.modules())
    assert {type(attn.processor) for attn in attentions(model)} == {AttnProcessor2_0}


@torch.no_grad()
@pytest.mark.parametrize(
    "happens",
    [
        lambda model: model.load_state_dict(unet(seed=5).state_dict(), assign=True),
        lambda model: model.load_state_dict(unet(seed=5).state_dict()),
        lambda model: nn.Module.to(nn.Module.to(model, torch.float64), torch.float32),
        lambda model: [attn.to_k.weight.mul_(2) for attn in attentions(model)],
        lambda model: [setattr(attn, "to_v", _Added(attn.to_v)) for attn in attentions(model)],
    ],
    ids=["loaded anew", "loaded in place", "cast", "changed in place", "an adapter"],
)
def test_what_happens_to_the_weights_counts(happens):
    model = joined()
    x = inputs()
    model(*x)
    happens(model)
    plain = unet()
    happens(plain)
    assert torch.allclose(model(*x)[0], plain(*x)[0], atol=1e-5)


class _Added(nn.Module):
    """As a LoRA wraps a layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * self.layer(x)


@torch.no_grad()
def test_who_watches_a_projection_sees_it():
    model, seen = joined(), []
    handle = attentions(model)[0].to_k.register_forward_hook(lambda module, args, output: seen.append(output))
    model(*inputs())
    handle.remove()
    model(*inputs())
    assert len(seen) == 1


def test_gradients_reach_every_projection():
    model = joined()
    model(*inputs())[0].sum().backward()
    assert all(p.grad is not None for attn in attentions(model) for p in attn.parameters())


@torch.no_grad()
def test_copies_and_files_have_weights_of_their_own(tmp_path):
    model = joined()
    expected = model(*inputs())[0]
    other = copy.deepcopy(model)
    attentions(other)[0].to_q.weight.zero_()
    assert not torch.equal(other(*inputs())[0], expected) and torch.equal(model(*inputs())[0], expected)
    model.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(again(*inputs())[0], unet()(*inputs())[0])


def test_other_processors_stay():
    model = unet()
    model.set_attn_processor(AttnProcessor())
    join_projections([model], joined=True)
    assert {type(attn.processor) for attn in attentions(model)} == {AttnProcessor}
    model = joined()
    model.set_attn_processor(AttnProcessor())
    join_projections([model], joined=False)
    assert {type(attn.processor) for attn in attentions(model)} == {AttnProcessor}
    assert {type(attn.processor) for attn in attentions(joined())} == {FusedAttnProcessor2_0}


@torch.no_grad()
def test_the_operator_is_sound():
    weights = [torch.randn(4, 3), torch.randn(2, 3)]
    x = torch.randn(2, 5, 3)
    expected = torch.cat([x @ weight.T for weight in weights], -1)
    product = torch.ops.moe_sampler.side_by_side
    for _ in range(2):
        assert torch.allclose(product(x, weights), expected, atol=1e-6)
    # Not "test_schema": values stay, but to be moved in memory counts as changed there.
    torch.library.opcheck(product, (x, weights), test_utils="test_faketensor")
