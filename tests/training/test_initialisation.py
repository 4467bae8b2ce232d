import torch

from multimodal_dlm.models.presets import get_preset
from multimodal_dlm.models.transformer import UnifiedTransformerModel
from multimodal_dlm.tokenizers.quantizers import FSQ
from multimodal_dlm.training.initialisation import start_from_features
from multimodal_dlm.vocabulary import UnifiedVocabulary


def test_codes_that_share_digits_start_alike_and_nothing_else_moves():
    quantizer = FSQ([4, 4, 3])
    vocabulary = UnifiedVocabulary.build(
        {"text": [("text", 20)], "image": [("image.0", 48)]}, {"eos": ("text", 0)}
    )
    torch.manual_seed(0)
    model = UnifiedTransformerModel(vocabulary=vocabulary.to_dict(), **get_preset("tiny"))
    before = model.embed_tokens.weight.detach().clone()
    start_from_features(model, "image", quantizer.code_features(), seed=0)
    after = model.embed_tokens.weight.detach()
    rows = vocabulary.columns("image")
    assert torch.equal(after[: rows.start], before[: rows.start])
    image = after[rows.start :]
    assert abs(float(image.std() / before[rows.start :].std()) - 1) < 0.1
    near = (image[0] - image[1]).norm()  # One step of the first digit.
    far = (image[0] - image[47]).norm()  # Every digit at its other end.
    assert near < 0.7 * far
    again = UnifiedTransformerModel(vocabulary=vocabulary.to_dict(), **get_preset("tiny"))
    again.load_state_dict({**model.state_dict(), "embed_tokens.weight": before})
    start_from_features(again, "image", quantizer.code_features(), seed=0)
    assert torch.equal(again.embed_tokens.weight, model.embed_tokens.weight)
