"""LoRA adapters of one expert, against the same change made to its weights by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import is_peft_available
from safetensors.torch import save_file

from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.errors import CheckpointError

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


def text_part(down: tuple[int, int]) -> dict[str, torch.Tensor]:
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    return {f"{layer}.lora_A.weight": torch.ones(down), f"{layer}.lora_B.weight": torch.ones(down[::-1])}


@needs_peft
def test_a_files_own_alpha_counts(tmp_path, update, by_hand, demo_pipeline):
    """As PEFT's config in a file of diffusers says it: alpha 1 of rank 2 is half the strength."""
    from peft import LoraConfig

    config = LoraConfig(r=2, lora_alpha=1, target_modules=sorted(attention(demo_pipeline.unet_sol)))
    layers = {key.removeprefix("unet."): tensor for key, tensor in update.items()}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config.to_dict()
    )
    pipe = load()
    pipe.load_lora_weights(tmp_path, expert="sol")
    torch.testing.assert_close(pipe(**QUICK).images, by_hand[0.5], atol=1e-3, rtol=0)


@needs_peft
def test_a_fused_lora_may_be_scaled(update, by_hand, demo_pipeline):
    half = text_part((2, 128))
    pipe = load()
    pipe.load_lora_weights({**update, **half}, expert="sol", adapter_name="bold", text_encoder=True)
    pipe.fuse_lora(expert="sol", lora_scale=0.5)
    own, plain = (p.text_encoder.state_dict() for p in (pipe, demo_pipeline))
    (changed,) = [key for key in plain if not torch.equal(own[key], plain[key])]
    assert changed.endswith("encoder.layers.0.self_attn.q_proj.weight")
    a, b = half.values()
    torch.testing.assert_close(own[changed], plain[changed] + 0.5 * b @ a)
    pipe.text_encoder.load_state_dict(plain)
    torch.testing.assert_close(pipe(**QUICK).images, by_hand[0.5], atol=1e-3, rtol=0)


@needs_peft
def test_the_shared_text_encoder_is_asked_about(update, demo_pipeline):
    both = {**update, **text_part((2, 128))}
    pipe = load()
    with pytest.raises(ValueError, match="say text_encoder=True to load it too, or text_encoder=False"):
        pipe.load_lora_weights(both, expert="sol")
    pipe.load_lora_weights(both, expert="sol", text_encoder=False)
    plain = demo_pipeline.encode_texts("a castle")
    assert torch.equal(pipe.encode_texts("a castle"), plain)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(both, expert="sol", text_encoder=True)
    assert not torch.equal(pipe.encode_texts("a castle"), plain)
    pipe.unload_lora_weights()
    assert torch.equal(pipe.encode_texts("a castle"), plain)


@needs_peft
def test_a_folder_holds_one_lora_or_says_which(update, tmp_path):
    for name in ("style.safetensors", "other.safetensors"):
        save_file(update, tmp_path / name)
    (tmp_path / "empty").mkdir()
    pipe = load()
    with pytest.raises(CheckpointError, match=r"several files, other.*, style.*: say which as weight_name"):
        pipe.load_lora_weights(tmp_path, expert="sol")
    with pytest.raises(CheckpointError, match=r"empty holds no \.safetensors file"):
        pipe.load_lora_weights(tmp_path, expert="sol", subfolder="empty")
    pipe.load_lora_weights(tmp_path, expert="sol", weight_name="style.safetensors")
    (tmp_path / "other.safetensors").unlink()
    pipe.load_lora_weights(tmp_path.parent, expert="lune", subfolder=tmp_path.name)
    assert pipe.unet_sol.peft_config and pipe.unet_lune.peft_config


