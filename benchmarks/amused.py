"""Diffusers' AmusedPipeline at the size of a pipeline of ours, all weights random, nothing fetched.

Patil et al. 2024 (arXiv 2401.01808): a U-ViT over image tokens that reads the text by
cross-attention from a CLIP text encoder, 77 tokens wide, and guides in one batch. Random weights
take as long as trained ones.
"""

from typing import Any

import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

MARKS = ("<|startoftext|>", "<|endoftext|>")
TEXT_WIDTH, MICRO_WIDTH = 256, 64
NUM_MICRO_CONDITIONS = 5
NUM_LAYERS = 2  # Beside the convolution and attention blocks before and after them.


def make_amused(width: int, num_codes: int, num_parameters: int, image_size: int) -> Any:
    """A pipeline whose U-ViT has about as many parameters.

    Args:
        width: Of the U-ViT's hidden states and convolutions.
        num_codes: Of the picture's codebook.
        num_parameters: What the U-ViT is to have; the width of its MLPs is chosen for it.
        image_size: Side of the pictures in pixels; a token is 8 x 8.
    """
    torch.manual_seed(0)
    sizes = [_num_parameters(width, num_codes, 64 * inner) for inner in (1, 2)]
    inner = max(1, round(1 + (num_parameters - sizes[0]) / (sizes[1] - sizes[0])))
    pipeline = AmusedPipeline(
        vqvae=VQModel(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(32, 32, 64, 64),
            latent_channels=64,
            num_vq_embeddings=num_codes,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
            sample_size=image_size,
        ),
        tokenizer=_tokenizer(),
        text_encoder=CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=1024,
                hidden_size=TEXT_WIDTH,
                intermediate_size=4 * TEXT_WIDTH,
                projection_dim=TEXT_WIDTH,
                num_hidden_layers=4,
                num_attention_heads=4,
                bos_token_id=256,
                eos_token_id=257,
            )
        ),
        transformer=_transformer(width, num_codes, 64 * inner),
        scheduler=AmusedScheduler(mask_token_id=num_codes),
    )
    for name in ("vqvae", "text_encoder", "transformer"):
        getattr(pipeline, name).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode(pipeline: Any, prompts: list[str]) -> Any:
    """What the pipeline's call spends on text: the prompts, and as many empty ones."""
    for texts in (prompts, [""] * len(prompts)):
        ids = pipeline.tokenizer(
            texts, return_tensors="pt", padding="max_length", truncation=True,
            max_length=pipeline.tokenizer.model_max_length,
        ).input_ids  # fmt: skip
        with torch.no_grad():
            pipeline.text_encoder(ids, output_hidden_states=True)


def _transformer(width: int, num_codes: int, inner: int) -> UVit2DModel:
    return UVit2DModel(
        hidden_size=width,
        cond_embed_dim=TEXT_WIDTH,
        micro_cond_encode_dim=MICRO_WIDTH,
        micro_cond_embed_dim=NUM_MICRO_CONDITIONS * MICRO_WIDTH,
        encoder_hidden_size=TEXT_WIDTH,
        vocab_size=num_codes + 1,
        codebook_size=num_codes,
        in_channels=width,
        block_out_channels=width,
        num_res_blocks=1,
        block_num_heads=width // 64,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=width // 64,
        intermediate_size=inner,
        sample_size=8,
    )


def _num_parameters(width: int, num_codes: int, inner: int) -> int:
    with torch.device("meta"):
        return sum(weight.numel() for weight in _transformer(width, num_codes, inner).parameters())


def _tokenizer() -> CLIPTokenizer:
    """One token a letter, and 77 to a row as in CLIP."""
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: place for place, word in enumerate(words)}
    vocabulary |= {mark: 256 + place for place, mark in enumerate(MARKS)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=[], bos_token=MARKS[0], eos_token=MARKS[1], unk_token=MARKS[1],
        pad_token=MARKS[1], model_max_length=77,
    )  # fmt: skip
