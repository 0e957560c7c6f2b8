"""What a LoRA's keys say it is: another kind of adapter, or one of another model, is refused by name."""

from __future__ import annotations

import pytest
import torch

from moe_sampler.errors import CheckpointError
from moe_sampler.loading.lora_files import check_kind, read_lora

PLAIN = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
    "unet.mid_block.attentions.0.processor.to_q_lora.down.weight",
)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("lora_unet_mid.hada_w1_a", "a LoHa (LyCORIS)"),
        ("lora_unet_mid.hada_t2", "a LoHa (LyCORIS)"),
        ("lora_unet_mid.lokr_w2_b", "a LoKr (LyCORIS)"),
        ("lora_unet_mid.oft_blocks", "an OFT"),
        ("unet.mid.oft_diag", "an OFT"),
        ("lora_unet_mid.on_input", "an (IA)³"),
        *((f"lora_unet_mid.{part}.weight", "a GLoRA") for part in ("a1", "a2", "b1", "b2")),
        ("lora_unet_mid.dora_scale", "a DoRA"),
        ("unet.mid.lora_magnitude_vector.weight", "a DoRA"),
        ("lora_unet_mid.lora_mid.weight", "a LoCon with a Tucker core"),
        *(
            (f"lora_unet_mid.{part}", "full differences of weights (LyCORIS)")
            for part in ("diff", "diff_b", "w_norm", "b_norm", "set_weight")
        ),
        *(
            (key, "a LoRA with a textual inversion embedding bundled")
            for key in ("bundle_emb.style.string_to_param.*", "emb_params", "string_to_param.*")
        ),
        ("lora_te2_text_model_x.lora_down.weight", "a LoRA of SDXL"),
        ("text_encoder_2.text_model.x.lora_A.weight", "a LoRA of SDXL"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA of Flux"),
        ("lora_unet_single_blocks_7_linear1.lora_down.weight", "a LoRA of Flux"),
        ("transformer.single_transformer_blocks.0.x.lora_A.weight", "a LoRA of Flux"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "a LoRA of Flux"),
        *(
            (key, "a LoRA of a diffusion transformer")
            for key in (
                "transformer.blocks.0.attn.lora_A.weight",
                "lora_transformer_blocks_0_attn.lora_down.weight",
                "diffusion_model.blocks.0.q.lora_A.weight",
                "lora_te3_encoder_x.lora_down.weight",
            )
        ),
    ],
)
def test_other_kinds_are_named(key, kind):
    with pytest.raises(CheckpointError) as error:
        check_kind([*PLAIN, key], "style")
    assert str(error.value).startswith(f"style is {kind}, and only plain LoRAs")
    assert str(error.value).endswith(f"it holds {key}") and "\n" not in str(error.value)


def test_plain_ones_are_none_of_these():
    check_kind(PLAIN, "style")


LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
KEYS = (
    f"unet.{LAYER}.to_k.lora_A.weight",
    f"unet.{LAYER}.to_v.lora.down.weight",
    f"unet.{LAYER}.processor.to_v_lora.down.weight",
    f"lora_unet_{LAYER.replace('.', '_')}_to_k.lora_down.weight",
)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("channels", "base"),
    [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "SDXL"), (99, "another model")],
)
def test_the_width_of_its_text_says_which_model_it_is_of(key, channels, base):
    with pytest.raises(CheckpointError) as error:
        read_lora({key: torch.ones(2, channels)}, {"cross_attention_dim": 128})
    assert str(error.value) == (
        f"the LoRA is a LoRA of {base}: its {key} takes text of {channels} channels, and this model's has 128"
    )