@needs_peft
def test_the_text_encoders_half_is_a_part_of_its_adapter(update, tmp_path):
    """Scaled, several at once, fused, unloaded and saved with it; against weights changed by hand."""
    layer = "encoder.layers.0.self_attn.q_proj"
    halves = {
        expert: {k: 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(i)) for k, v in text}
        for i, (expert, text) in enumerate((e, text_part((2, 128)).items()) for e in ("sol", "lune"))
    }

    def weights(text_encoder):
        return next(m.weight for n, m in text_encoder.named_modules() if n.endswith(layer))

    def by_hand(**scales):
        plain = load()
        for expert, scale in scales.items():
            a, b = halves[expert].values()
            weights(plain.text_encoder).data += scale * b @ a
        return plain.encode_texts("a castle")

    def check(pipe, **scales):
        torch.testing.assert_close(pipe.encode_texts("a castle"), by_hand(**scales), atol=1e-4, rtol=0)

    assert not torch.allclose(by_hand(sol=1.0), by_hand(), atol=1e-3)
    pipe = load()
    for expert, half in halves.items():
        pipe.load_lora_weights({**update, **half}, expert=expert, adapter_name="bold", text_encoder=True)
    check(pipe, sol=1.0, lune=1.0)
    pipe.set_adapters("bold", 0.5, expert="sol")
    check(pipe, sol=0.5, lune=1.0)
    pipe.set_adapters("bold", [0.25], expert="lune")
    check(pipe, sol=0.5, lune=0.25)
    with pytest.raises(ValueError, match=r"has LoRA adapters: fuse them"):
        pipe.save_pretrained(tmp_path)
    pipe.fuse_lora(expert="sol")
    check(pipe, sol=0.5, lune=0.25)
    pipe.unload_lora_weights(expert="lune")
    check(pipe, sol=0.5)
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path)
    check(HybridPipeline.from_pretrained(tmp_path), sol=0.5)
    pipe = load()
    for expert, half in halves.items():
        pipe.load_lora_weights({**update, **half}, expert=expert, text_encoder=True)
    pipe.unload_lora_weights(expert="sol")
    check(pipe, lune=1.0)
    pipe.unload_lora_weights()
    assert torch.equal(pipe.encode_texts("a castle"), by_hand())


@needs_peft
def test_what_is_no_lora_or_not_there(tmp_path, update):
    pipe = load()
    with pytest.raises(ValueError, match='unknown expert "luna": use sol or lune'):
        pipe.load_lora_weights(update, expert="luna")
    with pytest.raises(ValueError, match="the LoRA is no LoRA of a UNet: it holds conv_in"):
        pipe.load_lora_weights({"conv_in.lora_A.weight": torch.ones(1)}, expert="sol")
    (tmp_path / "broken.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        pipe.load_lora_weights(tmp_path / "broken.safetensors", expert="sol")
    pipe.load_lora_weights(update, expert="sol", adapter_name="bold")
    with pytest.raises(ValueError, match="sol has no adapter 'shy'; it has bold"):
        pipe.set_adapters("shy", expert="sol")


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, file) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@needs_peft
@pytest.mark.parametrize("harmless", [True, False])
@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "style.pt", "style.safetensors"])
def test_a_pickled_lora_is_refused_and_never_run(demo_pipeline, tmp_path, update, name, harmless):
    """Also one that torch would read as tensors alone: it may be read as what isn't checked."""
    trace = tmp_path / "trace"
    torch.save(update if harmless else {**update, "more": Payload(trace)}, tmp_path / name)
    for source, more in ((tmp_path / name, {}), (tmp_path, {}), (tmp_path, {"weight_name": name})):
        with pytest.raises(CheckpointError) as error:
            demo_pipeline.load_lora_weights(source, expert="sol", **more)
        assert len(str(error.value).splitlines()) == 1
    assert not trace.exists() and not getattr(demo_pipeline.unet_sol, "peft_config", {})


FIRST = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"


def renamed(update, count):
    """The keys of the first few layers, as another model would call them."""
    names = sorted(update)[:count]
    return {key.replace("attn", "attention") if key in names else key: t for key, t in update.items()}


def with_key(key, shape=(2, 8)):
    return lambda update: {**update, key: torch.ones(shape)}


def without_first(update):
    return {key: tensor for key, tensor in update.items() if key != FIRST}


def kohya(**tensors):
    return lambda update: {f"lora_unet_{key}": tensor for key, tensor in tensors.items()}


