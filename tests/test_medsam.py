import importlib.machinery
import importlib.util
import sys
from functools import partial

import pytest
import torch

from wmhlib.adapters import adapt, budget
from wmhlib.errors import CheckpointError
from wmhlib.medsam import ImageEncoder, load_checkpoint
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.sections import Adapter, Encoder
from wmhlib.weights import weights_sha256


@pytest.fixture(scope="module")
def sam():
    """segment_anything without its package root, which imports torchvision for parts that are not needed here."""
    forget = [name for name in sys.modules if name.partition(".")[0] == "segment_anything"]
    for name in forget:  # monai tries to import it
        del sys.modules[name]
    spec = importlib.machinery.PathFinder.find_spec("segment_anything")
    root = importlib.util.module_from_spec(importlib.machinery.ModuleSpec("segment_anything", None, is_package=True))
    root.__path__ = list(spec.submodule_search_locations)
    sys.modules["segment_anything"] = root
    import segment_anything.build_sam
    import segment_anything.modeling.image_encoder

    yield segment_anything
    for name in [n for n in sys.modules if n.partition(".")[0] == "segment_anything"]:
        del sys.modules[name]


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def reference_encoder(sam, settings, pixels):
    return sam.modeling.image_encoder.ImageEncoderViT(
        depth=settings.depth, embed_dim=settings.dim, img_size=pixels, mlp_ratio=4, num_heads=settings.heads, patch_size=16,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), qkv_bias=True, use_rel_pos=True, out_chans=256,
        global_attn_indexes=settings.global_blocks, window_size=settings.window)


@pytest.mark.parametrize("grid, window", [(8, 4), (10, 4), (6, 14)])
def test_encoder_equals_the_packages_own_whatever_the_windows_leave_over(sam, grid, window):
    settings = Encoder(dim=48, depth=3, heads=3, global_blocks=(1,), window=window, grid=grid)
    reference = randomised(reference_encoder(sam, settings, 16 * grid))
    ours = ImageEncoder(settings).eval()
    ours.load_state_dict(reference.state_dict())
    image = torch.randn(2, 3, 16 * grid, 16 * grid, generator=torch.Generator().manual_seed(1))
    image_ours = image.clone().requires_grad_()
    image.requires_grad_()
    expected, found = reference(image), ours(image_ours)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    expected.square().sum().backward(), found.square().sum().backward()
    torch.testing.assert_close(image_ours.grad, image.grad, atol=1e-3, rtol=1e-3)


def test_checkpoint_of_the_packages_builder_loads_key_by_key_and_gives_its_output_at_1024_px(sam, tmp_path):
    reference = randomised(sam.build_sam.sam_model_registry["vit_b"]())
    torch.save(reference.state_dict(), tmp_path / "sam_vit_b.pth")
    ours = ImageEncoder(Encoder()).eval()
    load_checkpoint(ours, tmp_path / "sam_vit_b.pth")
    ours.blocks, reference.image_encoder.blocks = ours.blocks[:3], reference.image_encoder.blocks[:3]  # the last of them looks at the whole map
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(ours(image), reference.image_encoder(image), atol=1e-4, rtol=0)


def test_every_key_that_does_not_fit_is_listed(tmp_path):
    settings = Encoder(dim=16, depth=1, heads=1, global_blocks=(), grid=2)
    state = ImageEncoder(settings).state_dict()
    state["image_encoder.extra"] = torch.zeros(1)
    state = {key if key.startswith("image_encoder.") else f"image_encoder.{key}": value for key, value in state.items()}
    del state["image_encoder.blocks.0.attn.qkv.bias"]
    state["image_encoder.pos_embed"] = torch.zeros(1, 3, 3, 16)
    state["prompt_encoder.x"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(ImageEncoder(settings), tmp_path / "bad.pth")
    for part in ("missing blocks.0.attn.qkv.bias", "unexpected extra", "pos_embed is (1, 3, 3, 16), expected (1, 2, 2, 16)"):
        assert part in str(error.value)
    assert "prompt_encoder" not in str(error.value)


@pytest.mark.parametrize("content", [b"not a checkpoint", {"a": 1}])
def test_a_file_that_is_no_state_dict_is_refused(content, tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError, match="bad.pth"):
        load_checkpoint(ImageEncoder(Encoder(dim=16, depth=1, heads=1, global_blocks=())), path)


@pytest.mark.parametrize("name, lora, decoder_and_adapter, skip, share", [
    ("colab", 6_488_064, 566_133 + 243, 146_352, 7.43), ("lean", 2_433_024, 566_133 + 243, 146_352, 3.39),
    ("original", 6_488_064, 566_133 + 243, 0, 7.29)])
def test_parameter_budget_of_a_preset(name, lora, decoder_and_adapter, skip, share):
    with torch.device("meta"):
        counts = budget(WMHNet(preset(name)))
    assert (counts["encoder"], counts["adapter"], counts["skip"]) == (89_670_912, lora, skip)
    assert counts["decoder"] + counts["channel_adapter"] == decoder_and_adapter
    assert counts["trainable"] == lora + decoder_and_adapter + skip
    assert counts["share_percent"] == pytest.approx(share, abs=0.01)


def test_lora_leaves_the_output_unchanged_at_first_and_trains_only_itself():
    encoder = randomised(ImageEncoder(Encoder(dim=32, depth=2, heads=2, global_blocks=(1,), window=2, grid=4)))
    image = torch.randn(1, 3, 64, 64)
    before, fingerprint = encoder(image), weights_sha256(encoder)
    adapted = adapt(encoder, Adapter(rank_attention=4, rank_mlp=2), seed=0).eval()
    torch.testing.assert_close(adapted(image), before, atol=0, rtol=0)
    assert fingerprint != weights_sha256(adapted)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained) and not any("patch_embed" in name for name in trained)
