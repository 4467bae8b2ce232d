import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal_dlm.errors import ConfigError, VocabularyError
from multimodal_dlm.tokenizers.quantizers import (
    FSQ,
    LFQ,
    QUANTIZERS,
    VectorQuantizer,
    build_quantizer,
    codebook_perplexity,
    codebook_usage,
)

CONFIGS = {
    "fsq": {"type": "fsq", "levels": [5, 4, 3]},
    "lfq": {"type": "lfq", "num_bits": 5},
    "vq": {"type": "vq", "codebook_size": 24, "num_channels": 4},
}


def latents_for(quantizer, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(3, quantizer.num_channels, 4, 5, generator=generator)


def test_every_quantizer_is_covered():
    assert set(CONFIGS) == set(QUANTIZERS)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_decode_to_the_quantized_latents(name):
    quantizer = build_quantizer(CONFIGS[name]).eval()
    output = quantizer(latents_for(quantizer))
    assert len(output.codes) == len(quantizer.codebook_sizes)
    assert output.codes[0].shape == (3, 4, 5)
    assert torch.allclose(quantizer.decode_codes(output.codes), output.quantized, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_code_comes_back(name):
    quantizer = build_quantizer(CONFIGS[name]).eval()
    size = quantizer.codebook_sizes[0]
    codes = (torch.arange(size).view(1, 1, size),)
    again = quantizer(inverse(quantizer, quantizer.decode_codes(codes))).codes
    assert torch.equal(again[0], codes[0])


def inverse(quantizer, values):
    """Latents that quantize to `values`: FSQ squashes its input, the others do not."""
    if not isinstance(quantizer, FSQ):
        return values
    levels = torch.tensor(quantizer.levels).view(1, -1, 1, 1)
    half = (levels - 1) * (1 + 1e-3) / 2
    offset = 0.5 * (levels % 2 == 0)
    shift = torch.atanh(offset / half)
    inside = ((values * (levels // 2) + offset) / half).clamp(-0.999, 0.999)
    return torch.atanh(inside) - shift


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_pass_straight_through(name):
    quantizer = build_quantizer(CONFIGS[name]).eval()
    latents = (0.1 * latents_for(quantizer)).requires_grad_()
    output = quantizer(latents)
    output.quantized.sum().backward()
    assert latents.grad is not None
    assert (latents.grad > 0).all()
    if name != "fsq":
        assert torch.allclose(latents.grad, torch.ones_like(latents))


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_do_not_depend_on_the_batch(name):
    quantizer = build_quantizer(CONFIGS[name]).eval()
    latents = latents_for(quantizer, seed=3)
    together = quantizer(latents).codes[0]
    alone = torch.cat([quantizer(latents[i : i + 1]).codes[0] for i in range(3)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("name", CONFIGS)
def test_codes_out_of_range_are_refused(name):
    quantizer = build_quantizer(CONFIGS[name])
    size = quantizer.codebook_sizes[0]
    with pytest.raises(VocabularyError, match=rf"0\.\.{size - 1}; got {size + 3}"):
        quantizer.decode_codes((torch.tensor([[[0, size + 3]]]),))
    with pytest.raises(VocabularyError, match="1 levels; got 2"):
        quantizer.decode_codes((torch.zeros(1, 1, 1, dtype=torch.long),) * 2)
    with pytest.raises(VocabularyError, match=r"Use \(codes,\)"):
        quantizer.decode_codes(torch.zeros(1, 1, 1, dtype=torch.long))
    with pytest.raises(VocabularyError, match="float32"):
        quantizer.decode_codes((torch.zeros(1, 1, 1),))
    with pytest.raises(VocabularyError, match=r"got torch.int64 \(2, 2\)"):
        quantizer.decode_codes((torch.zeros(2, 2, dtype=torch.long),))


@pytest.mark.parametrize("name", CONFIGS)
def test_features_tell_codes_apart_and_keep_neighbours_close(name):
    quantizer = build_quantizer(CONFIGS[name]).eval()
    (features,) = quantizer.code_features()
    size = quantizer.codebook_sizes[0]
    assert features.shape[0] == size == len(features.unique(dim=0))
    latents = quantizer.decode_codes((torch.arange(size).view(size, 1, 1),)).flatten(1)
    upper = torch.triu_indices(size, size, 1)
    distances = [torch.cdist(part, part)[upper[0], upper[1]] for part in (features, latents)]
    assert torch.corrcoef(torch.stack(distances))[0, 1] > 0.7


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_changes_no_code(name):
    options = {"vq": {"codebook_size": 2048, "num_channels": 16}}.get(name, {})
    quantizer = build_quantizer({**CONFIGS[name], **options}).eval()
    latents = latents_for(quantizer, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        codes = quantizer(latents).codes[0]
    assert torch.equal(codes, quantizer(latents).codes[0])


def test_a_resumed_vq_codebook_revives_the_same_codes():
    options = {"decay": 0.5, "revival_threshold": 0.4, "seed": 3}
    straight = VectorQuantizer(12, 2, **options).train()
    resumed = VectorQuantizer(12, 2, **options).train()
    first, second = (latents_for(straight, seed=seed) for seed in (0, 1))
    straight(first)
    resumed.load_state_dict(straight.state_dict())
    before = straight.embedding.clone()
    straight(second)
    resumed(second)
    assert not torch.equal(straight.embedding, before)
    assert torch.equal(straight.embedding, resumed.embedding)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, 7), min_size=1, max_size=4))
def test_fsq_reaches_exactly_the_product_of_its_levels(levels):
    quantizer = FSQ(levels)
    axes = [torch.linspace(-6, 6, 41)] * len(levels)
    points = torch.tensor(list(itertools.product(*[axis[:: len(levels)] for axis in axes])))
    codes = quantizer(points.T.reshape(1, len(levels), -1, 1)).codes[0]
    assert codes.min() >= 0
    assert codes.max() < math.prod(levels)
    for channel, level in enumerate(levels):
        line = torch.zeros(1, len(levels), 41, 1)
        line[0, channel, :, 0] = axes[channel]
        digits = quantizer(line).codes[0].flatten() // math.prod(levels[:channel]) % level
        assert digits.unique().tolist() == list(range(level))
        assert (digits.diff() >= 0).all()


def test_lfq_bits_are_signs():
    quantizer = LFQ(3)
    latents = torch.tensor([0.5, -0.1, 2.0]).view(1, 3, 1, 1)
    assert quantizer(latents).codes[0].item() == 0b101


def test_lfq_entropy_penalty_prefers_sure_tokens_and_used_bits():
    quantizer = LFQ(2, commitment_weight=0.0)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    sure_and_used = quantizer(corners.view(4, 2, 1, 1)).loss
    collapsed = quantizer(torch.ones(4, 2, 1, 1)).loss
    unsure = quantizer(0.01 * corners.view(4, 2, 1, 1)).loss
    assert sure_and_used < collapsed
    assert sure_and_used < unsure


def test_vq_codebook_follows_the_latents_and_revives_dead_codes():
    quantizer = VectorQuantizer(8, 2, decay=0.5, revival_threshold=0.2).train()
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 5.0], [-5.0, 5.0], [5.0, -5.0], [-5.0, -5.0]])
    for _ in range(60):
        picks = torch.randint(4, (64,), generator=generator)
        noise = 0.05 * torch.randn(64, 2, generator=generator)
        quantizer((centres[picks] + noise).view(64, 2, 1, 1))
    quantizer.eval()
    output = quantizer(centres.view(4, 2, 1, 1))
    assert (output.quantized - centres.view(4, 2, 1, 1)).abs().max() < 0.2
    before = quantizer.embedding.clone()
    quantizer(centres.view(4, 2, 1, 1))
    assert torch.equal(quantizer.embedding, before), "evaluation must not move the codebook"


def test_without_revival_unused_codes_stay_dead():
    latents = torch.tensor([[5.0, 5.0], [5.1, 5.0]]).view(2, 2, 1, 1)
    used = []
    for threshold in (0.0, 0.2):
        quantizer = VectorQuantizer(6, 2, decay=0.5, revival_threshold=threshold).train()
        for _ in range(20):
            quantizer(latents)
        near = (quantizer.embedding - torch.tensor([5.0, 5.0])).norm(dim=1) < 1.0
        used.append(int(near.sum()))
    assert used[0] < used[1]


def test_usage_and_perplexity():
    codes = torch.tensor([0, 0, 1, 1])
    assert codebook_usage(codes, 8) == 0.25
    assert codebook_perplexity(codes, 8) == pytest.approx(2.0)
    assert codebook_perplexity(torch.arange(8), 8) == pytest.approx(8.0)


def test_unknown_quantizers_and_options():
    with pytest.raises(ConfigError, match="Did you mean `fsq`"):
        build_quantizer({"type": "fsqq"})
    with pytest.raises(ConfigError, match="Quantizer `fsq` cannot take"):
        build_quantizer({"type": "fsq", "level": [3]})
    with pytest.raises(ConfigError, match="at least 2 each"):
        FSQ([8, 1])
    with pytest.raises(ConfigError, match=r"1\.\.20"):
        LFQ(0)
