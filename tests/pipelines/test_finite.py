"""NaN never leaves a pipeline: every component that has some is named, in one line."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_sampler import HybridPipeline
from moe_sampler.demo import experts_path
from moe_sampler.errors import NonFiniteError

PROMPT = "a castle with two towers, at dusk"


@pytest.fixture
def pipe(demo_pipeline) -> HybridPipeline:
    """A copy whose weights may be spoiled."""
    parts = {name: copy.deepcopy(part) for name, part in demo_pipeline.components.items()}
    made = HybridPipeline(**parts, experts=demo_pipeline.expert_names)
    made.set_progress_bar_config(disable=True)
    return made


def spoil(model: torch.nn.Module, value: float = torch.nan) -> str:
    name, parameter = list(model.named_parameters())[-2]
    with torch.no_grad():
        parameter.view(-1)[0] = value
    return name


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("expert", "step"), [("sol", 0), ("lune", 2)])
def test_an_experts_weights_are_named(pipe, expert, step, value, output_type):
    weight = spoil(pipe.expert_unet(expert), value)
    with pytest.raises(NonFiniteError) as found:
        pipe(PROMPT, seed=0, sol_steps=2, lune_steps=2, output_type=output_type)
    line = str(found.value)
    assert line.startswith(f"{expert} gave NaN or an infinity at step {step} (of 0 to 3")
    assert f"{expert} has NaN or infinite weights, {weight} first" in line and "\n" not in line


def test_a_vaes_weights_are_named(pipe):
    weight = spoil(pipe.vae.decoder)
    with pytest.raises(
        NonFiniteError, match=rf"the decoded images: the VAE has .* weights, decoder\.{weight} first"
    ):
        pipe(PROMPT, seed=0, num_inference_steps=2)
    assert pipe(PROMPT, seed=0, num_inference_steps=2, output_type="latent").images.isfinite().all()


def test_a_text_encoders_weights_are_named_before_any_step(pipe):
    spoil(pipe.text_encoder)
    steps = []
    with pytest.raises(
        NonFiniteError, match="the prompts' features: the text encoder has NaN or infinite weights"
    ):
        pipe(PROMPT, seed=0, num_inference_steps=2, callback_on_step_end=lambda *a: steps.append(a))
    assert not steps


def test_a_model_that_makes_them_of_finite_weights(pipe):
    pipe.unet_lune.register_forward_hook(lambda module, args, output: (output[0] / 0,))
    with pytest.raises(
        NonFiniteError, match=r"^lune gave .*: lune's weights are finite: look at what it was given"
    ):
        pipe(PROMPT, seed=0, sol_steps=1, lune_steps=2)


def test_what_a_caller_brings_is_named(pipe):
    def inject(pipe, step, timestep, tensors):
        tensors["latents"][0, 0, 0, 0] = torch.nan
        return tensors

    with pytest.raises(NonFiniteError, match=r"^the callback's latents at step 0 "):
        pipe(PROMPT, seed=0, num_inference_steps=2, callback_on_step_end=inject)
    shape = (1, 4, 16, 16)
    with pytest.raises(NonFiniteError, match="the state that the run starts from"):
        pipe(PROMPT, latents=torch.full(shape, torch.inf), num_inference_steps=2)
    with pytest.raises(NonFiniteError, match="the latents that were to be decoded"):
        pipe.decode_latents(torch.full(shape, torch.nan))
    embeds = pipe.encode_texts(PROMPT) * torch.nan
    with pytest.raises(NonFiniteError, match="the prompts' features"):
        pipe(prompt_embeds=embeds, num_inference_steps=2)


def test_weights_are_named_where_one_expert_is_in_memory_at_a_time(tmp_path):
    folder = shutil.copytree(experts_path(), tmp_path / "model")
    (path,) = (folder / "unet_lune").glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_in.weight"].view(-1)[0] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    made = HybridPipeline.from_pretrained(folder, offload="expert")
    made.set_progress_bar_config(disable=True)
    cause = r"^lune gave .* at step 2 .*: lune has NaN or infinite weights, conv_in\.weight first"
    with pytest.raises(NonFiniteError, match=cause):
        made([PROMPT, PROMPT], seed=0, batch_size=1, sol_steps=2, lune_steps=2)


def test_a_loras_weights_are_named(pipe):
    peft = pytest.importorskip("peft")
    unet = pipe.unet_sol
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]), "style")
    bad = next(p for name, p in unet.named_parameters() if "lora_B" in name)
    torch.nn.init.constant_(bad, torch.inf)
    with pytest.raises(NonFiniteError, match=r"sol gave .* weights, .*\.lora_B\.style\.weight first"):
        pipe(PROMPT, seed=0, num_inference_steps=2)
