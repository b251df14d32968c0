"""LeRobot's own policy classes from tiny random configurations, offline.

What is stubbed: SmolVLM's processor and pretrained configuration, which would be downloaded; the check that the
installed transformers is LeRobot's fork, and what the fork does to caches; torchvision's operators, where the wheel at
hand was built for another torch.
"""

from __future__ import annotations

import copy
import sys
import types
from typing import Any
from unittest import mock

import torch
from torch import nn

REAL, STATE, CHUNK, PADDED, TOKENS, IMAGE = 4, 5, 6, 32, 3, 28


def make_importable() -> None:
    """Lets torchvision be imported beside a torch that its compiled part was not built for."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        make_importable.kept = library  # type: ignore[attr-defined]


def features() -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    return {
        "input_features": {
            "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, IMAGE, IMAGE)),
        },
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (REAL,))},
    }


def batch(batch_size: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "observation.state": torch.randn(batch_size, STATE, generator=generator),
        "observation.images.top": torch.rand(batch_size, 3, IMAGE, IMAGE, generator=generator),
        "observation.language.tokens": torch.randint(0, 20, (batch_size, TOKENS), generator=generator),
        "observation.language.attention_mask": torch.ones(batch_size, TOKENS, dtype=torch.bool),
    }


def diffusion(scheduler: str = "DDPM") -> nn.Module:
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionConfig, DiffusionPolicy

    own = features()
    own["input_features"] = {
        "observation.state": PolicyFeature(FeatureType.STATE, (STATE,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (3,)),
    }
    config = DiffusionConfig(
        **own, n_obs_steps=2, horizon=8, n_action_steps=4, down_dims=(8, 16), n_groups=4, diffusion_step_embed_dim=8,
        num_train_timesteps=20, num_inference_steps=6, noise_scheduler_type=scheduler, device="cpu",
    )  # fmt: skip
    return DiffusionPolicy(config)


def smolvla() -> nn.Module:
    import transformers
    from lerobot.policies.smolvla import modeling_smolvla, smolvlm_with_expert

    tiny = transformers.SmolVLMConfig(
        text_config=dict(
            model_type="llama", hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=16, vocab_size=64, pad_token_id=0,
        ),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=IMAGE, patch_size=14),
        scale_factor=2, pad_token_id=0, image_token_id=5,
    )  # fmt: skip
    tokenizer = types.SimpleNamespace(fake_image_token_id=1, global_image_token_id=2)
    processor = types.SimpleNamespace(tokenizer=tokenizer)
    config = modeling_smolvla.SmolVLAConfig(
        **features(), chunk_size=CHUNK, n_action_steps=3, num_steps=5, num_vlm_layers=2, self_attn_every_n_layers=2,
        resize_imgs_with_padding=(IMAGE, IMAGE), device="cpu",
    )  # fmt: skip
    with (
        mock.patch.object(smolvlm_with_expert.AutoConfig, "from_pretrained", lambda *_, **__: tiny),
        mock.patch.object(smolvlm_with_expert.AutoProcessor, "from_pretrained", lambda *_, **__: processor),
    ):
        return modeling_smolvla.SmolVLAPolicy(config)


def pi0(version: str = "pi0") -> nn.Module:
    import importlib

    modeling = importlib.import_module(f"lerobot.policies.{version}.modeling_{version}")
    config_class = getattr(modeling, f"{version.upper()}Config")
    gemma = modeling.GemmaConfig(width=32, depth=2, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16)
    check = types.ModuleType("check")
    vars(check)["check_whether_transformers_replace_is_installed_correctly"] = lambda: True
    import transformers.models.siglip as siglip

    siglip.check = check
    sys.modules["transformers.models.siglip.check"] = check
    whole = modeling.CONFIG_MAPPING["paligemma"]
    vision = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=14, model_type="siglip_vision_model"
    )
    mapping = {
        "paligemma": lambda: whole(
            vision_config={**vision, "vision_use_head": False}, text_config={"model_type": "gemma"}
        ),
        "gemma": modeling.CONFIG_MAPPING["gemma"],
    }
    config = config_class(
        **features(), chunk_size=CHUNK, n_action_steps=3, num_inference_steps=5, image_resolution=(IMAGE, IMAGE),
        device="cpu", dtype="float32",
    )  # fmt: skip
    with (
        mock.patch.object(modeling, "get_gemma_config", lambda _: gemma),
        mock.patch.object(modeling, "CONFIG_MAPPING", mapping),
    ):
        policy = getattr(modeling, f"{version.upper()}Policy")(config)
    expert = policy.model.paligemma_with_expert
    expert.paligemma.model.multi_modal_projector.linear = nn.Linear(16, 32)
    forward = expert.forward

    def as_in_the_fork(**named: Any) -> Any:  # there an expert's step leaves the prefix's cache as it is
        return forward(**{**named, "past_key_values": copy.deepcopy(named["past_key_values"])})

    expert.forward = as_in_the_fork
    return policy
