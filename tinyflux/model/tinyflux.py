"""TinyFlux, the student: a small Flux-like transformer over latent pixels that Sol and Lune may guide.

Architecture and tensor names follow TinyFlux-Deep v4 (AbstractPhil/tiny-flux-deep), itself after Flux (Black
Forest Labs, 2024). Time t runs from noise (0) to data (1), x_t = (1 - t) * noise + t * data, and the model
predicts the velocity data - noise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, overload

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from moe_sampler.publishing.card import write_card
from moe_sampler.publishing.modelspec import stamp
from moe_sampler.publishing.upload import Address, Target, pushed, saved
from moe_sampler.tinyflux.model.alignment import AlignmentProjector
from moe_sampler.tinyflux.model.checks import check_inputs
from moe_sampler.tinyflux.model.conditioning import (
    AttentionInputs,
    RotaryFrequencies,
    attention_inputs,
    sol_factors,
)
from moe_sampler.tinyflux.model.config import TinyFluxConfig
from moe_sampler.tinyflux.model.dense import linear
from moe_sampler.tinyflux.model.layers import DoubleBlock, RMSNorm, SingleBlock, TimeEmbedding
from moe_sampler.tinyflux.model.predictors import LunePredictor, SolPrior
from moe_sampler.tinyflux.model.published import describe_student, student_card, write_model_reference

__all__ = ["TinyFlux", "TinyFluxOutput"]

PROJECTOR = "projector."
"""Begins the names of the tensors that are trained along and not saved."""
_LOADERS_OWN = {
    *("subfolder", "torch_dtype", "device", "revision", "token", "cache_dir", "local_files_only"),
    *("force_download",),
}


@dataclass
class TinyFluxOutput(BaseOutput):
    """What `TinyFlux` returns; what a model without the expert in question doesn't have is None.

    Args:
        sample: [B, N, in_channels], the velocity data - noise, in the model's dtype.
        expert_signal: [B, D], what Lune's features added to the conditioning.
        lune_pred: [B, lune_expert_dim], predicted features of Lune.
        pred_stats: [B, 3], predicted statistics of Sol's attention.
        pred_spatial: [B, S, S], Sol's predicted map.
        spatial_importance: [B, S, S], the map that was used.
        temperature: [B, heads], of the attention.
        aligned: [B, N, channels], what `projector` makes of the tokens within the model, where asked for.
    """

    sample: Tensor
    expert_signal: Tensor | None = None
    lune_pred: Tensor | None = None
    pred_stats: Tensor | None = None
    pred_spatial: Tensor | None = None
    spatial_importance: Tensor | None = None
    temperature: Tensor | None = None
    aligned: Tensor | None = None


class TinyFlux(ModelMixin, ConfigMixin):
    """The student. `TinyFlux(TinyFluxConfig.demo())` is new, `TinyFlux.from_pretrained` loads one.

    Args:
        config: what it is made of; `TinyFluxConfig()` by default.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DoubleBlock", "SingleBlock"]
    _keep_in_fp32_modules: ClassVar = ["rope"]

    def __init__(self, config: TinyFluxConfig | None = None) -> None:
        super().__init__()
        config = TinyFluxConfig() if config is None else config
        if not isinstance(config, TinyFluxConfig):
            raise TypeError(
                f"config must be a TinyFluxConfig, got {type(config).__name__}: use TinyFlux.from_config"
            )
        self.register_to_config(**config.to_dict())
        width, text, pooled = config.hidden_size, config.joint_attention_dim, config.pooled_projection_dim
        self.gradient_checkpointing = False
        self.img_in, self.txt_in = linear(config.in_channels, width), linear(text, width)
        self.time_in = TimeEmbedding(width, config.time_factor)
        self.vector_in = nn.Sequential(nn.SiLU(), linear(pooled, width))
        if config.use_t5_vec:
            self.t5_pool = nn.Sequential(linear(text, width), nn.SiLU(), linear(width, width))
            self.text_balance = nn.Parameter(torch.zeros(()))
        if config.null_condition == "learned":
            self.null_text = nn.Parameter(torch.zeros(text))
            self.null_pooled = nn.Parameter(torch.zeros(pooled))
        self.lune_predictor = LunePredictor(config) if config.use_lune_expert else None
        self.sol_prior = SolPrior(config) if config.use_sol_prior else None
        for part, frozen in ((self.lune_predictor, config.freeze_lune), (self.sol_prior, config.freeze_sol)):
            if part is not None and frozen:
                part.requires_grad_(False)
        self.rope = RotaryFrequencies(config.axes_dims_rope)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double_layers))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_layers))
        self.final_norm = RMSNorm(width)
        self.final_linear = linear(width, config.in_channels, gain=0.0)
        self.projector: AlignmentProjector | None = None
        self._projected_after = 0
        self.register_load_state_dict_pre_hook(self._leave_out_ignored)

    # diffusers' own is a wrapper without a signature.
    def to(self, *args: Any, **kwargs: Any) -> TinyFlux:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `torch.nn.Module.to`. diffusers' own warns of modules that stay float32; here they see to it."""
        nn.Module.to(self, *args, **kwargs)
        return self

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        use_flashpack: bool = False,
        *,
        license: str | None = None,
        **kwargs: Any,
    ) -> None:
        """As diffusers' own, all files of it or, with an OSError that names the folder, none; with a card and
        what `diffusers.AutoModel` needs to load it.

        Args:
            save_directory, is_main_process, save_function: as diffusers' own takes them.
            safe_serialization, variant, max_shard_size, use_flashpack: likewise.
            push_to_hub: upload the folder, too; kwargs are those of `publishing.upload.Target`.
            license: the model's, as the hub calls it.
        """
        options = {"is_main_process": is_main_process, "save_function": save_function}
        options |= {"safe_serialization": safe_serialization, "max_shard_size": max_shard_size}
        options |= {"use_flashpack": True} if use_flashpack else {}
        write = partial(self._write, Path(save_directory), license, options | {"variant": variant})
        saved(write, save_directory, "student", push_to_hub, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        license: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes; returns the commit's address. Arguments as there, and as
        `publishing.upload.Target` takes them.

        Raises:
            CheckpointError: the hub doesn't take it.
        """
        target = Target(repo_id, private, token, commit_message, create_pr, revision, subfolder)
        options = {"safe_serialization": safe_serialization, "variant": variant}
        return pushed(partial(self._write, None, license, options), target, "student")

    def _write(
        self,
        final: Path | None,
        license: str | None,
        options: Mapping[str, Any],
        folder: Path,
        address: Address,
    ) -> None:
        name = Path(address.source).name
        self.write_weights(folder, describe_student(name, self.config, license), **options)
        write_card(folder, student_card(name, self.config, address, license), final)

    def write_weights(self, folder: Path, described: Mapping[str, str], **options: Any) -> None:
        """What diffusers' own `save_pretrained` writes, and `described` in the weights' headers."""
        super().save_pretrained(folder, **options)
        stamp(sorted(folder.glob("*.safetensors")), described)

    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As diffusers' own, and `tinyflux.py`, by which `diffusers.AutoModel` finds this class."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        write_model_reference(Path(save_directory))

    @overload
    @classmethod
    def from_config(
        cls,
        config: TinyFluxConfig | Mapping[str, Any],
        return_unused_kwargs: Literal[False] = False,
        **settings: Any,
    ) -> TinyFlux: ...

    @overload
    @classmethod
    def from_config(
        cls, config: TinyFluxConfig | Mapping[str, Any], return_unused_kwargs: bool, **settings: Any
    ) -> TinyFlux | tuple[TinyFlux, dict[str, Any]]: ...

    @classmethod
    def from_config(  # pyright: ignore[reportIncompatibleMethodOverride] - the base's default is an error there
        cls, config: TinyFluxConfig | Mapping[str, Any], return_unused_kwargs: bool = False, **settings: Any
    ) -> TinyFlux | tuple[TinyFlux, dict[str, Any]]:
        """A new model from a config or a parsed config.json, with `settings` in place of its own.

        Raises:
            ValueError: a key or setting that a TinyFlux config doesn't have.
        """
        values = config.to_dict() if isinstance(config, TinyFluxConfig) else dict(config)
        model = cls(TinyFluxConfig.from_dict({**values, **settings}))
        return (model, {}) if return_unused_kwargs else model

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] - the base's None says nothing to load
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: TinyFluxConfig | None = None,
        ema: bool | str = False,
        **kwargs: Any,
    ) -> TinyFlux:
        """A trained model, in eval mode, from wherever its tensors lie.

        Args:
            pretrained_model_name_or_path: a folder (diffusers' or upstream's), a hub id, a `.safetensors` or
                a trainer's `.pt` file.
            config, ema: see `moe_sampler.tinyflux.model.loading.load_tinyflux`.
            kwargs: of that function; or any of diffusers' own (`variant`, `device_map`,
                `output_loading_info` ...) for folders and repositories in diffusers' layout.

        Raises:
            CheckpointError: unreadable; missing, unexpected or misshapen tensors, up to five named of each.
        """
        from moe_sampler.tinyflux.model.loading import from_diffusers, load_tinyflux

        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if "dtype" in kwargs:
            kwargs["torch_dtype"] = kwargs.pop("dtype")
        if config is None and not ema and not kwargs.keys() <= _LOADERS_OWN:
            return from_diffusers(super().from_pretrained, pretrained_model_name_or_path, **kwargs)
        return load_tinyflux(pretrained_model_name_or_path, config=config, ema=ema, model_class=cls, **kwargs)

    def ignores(self, name: str) -> bool:
        """Whether `load_state_dict` takes no notice of a tensor: without Sol's prior nothing uses the
        attentions' `spatial_to_mod`, which some checkpoints hold nevertheless; a training's projector is of
        no use after it."""
        if self.projector is None and name.startswith(PROJECTOR):
            return True
        return self.sol_prior is None and ".attn.spatial_to_mod." in name

    def align_after(self, block: int, projector: AlignmentProjector) -> None:
        """Train a projector of the image tokens along, which `forward(align=True)` returns.

        Args:
            block: how many blocks the tokens have gone through, double ones first.
            projector: becomes a part of the model, and none of what a training saves.

        Raises:
            ValueError: more blocks than there are, or none.
        """
        blocks = len(self.double_blocks) + len(self.single_blocks)
        if not 1 <= block <= blocks:
            raise ValueError(f"tokens are aligned after 1 to {blocks} blocks, got {block}")
        self.projector, self._projected_after = projector, block

    @staticmethod
    def _leave_out_ignored(model: TinyFlux, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name in [n for n in state if n.startswith(prefix) and model.ignores(n.removeprefix(prefix))]:
            del state[name]

    # What stands for no text

    def null_condition(self, batch: int, length: int, *, mask: bool = False) -> dict[str, Tensor]:
        """Keyword arguments of a sample without text, for classifier-free guidance.

        batch, length: of the text to stand beside, [batch, length, joint_attention_dim]. mask: with an
        `encoder_attention_mask`, for guidance beside masked text.

        Returns:
            encoder_hidden_states: [batch, length, joint_attention_dim]; pooled_projections: [batch,
            pooled_projection_dim], in the model's dtype; encoder_attention_mask: bool [batch, length].
        """
        text, pooled = self._null_vectors()
        found = {
            "encoder_hidden_states": text.expand(batch, length, -1),
            "pooled_projections": pooled.expand(batch, -1),
        }
        if mask:
            found["encoder_attention_mask"] = torch.ones(batch, length, dtype=torch.bool, device=text.device)
        return found

    def _null_vectors(self) -> tuple[Tensor, Tensor]:
        if self.config["null_condition"] == "learned":
            return self.null_text, self.null_pooled
        like = self.img_in.weight
        return (
            like.new_zeros(self.config["joint_attention_dim"]),
            like.new_zeros(self.config["pooled_projection_dim"]),
        )

    # Forward

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor | None = None,
        txt_ids: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
        encoder_attention_mask: Tensor | None = None,
        drop_text: Tensor | None = None,
        lune_features: Tensor | None = None,
        sol_stats: Tensor | None = None,
        sol_spatial: Tensor | None = None,
        lune_mask: Tensor | None = None,
        sol_mask: Tensor | None = None,
        lune_kept: Tensor | None = None,
        align: bool = False,
        return_dict: bool = True,
    ) -> TinyFluxOutput | tuple[Tensor]:
        """The velocity data - noise at t.

        Args:
            hidden_states: [B, N, in_channels], the noisy latents, a token a pixel, rows first.
            encoder_hidden_states: [B, L, joint_attention_dim], text tokens.
            pooled_projections: [B, pooled_projection_dim], the text in one vector.
            timestep: t in [0, 1], [B] or one for all, []. 0 is noise.
            img_ids: [N, 3] or [B, N, 3] (the first sample's count), positions (index, y, x) of the image
                tokens; by default (0, y, x) of `size`.
            txt_ids: likewise [L, 3] or [B, L, 3] of the text tokens; zeros by default.
            size: (H, W) with N = H·W of the latents; needed where they aren't square.
            encoder_attention_mask: [B, L], nonzero where a text token counts; all do by default.
            drop_text: bool [B], samples that see the null condition in place of their text.
            lune_features: [B, lune_expert_dim], real features of Lune; predicted ones where not given.
            sol_stats: [B, 3], real (locality, entropy, clustering) of Sol's attention, for the temperature.
            sol_spatial: [B, S, S], the real map of Sol's attention.
            lune_mask, sol_mask: bool [B], the samples that use the real features given, all by default; the
                others use predicted ones.
            lune_kept: [B, lune_hidden_dim], factors of the hidden units of Lune's predictor: dropout that the
                caller draws, in place of the model's own.
            align: also return what `projector` makes of the tokens (`align_after`), as `aligned`.
            return_dict: False returns `(sample,)`.

        Tensors may have any float dtype; the work is done in the model's (or autocast's), but times, rotary
        angles and Sol's modulation are float32.

        Raises:
            ValueError: shapes that don't fit, real features for an expert that the model doesn't have,
                `align` without a projector.
        """
        if align and self.projector is None:
            raise ValueError("align is for a model in training that has a projector: call align_after first")
        size = check_inputs(
            self.config,
            size,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            encoder_attention_mask=encoder_attention_mask,
            drop_text=drop_text,
            lune_features=lune_features,
            sol_stats=sol_stats,
            sol_spatial=sol_spatial,
            lune_mask=lune_mask,
            sol_mask=sol_mask,
            lune_kept=lune_kept,
        )
        dtype = self.img_in.weight.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        text, pooled = encoder_hidden_states.to(dtype), pooled_projections.to(dtype)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        if drop_text is not None:
            null_text, null_pooled = self._null_vectors()
            text = torch.where(drop_text[:, None, None], null_text, text)
            pooled = torch.where(drop_text[:, None], null_pooled, pooled)
            mask = None if mask is None else mask | drop_text[:, None]
        t = timestep.to(exact).expand(len(hidden_states))

        time = self.time_in(t)
        vec = time + self._text_vector(text, pooled, mask)
        time_and_text = torch.cat([time, pooled.to(time.dtype)], -1)
        signal = lune = sol = None
        if self.lune_predictor is not None:
            features = None if lune_features is None else lune_features.to(dtype)
            signal, lune = self.lune_predictor(time_and_text, features, lune_mask, lune_kept)
            vec = vec + signal
        if self.sol_prior is not None:
            stats = None if sol_stats is None else sol_stats.to(dtype)
            sol = self.sol_prior(time_and_text, t, stats, sol_spatial, sol_mask)

        if img_ids is None:
            assert size is not None  # `check_inputs` sees to it
            img_ids = self.create_img_ids(*size, device=t.device)
        shared = attention_inputs(self.rope, img_ids, txt_ids, text.shape[1], mask, exact)
        modulations: Sequence[Tensor | None]
        modulations = [None] * (len(self.double_blocks) + len(self.single_blocks))
        if sol is not None and modulations:
            assert size is not None  # likewise
            temperature = sol.temperature
            if not self.config["head_temperature"]:
                temperature = temperature.mean(1, keepdim=True).expand_as(temperature)
            factor, modulations = sol_factors(
                _of_maps(self.double_blocks),
                _of_maps(self.single_blocks),
                temperature,
                sol.importance,
                size,
                text.shape[1],
            )
            shared = shared[0]._replace(text_factor=factor), shared[1]
        img, txt = self.img_in(hidden_states.to(dtype)), self.txt_in(text)
        out, within = self._blocks(txt, img, F.silu(vec), shared, modulations, self._projected_after)
        sample = self.final_linear(self.final_norm(out))
        if not return_dict:
            return (sample,)
        aligned = None
        if align:
            assert self.projector is not None and size is not None and within is not None
            aligned = self.projector(within, size)
        if sol is None:
            return TinyFluxOutput(sample, signal, lune, aligned=aligned)
        return TinyFluxOutput(
            *(sample, signal, lune, sol.stats, sol.spatial, sol.importance, sol.temperature, aligned)
        )

    def _text_vector(self, text: Tensor, pooled: Tensor, mask: Tensor | None) -> Tensor:
        """[B, D] of the pooled text and the text tokens, weighted by the softmax of their means."""
        vector = self.vector_in(pooled)
        if not self.config["use_t5_vec"]:
            return vector
        weights = text.mean(-1)
        if mask is None:
            weights = weights.softmax(-1)
        else:
            weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min).softmax(-1) * mask
        of_tokens = self.t5_pool((weights.to(text.dtype)[:, None] @ text)[:, 0])
        return torch.lerp(of_tokens, vector, torch.sigmoid(self.text_balance).to(vector.dtype))

    def _blocks(
        self,
        txt: Tensor,
        img: Tensor,
        conditioning: Tensor,
        shared: tuple[AttentionInputs, AttentionInputs],
        modulations: Sequence[Tensor | None],
        kept: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, N, D] of the image after all blocks, and after the first `kept` of them."""
        doubles, length, within = len(self.double_blocks), txt.shape[1], None
        for number, (block, modulation) in enumerate(
            zip(self.double_blocks, modulations[:doubles], strict=True), 1
        ):
            txt, img = self._run(block, txt, img, conditioning, shared[0], modulation)
            within = img if number == kept else within
        if not self.single_blocks:
            return img, within
        x = torch.cat([txt, img], 1)
        for number, (block, modulation) in enumerate(
            zip(self.single_blocks, modulations[doubles:], strict=True), doubles + 1
        ):
            x = self._run(block, x, conditioning, shared[1], modulation)
            within = x[:, length:].contiguous() if number == kept else within
        return x[:, length:].contiguous(), within

    def _run(self, block: nn.Module, *args: Any) -> Any:
        checkpointed = self._gradient_checkpointing_func if self.gradient_checkpointing else None
        if checkpointed is None or not torch.is_grad_enabled():
            return block(*args)
        return checkpointed(block, *args)

    @staticmethod
    def create_img_ids(height: int, width: int, device: torch.device | str | None = None) -> Tensor:
        """int64 [height * width, 3]: (0, y, x) of every token."""
        y, x = torch.meshgrid(
            torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
        )
        return torch.stack([torch.zeros_like(y), y, x], -1).flatten(0, 1)


def _of_maps(blocks: nn.ModuleList) -> list[nn.Conv2d]:
    """What each block makes of Sol's map."""
    return [cast("DoubleBlock | SingleBlock", block).attn.spatial_to_mod for block in blocks]
