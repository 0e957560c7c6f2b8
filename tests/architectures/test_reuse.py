"""A UNet whose deep features are kept and reused: diffusers' own forward, to the last bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from unets import CROSS, PLAIN, config, inputs, unet

from moe_sampler import Expert, plan, sample
from moe_sampler.architectures import reusable, reuse_share
from moe_sampler.architectures.expert_model import ExpertModel
from moe_sampler.architectures.unet import UNET

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("ends_in", [PLAIN, CROSS])
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_full_call_is_the_models_own_and_its_features_give_it_again(layers, ends_in):
    model = unet(layers=layers, ends_in=ends_in)
    given = inputs()
    expected = UNET.call(model, *given)
    seen = {}
    # What the last layer's first module is given, as a watcher of the plain model sees it.
    hook = model.up_blocks[-1].resnets[-1].register_forward_pre_hook(lambda _, a: seen.update(joined=a[0]))
    UNET.call(model, *given)
    hook.remove()
    output, features = UNET.call_recording(model, *given)
    assert torch.equal(output, expected)
    assert torch.equal(features, seen["joined"][:, : features.shape[1]])
    assert features.shape[1] + 8 == seen["joined"].shape[1]  # conv_in's 8 channels follow
    assert torch.equal(UNET.call_reusing(model, *given, features), expected)
    assert torch.equal(UNET.call(model, *given), expected)  # and the model is what it was

    deeper = [m for m in (*model.down_blocks, model.mid_block, *model.up_blocks[:-1])]
    hooks = [m.register_forward_pre_hook(lambda *_: pytest.fail("a deep layer was run")) for m in deeper]
    other = UNET.call_reusing(model, *inputs(2), features)
    for each in hooks:
        each.remove()
    fresh = UNET.call(model, *inputs(2))
    assert not torch.equal(other, expected) and not torch.equal(other, fresh)


@torch.no_grad()
def test_adapters_act_in_calls_of_both_kinds():
    """Also where they came after the first call, in layers that are the model's own children."""
    from peft import LoraConfig

    model = unet(ends_in=CROSS)
    before, _ = UNET.call_recording(model, *inputs())
    model.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "conv_in", "conv_out"], init_lora_weights=False)
    )
    expected = UNET.call(model, *inputs())
    output, features = UNET.call_recording(model, *inputs())
    assert torch.equal(output, expected) and not torch.equal(output, before)
    assert torch.equal(UNET.call_reusing(model, *inputs(), features), expected)


@torch.no_grad()
def test_weights_that_accelerate_brings_are_brought_for_calls_of_both_kinds():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Bring(ModelHook):
        calls = 0

        def pre_forward(self, module, *inputs, **more):
            self.calls += 1
            return inputs, more

    model, hook = unet(), Bring()
    expected = UNET.call(model, *inputs())
    add_hook_to_module(model, hook)
    reusable(model).check_reusable(model)
    output, features = UNET.call_recording(model, *inputs())
    assert hook.calls == 1 and torch.equal(output, expected)
    assert torch.equal(UNET.call_reusing(model, *inputs(), features), expected) and hook.calls == 2


def test_what_it_costs_is_counted():
    """By hand, of a model whose outermost layer is convolutions: two floating-point operations a weight and
    pixel, beside the linear layers of the timestep."""
    own = config(ends_in=PLAIN)
    pixels, channels = 64, 8
    joined, time = 2 * channels, 4 * channels
    by_hand = 2 * pixels * (9 * 4 * channels + 9 * joined * channels + 9 * channels**2 + joined * channels)
    by_hand += 2 * pixels * 9 * channels * 4  # conv_out
    by_hand += 2 * (channels * time + time * time + time * channels)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as whole:
        unet()(torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 77, 12))
    assert reuse_share(own) == pytest.approx(by_hand / whole.get_total_flops(), rel=1e-12)


def test_what_cannot_is_said_with_what_to_do():
    with pytest.raises(ValueError, match="ends in a AttnUpBlock2D: leave out reuse"):
        reuse_share(config(up_block_types=[CROSS, "AttnUpBlock2D"], down_block_types=["DownBlock2D"] * 2))
    model = unet()
    model.forward = lambda *inputs, **more: (inputs[0],)
    with pytest.raises(ValueError, match="forward was replaced"):
        reusable(model)
    del model.forward
    with pytest.raises(ValueError, match=r"torch.compile's wrapper.*compile its blocks"):
        reusable(torch.compile(model, backend="eager"))
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled as a whole"):
        reusable(model)
    lune = Expert.lune(ExpertModel(model), reuse=2)
    with pytest.raises(ValueError, match="compiled as a whole"):  # before any call
        sample(plan(lune, steps=3), lune, shape=(1, 4, 8, 8), seeds=[1])


@torch.no_grad()
def test_an_expert_of_a_unet_alone():
    model = unet(ends_in=CROSS).to(torch.bfloat16)
    lune = Expert.lune(ExpertModel(model), dtype=torch.bfloat16, guidance_scale=2.0)
    text = inputs(batch=2)[2]
    run = dict(shape=(2, 4, 8, 8), seeds=[1, 2], cond={"prompt_embeds": text})
    run |= {"uncond": {"prompt_embeds": torch.zeros_like(text)}}
    full = sample(plan(lune, steps=5), lune, **run)
    often = dataclasses.replace(lune, reuse=(0, 1, 2, 3, 4))
    assert torch.equal(sample(plan(often, steps=5), often, **run), full)
    reusing = dataclasses.replace(lune, reuse=2)
    assert not torch.equal(sample(plan(reusing, steps=5), reusing, **run), full)
