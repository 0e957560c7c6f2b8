"""LoRA adapters of one expert, against the same change made to its weights by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils import is_peft_available
from safetensors.torch import save_file

from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = dict(prompt="a castle", seed=3, num_inference_steps=4, output_type="latent")
needs_peft = pytest.mark.skipif(not is_peft_available(), reason="peft is not installed")


def load(**kwargs) -> HybridPipeline:
    pipe = HybridPipeline.from_pretrained(experts_path(), **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def attention(unet) -> dict[str, torch.nn.Linear]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(("attn1.to_q", "attn2.to_k"))
    }


@pytest.fixture(scope="module")
def update(demo_pipeline) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 under diffusers' keys."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in attention(demo_pipeline.unet_sol).items():
        for part, shape in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
            tensors[f"unet.{name}.lora_{part}.weight"] = 0.8 * torch.randn(shape, generator=generator)
    return tensors


@pytest.fixture
def file(tmp_path, update):
    save_file(update, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.fixture(scope="module")
def by_hand(update) -> dict[float, torch.Tensor]:
    """Images with Sol's weights W + scale * B A."""
    images = {}
    for scale in (0.0, 0.5, 1.0):
        pipe = load()
        for name, module in attention(pipe.unet_sol).items():
            a, b = (update[f"unet.{name}.lora_{part}.weight"] for part in "AB")
            module.weight.data += scale * b @ a
        images[scale] = pipe(**QUICK).images
    return images


@needs_peft
@pytest.mark.parametrize("offload", ["none", "expert"])
def test_a_lora_changes_its_expert_alone(file, by_hand, offload):
    pipe = load(offload=offload)
    lune = pipe(expert="lune", **QUICK).images
    pipe.load_lora_weights(file, expert="sol", adapter_name="bold")
    for _ in range(2):
        torch.testing.assert_close(pipe(**QUICK).images, by_hand[1.0], atol=1e-3, rtol=0)
    assert (by_hand[1.0] - by_hand[0.0]).abs().max() > 0.1
    assert torch.equal(pipe(expert="lune", **QUICK).images, lune)
    pipe.set_adapters("bold", 0.5, expert="sol")
    torch.testing.assert_close(pipe(**QUICK).images, by_hand[0.5], atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="sol has LoRA adapters: fuse them or"):
        pipe.save_pretrained(file.parent / "saved")
    pipe.unload_lora_weights()
    assert torch.equal(pipe(**QUICK).images, by_hand[0.0])


@needs_peft
@pytest.mark.parametrize("offload", ["none", "expert"])
def test_a_fused_lora_is_in_the_weights_and_in_what_is_saved(tmp_path, update, by_hand, offload):
    pipe = load(offload=offload)
    pipe.load_lora_weights(update, expert="sol")
    pipe.fuse_lora(expert="sol")
    pipe.unload_lora_weights(expert="sol")
    for _ in range(2):
        torch.testing.assert_close(pipe(**QUICK).images, by_hand[1.0], atol=1e-3, rtol=0)
    pipe.set_offload("expert")
    fused = pipe(**QUICK).images
    torch.testing.assert_close(fused, by_hand[1.0], atol=1e-3, rtol=0)
    pipe.save_pretrained(tmp_path)
    again = HybridPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again(**QUICK).images, fused)


@needs_peft
def test_the_shared_text_encoder_is_asked_about(update, demo_pipeline):
    part = {
        f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{p}.weight": torch.ones(shape)
        for p, shape in (("A", (2, 128)), ("B", (128, 2)))
    }
    both = {**update, **part}
    pipe = load()
    with pytest.raises(ValueError, match="say text_encoder=True to load it too, or text_encoder=False"):
        pipe.load_lora_weights(both, expert="sol")
    pipe.load_lora_weights(both, expert="sol", text_encoder=False)
    plain = demo_pipeline.encode_prompt("a castle")
    assert torch.equal(pipe.encode_prompt("a castle"), plain)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(both, expert="sol", text_encoder=True)
    assert not torch.equal(pipe.encode_prompt("a castle"), plain)
    pipe.unload_lora_weights()
    assert torch.equal(pipe.encode_prompt("a castle"), plain)


@needs_peft
def test_what_is_no_lora_or_not_there(tmp_path, update):
    pipe = load()
    with pytest.raises(ValueError, match='unknown expert "luna": use sol or lune'):
        pipe.load_lora_weights(update, expert="luna")
    with pytest.raises(ValueError, match="this is no LoRA of a UNet: it holds conv_in"):
        pipe.load_lora_weights({"conv_in.lora_A.weight": torch.ones(1)}, expert="sol")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        pipe.load_lora_weights(tmp_path / "broken.safetensors", expert="sol")
    pipe.load_lora_weights(update, expert="sol", adapter_name="bold")
    with pytest.raises(ValueError, match="sol has no adapter 'shy'; it has bold"):
        pipe.set_adapters("shy", expert="sol")


def test_without_peft_the_error_says_what_to_install(demo_pipeline, update, monkeypatch):
    monkeypatch.setattr("moe_sampler.pipelines.adapters.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match="pip install peft"):
        demo_pipeline.load_lora_weights(update, expert="sol")
    with pytest.raises(ValueError, match="pip install peft"):
        demo_pipeline.set_adapters("bold", expert="sol")