TEXT = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@needs_peft
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda update: renamed(update, 4),
            "is no LoRA of this UNet2DConditionModel; of no layer: .*attention1",
        ),
        (lambda update: renamed(update, 24), "of no layer: .* and 19 more"),
        (with_key("unet.conv_norm_out.lora_A.weight"), "of no layer: conv_norm_out.lora_A"),
        (without_first, "half of a pair: mid_block.attentions.0"),
        (with_key(FIRST, (2, 5)), "misshapen: mid_block.* 2×5"),
        (with_key(FIRST, (3, 1)), "misshapen"),
        (with_key(f"{LAYER}.dora_scale"), "is a DoRA.* it holds .*dora_scale"),
        (with_key(f"{LAYER}.lora_magnitude_vector"), "is a DoRA"),
        (with_key("lora_unet_mid.hada_w1_a"), r"is a LoHa \(LyCORIS\).* it holds lora_unet_mid.hada_w1_a"),
        (with_key("lora_unet_mid.lokr_w1"), "is a LoKr"),
        (with_key("lora_unet_mid.diff"), "is full differences"),
        (with_key("bundle_emb.style.string_to_param.*"), "is a LoRA with a textual inversion embedding"),
        (with_key("lora_te2_text_model_x.lora_down.weight"), "is a LoRA of SDXL"),
        (with_key("transformer.single_transformer_blocks.0.x.lora_A.weight"), "is a LoRA of Flux"),
        (kohya(double_blocks_0_img_attn_qkv=torch.ones(2, 8)), "is a LoRA of Flux"),
        (kohya(**{TEXT: torch.ones(2, 2048)}), "is a LoRA of SDXL: its .* takes text of 2048 channels"),
        (kohya(**{"x.lora_down.weight": torch.ones(2, 8)}), "it has no 'lora_unet_x.lora_up.weight'"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_lora_that_would_be_loaded_in_part_is_refused_whole(
    demo_pipeline, tmp_path, update, change, message, as_file
):
    tensors = source = change(update)
    if as_file:
        source = tmp_path / "style.safetensors"
        save_file(tensors, source)
    before = {name: type(module) for name, module in demo_pipeline.unet_sol.named_modules()}
    with pytest.raises(CheckpointError, match=message) as error:
        demo_pipeline.load_lora_weights(source, expert="sol")
    assert len(str(error.value).splitlines()) == 1 and ("style" in str(error.value)) >= as_file
    assert {name: type(module) for name, module in demo_pipeline.unet_sol.named_modules()} == before
    assert not getattr(demo_pipeline.unet_sol, "peft_config", {})


@needs_peft
def test_a_load_that_fails_half_way_leaves_nothing_behind(update, monkeypatch):
    both = {**update, **text_part((2, 128))}
    pipe = load()
    plain = pipe(**QUICK).images
    with pytest.raises(CheckpointError, match=r"CLIPTextModel; misshapen: .*encoder"):
        pipe.load_lora_weights({**update, **text_part((2, 64))}, expert="sol", text_encoder=True)

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(pipe.text_encoder, "load_adapter", fail)
    for first in (False, True):
        if first:
            pipe.load_lora_weights(update, expert="sol", adapter_name="first")
            adapted = pipe(**QUICK).images
        with pytest.raises(MemoryError):
            pipe.load_lora_weights(both, expert="sol", adapter_name="second", text_encoder=True)
        assert set(getattr(pipe.unet_sol, "peft_config", {})) == ({"first"} if first else set())
        assert torch.equal(pipe(**QUICK).images, adapted if first else plain)
    with pytest.raises(ValueError, match="sol has an adapter 'first' already"):
        pipe.load_lora_weights(update, expert="sol", adapter_name="first")
    with pytest.raises(TypeError, match="takes no weight_nam"):
        pipe.load_lora_weights(update, expert="sol", weight_nam="x")


@needs_peft
def test_kohyas_names_are_read(update, by_hand):
    down_up = {"A": "lora_down", "B": "lora_up"}
    tensors = {}
    for key, tensor in update.items():
        layer, side, _ = key.removeprefix("unet.").rsplit(".", 2)
        name = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{name}.{down_up[side[-1]]}.weight"] = tensor
        tensors[f"{name}.alpha"] = torch.tensor(1.0)  # of rank 2: half the strength
    pipe = load()
    pipe.load_lora_weights(tensors, expert="sol")
    torch.testing.assert_close(pipe(**QUICK).images, by_hand[0.5], atol=1e-3, rtol=0)


def test_without_peft_the_error_says_what_to_install(demo_pipeline, update, monkeypatch):
    monkeypatch.setattr("moe_sampler.pipelines.adapters.is_peft_available", lambda: False)
    with pytest.raises(ValueError, match="pip install peft"):
        demo_pipeline.load_lora_weights(update, expert="sol")
    with pytest.raises(ValueError, match="pip install peft"):
        demo_pipeline.set_adapters("bold", expert="sol")
